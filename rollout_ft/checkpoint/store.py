"""One store replica: the state, the bodies and the journal behind an async interface; as a Ray actor or in process.

Owns the order in which an accepted entry becomes durable: decided, kept, journalled, and only then answered. The rules
are in `state`; this module decides nothing about who may write.

The subtle invariant: an answer waits for the journal even when it changed nothing. A repeated append may find an entry
whose journal write is still under way, and must not be acknowledged before it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.journal import Appended, Journal, Opened, Promised, Raised, Record, Released
from rollout_ft.checkpoint.log import Accepted, Entry, Head, Refused, mark
from rollout_ft.checkpoint.payloads import Shelf, decode_label
from rollout_ft.checkpoint.ports import Call
from rollout_ft.checkpoint.segments import Get, Put, Segments, keep, kept
from rollout_ft.checkpoint.state import Export, StoreState
from rollout_ft.checkpoint.view import Standing, View
from rollout_ft.errors import ConfigError, StoreUnavailable
from rollout_ft.fleet.lease import Lease, live
from rollout_ft.line import TOKEN_BYTES, Door, serve
from rollout_ft.types import Partial, Raw

EXPORT_BYTES = 4 * 1024 * 1024
PAYLOAD_BYTES = 4 * 1024**3


class Store:
    """A replica: with `view` a founding member, without one an empty learner. A journal's view wins over `view`."""

    def __init__(
        self,
        name: str,
        view: View | None = None,
        journal_dir: str | None = None,
        *,
        put: Put = keep,
        get: Get = kept,
        max_partials_per_trial: int = 64,
        payload_bytes: int = PAYLOAD_BYTES,
    ) -> None:
        self.name, self.incarnation = name, uuid.uuid4().hex
        self._put, self._get = put, get
        self._state = StoreState(name, max_partials_per_trial=max_partials_per_trial)
        self._bodies: dict[str, Segments] = {}
        self._shelf = Shelf(put, get, payload_bytes)
        self._journal: Journal | None = None
        self._broken: OSError | None = None
        if journal_dir is not None:
            self._journal = Journal(journal_dir, name)
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
            for record in self._journal.replay():
                self._redo(record)
        if view is not None and self._state.view is None and not self._state.promised:
            if self._state.trials:
                raise ConfigError(f"store {name} holds trials and was never a member: it cannot found a view")
            self._state.install(view)
            if self._journal is not None:
                self._journal.write([Opened(view.number, view.members, view.min_replicas)])

    async def append_many(self, view_number: int, batch: Raw) -> bytes:
        results: list[Refused | None] = []
        records: list[Record] = []
        for append in wire.decode_appends(batch):
            outcome = self._state.append(view_number, append)
            results.append(None if isinstance(outcome, Accepted) else outcome)
            if isinstance(outcome, Accepted) and outcome.stored:
                self._keep(append.trial_id, append.entry)
                records.append(_appended(append.trial_id, append.attempt, append.owner_epoch, append.entry))
        await self._durable(records)
        return wire.encode_results(results)

    async def fence(self, view_number: int, trial_id: str, attempt: int, owner_epoch: int) -> Head | Refused:
        outcome = self._state.fence(view_number, trial_id, attempt, owner_epoch)
        raised = [Raised(trial_id, attempt, owner_epoch)] if isinstance(outcome, Head) else []
        await self._durable(raised)
        return outcome

    async def read(self, trial_id: str, from_seq: int = 0) -> list[Entry]:
        log, bodies = self._state.trials.get(trial_id), self._bodies.get(trial_id)
        if log is None or bodies is None:
            return []
        marks = log.marks(from_seq)
        payloads = await bodies.read(from_seq, from_seq + len(marks))
        return [Entry(each.kind, each.key, payload) for each, payload in zip(marks, payloads, strict=True)]

    async def partials(self, trial_id: str) -> list[Partial]:
        return self._state.partials(trial_id)

    async def put_partials(self, view_number: int, batch: Raw) -> int:
        """How many were kept. Partials are not journalled: what they lose is tokens, which can be sampled again."""
        return sum(self._state.put_partial(view_number, *item) for item in wire.decode_partials(batch))

    async def put_payload(self, label: bytes, payload: bytes) -> bool:
        """Whether it is kept: brought by the owner, before its entry is in the log, and there was room."""
        said = decode_label(label)
        fixed = self._state.fixes_payload(said.trial_id, said.attempt, said.owner_epoch, said.key)
        if fixed is None or self._shelf.has(said.trial_id, said.key, said.digest):
            return fixed is not None
        return not fixed and await self._shelf.keep(said, payload)

    async def payload(self, trial_id: str, key: str, digest: str) -> bytes | None:
        return await self._shelf.read(trial_id, key, digest)

    async def lookup(self, trial_id: str) -> Head | None:
        log = self._state.trials.get(trial_id)
        return log.head if log else None

    async def trials(self) -> list[str]:
        return list(self._state.trials)

    async def heads(self) -> dict[str, Head]:
        return self._state.heads()

    async def export(self, wanted: list[tuple[str, int]]) -> list[Export | None]:
        """Stretches of logs, each from a position on, in the order asked; it ends early at about `EXPORT_BYTES`.

        None stands for a log that does not reach that position. The answer to a non-empty question is not empty.
        """
        exports: list[Export | None] = []
        size = 0
        for trial_id, from_seq in wanted:
            if size >= EXPORT_BYTES:
                break
            export = await self._stretch(trial_id, from_seq, EXPORT_BYTES - size)
            exports.append(export)
            size += sum(len(entry.payload) for entry in export.entries) if export else 0
        return exports

    async def _stretch(self, trial_id: str, from_seq: int, limit: int) -> Export | None:
        log = self._state.trials.get(trial_id)
        prior = log.chain_at(from_seq) if log else None
        if log is None or prior is None:
            return None
        # The head is taken first: entries that arrive during the read belong to the next round.
        head, partials = log.head, tuple(self._state.partials(trial_id))
        entries: list[Entry] = []
        for entry in (await self.read(trial_id, from_seq))[: head.length - from_seq]:
            if entries and limit < len(entry.payload):
                break
            entries.append(entry)
            limit -= len(entry.payload)
        return Export(trial_id, from_seq, prior, tuple(entries), head, partials)

    async def load(self, number: int, exports: list[Export]) -> Refused | None:
        records: list[Record] = []
        refused: Refused | None = None
        for export in exports:
            outcome = self._state.load(number, export)
            if isinstance(outcome, Refused):
                refused = outcome
                break
            trial_id, head = export.trial_id, export.head
            for entry in outcome:
                self._keep(trial_id, entry)
                records.append(_appended(trial_id, head.attempt, head.owner_epoch, entry))
            records.append(Raised(trial_id, head.attempt, head.owner_epoch))
            if head.released:
                self._bodies.pop(trial_id, None)
                self._shelf.release(trial_id)
                records.append(Released(trial_id))
        await self._durable(records)
        return refused

    async def freeze(self, number: int) -> Refused | None:
        refused = self._state.freeze(number)
        await self._durable([] if refused else [Promised(number)])
        return refused

    async def install(self, view: View) -> Refused | None:
        refused = self._state.install(view)
        await self._durable([] if refused else [Opened(view.number, view.members, view.min_replicas)])
        return refused

    async def release(self, trial_id: str) -> bool:
        known = self._state.release(trial_id)
        self._bodies.pop(trial_id, None)
        self._shelf.release(trial_id)
        await self._durable([Released(trial_id)] if known else [])
        return known

    async def standing(self) -> Standing:
        state = self._state
        return Standing(self.name, self.incarnation, state.view, state.promised, len(state.trials))

    async def describe(self) -> dict[str, Any]:
        view = self._state.view
        return {
            "name": self.name,
            "incarnation": self.incarnation,
            "pid": os.getpid(),
            "view": view.number if view else 0,
            "members": list(view.members) if view else [],
            "min_replicas": view.min_replicas if view else 0,
            "promised": self._state.promised,
            "frozen": self._state.frozen,
            "trials": len(self._state.trials),
            "entries": sum(len(each) for each in self._bodies.values()),
            "bytes": sum(each.total_bytes for each in self._bodies.values()),
            "payload_bytes": self._shelf.used,
            "journal": str(self._journal.path) if self._journal else None,
        }

    async def ping(self) -> int:
        """The opened view's number; in the actor it runs on a thread of its own, so it answers while others wait."""
        return self._state.opened

    async def forever(self) -> None:
        """Never returns: its failure is the news of this replica's death."""
        await asyncio.Event().wait()

    async def listen(self, host: str) -> Door:
        """Opens the line for as long as this process lives."""
        sock = socket.create_server((host, 0), backlog=1024)
        door = Door(host, sock.getsockname()[1], secrets.token_bytes(TOKEN_BYTES))
        self._line = await serve(self._answer, sock, door.token)
        return door

    async def _answer(self, what: int, view_number: int, payload: Raw) -> bytes:
        if what == Call.APPEND:
            return await self.append_many(view_number, payload)
        if what == Call.PAYLOAD:
            return await self._shelve(view_number, payload)
        return str(await self.put_partials(view_number, payload)).encode()

    async def _shelve(self, label_bytes: int, received: Raw) -> bytes:
        label, payload = bytes(received[:label_bytes]), bytes(memoryview(received)[label_bytes:])
        return b"1" if await self.put_payload(label, payload) else b"0"

    async def live(self, lease_s: float) -> None:
        """End this process, as an actor, when `renew` is not called for so long."""
        self._lease = Lease(lease_s)
        self._living = asyncio.create_task(live(self._lease))

    async def renew(self) -> list[Any]:
        self._lease.renew()
        return []

    def close(self) -> None:
        """Give the journal to whoever opens it next."""
        if self._journal is not None:
            self._writer.shutdown()
            self._journal.close()

    def _keep(self, trial_id: str, entry: Entry) -> None:
        bodies = self._bodies.get(trial_id)
        if bodies is None:
            bodies = self._bodies[trial_id] = Segments(self._put, self._get)
        bodies.append(entry.payload)
        if entry.kind == "outcome":
            bodies.seal()

    async def _durable(self, records: Sequence[Record]) -> None:
        if self._journal is None:
            return
        if self._broken is None:
            try:
                await asyncio.get_running_loop().run_in_executor(self._writer, self._journal.write, records)
            except OSError as error:
                # The state already holds what the disk refused: from here on this replica may not acknowledge anything.
                self._broken = error
        if self._broken is not None:
            raise StoreUnavailable(f"the journal of store {self.name} cannot be written: {self._broken}")

    def _redo(self, record: Record) -> None:
        """Apply what the journal says was accepted; it is not judged a second time."""
        state = self._state
        match record:
            case Appended(trial_id, attempt, owner_epoch, kind, key, payload):
                log, entry = state.log(trial_id), Entry(kind, key, payload)
                log.fence = max(log.fence, (attempt, owner_epoch))
                log.push(mark(log.head.chain, entry))
                self._keep(trial_id, entry)
            case Raised(trial_id, attempt, owner_epoch):
                log = state.log(trial_id)
                log.fence = max(log.fence, (attempt, owner_epoch))
            case Released(trial_id):
                state.release(trial_id)
                self._bodies.pop(trial_id, None)
            case Promised(number):
                state.promised = max(state.promised, number)
            case Opened(number, members, min_replicas):
                state.view, state.promised = View(number, members, min_replicas), max(state.promised, number)


def _appended(trial_id: str, attempt: int, owner_epoch: int, entry: Entry) -> Appended:
    return Appended(trial_id, attempt, owner_epoch, entry.kind, entry.key, entry.payload)


def create_store_actor(
    name: str, namespace: str | None, view: View | None, journal_dir: str | None = None, *, loopback: bool = True,
    payload_bytes: int = PAYLOAD_BYTES, **options: Any,
) -> Any:  # fmt: skip
    """A detached store actor; the handle may still be starting. With `loopback` it listens for this machine alone;
    `options` are Ray's (placement, runtime_env …).

    `max_restarts=0` is not an option: a restarted store would be empty, open, and accept anything.
    """
    import ray

    from rollout_ft.fleet.node import node_ip, settle

    api = cast("Any", ray)

    async def get(ref: Any) -> list[bytes]:
        return await ref

    class StoreActor(Store):
        ping = api.method(concurrency_group="health")(Store.ping)
        forever = api.method(concurrency_group="watch")(Store.forever)

        def __init__(self, name: str, view: View | None, journal_dir: str | None, loopback: bool, payload_bytes: int) -> None:
            Store.__init__(self, name, view, journal_dir, put=api.put, get=get, payload_bytes=payload_bytes)
            self._loopback = loopback
            self._door: asyncio.Task[Door] | None = None

        async def door(self) -> Door:
            """Where writers send what they commit."""
            if self._door is None:
                self._door = asyncio.create_task(self.listen(node_ip(self._loopback)))
                settle()
            return await asyncio.shield(self._door)

    fixed = {"name": name, "namespace": namespace, "max_restarts": 0, "max_task_retries": 0}
    actor = api.remote(concurrency_groups={"health": 2, "watch": 16})(StoreActor)
    return actor.options(**{"num_cpus": 0, "lifetime": "detached"} | options | fixed).remote(
        name, view, journal_dir, loopback, payload_bytes
    )
