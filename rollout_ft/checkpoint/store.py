"""One store replica: the state, the bodies and the journal behind an async interface; as a Ray actor or in process.

Owns the order in which an accepted entry becomes durable: decided, kept, journalled, and only then answered. The rules
are in `state`; this module decides nothing about who may write.

The subtle invariant: an answer waits for the journal even when it changed nothing. A repeated append may find an entry
whose journal write is still under way, and must not be acknowledged before it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
import uuid
from collections.abc import Sequence
from typing import Any, cast

from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.groupcommit import GroupCommit
from rollout_ft.checkpoint.journal import MAX_RELEASED, Journal
from rollout_ft.checkpoint.log import Accepted, Entry, Head, Refused
from rollout_ft.checkpoint.payloads import Shelf, decode_label
from rollout_ft.checkpoint.ports import Call, Outline
from rollout_ft.checkpoint.records import (
    Appended,
    Doubted,
    JournalDamaged,
    JournalInUse,
    Opened,
    Place,
    Promised,
    Raised,
    Record,
    Released,
)
from rollout_ft.checkpoint.replay import OUTCOME, Replay
from rollout_ft.checkpoint.segments import Get, Memory, Put, Segments, keep, kept
from rollout_ft.checkpoint.state import Export, StoreState
from rollout_ft.checkpoint.view import Standing, View
from rollout_ft.clock import monotonic
from rollout_ft.errors import ConfigError, StoreUnavailable
from rollout_ft.fleet.lease import Lease, live
from rollout_ft.line import TOKEN_BYTES, Door, serve
from rollout_ft.telemetry.events import Events
from rollout_ft.telemetry.metrics import CHECKPOINT_BYTES, Readings
from rollout_ft.types import Partial, Raw

EXPORT_BYTES = 4 * 1024 * 1024
PAYLOAD_BYTES = 4 * 1024**3
LOCK_PAUSE_S = 0.2

Slot = tuple[Segments, int]
"""Where a payload is kept: number so and so of a trial's."""

_log = logging.getLogger("rollout_ft")


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
        memory_bytes: int | None = None,
        max_partials_per_trial: int = 64,
        payload_bytes: int = PAYLOAD_BYTES,
    ) -> None:
        self.name, self.incarnation = name, uuid.uuid4().hex
        self._state = StoreState(name, max_partials_per_trial=max_partials_per_trial)
        # Without a journal there is nowhere to leave payloads: the object store spills by itself.
        self._events, self._failed = Events(name), False
        self._lease: Lease | None = None
        self._memory = Memory(put, get, limit=None if journal_dir is None else memory_bytes)
        self._bodies: dict[str, Segments] = {}
        self._compacting: set[asyncio.Task[None]] = set()
        self._shelf = Shelf(put, get, payload_bytes)
        self._journal: Journal | None = None
        if journal_dir is not None:
            self._journal = Journal(journal_dir, name)
            Replay(self._state, self._redone, self._drop).run(self._journal.replay())
            self._report(self._journal)
            self._disk = GroupCommit(self._journal)
            self._memory.load = self._disk.read
        if view is not None and self._state.view is None and not self._state.promised:
            if self._state.trials:
                raise ConfigError(f"store {name} holds trials and was never a member: it cannot found a view")
            self._state.install(view)
            if self._journal is not None:
                self._journal.write([Opened(view.number, view.members, view.min_replicas)])

    async def append_many(self, view_number: int, batch: Raw) -> bytes:
        results: list[Refused | None] = []
        records: list[Record] = []
        slots: list[Slot | None] = []
        for append in wire.decode_appends(batch):
            outcome = self._state.append(view_number, append)
            results.append(None if isinstance(outcome, Accepted) else outcome)
            if isinstance(outcome, Accepted) and outcome.stored:
                slots.append(self._keep(append.trial_id, append.entry))
                records.append(_appended(append.trial_id, append.attempt, append.owner_epoch, append.seq, append.entry))
        await self._durable(records, slots)
        for bodies, _ in [slot for slot, record in zip(slots, records, strict=True) if slot and _ends(record)]:
            self._compacting.add(task := asyncio.create_task(bodies.compact()))
            task.add_done_callback(self._compacting.discard)
        return wire.encode_results(results)

    async def fence(self, view_number: int, trial_id: str, attempt: int, owner_epoch: int) -> Head | Refused:
        outcome = self._state.fence(view_number, trial_id, attempt, owner_epoch)
        raised = [Raised(trial_id, attempt, owner_epoch)] if isinstance(outcome, Head) else []
        await self._durable(raised)
        return outcome

    async def read(self, trial_id: str, from_seq: int = 0) -> list[Entry]:
        """Raises JournalDamaged for a trial of which entries are lost."""
        log = self._state.trials.get(trial_id)
        if log is not None and log.damaged:
            raise JournalDamaged(log.damaged)
        return await self._entries(trial_id, from_seq)

    async def _entries(self, trial_id: str, from_seq: int) -> list[Entry]:
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

    async def outlines(self, trial_ids: Sequence[str]) -> dict[str, Outline]:
        """Of those of them that are here and can be read."""
        return {trial_id: await self._outline(trial_id) for trial_id in trial_ids if trial_id in self._state.trials}

    async def _outline(self, trial_id: str) -> Outline:
        log, bodies = self._state.trials[trial_id], self._bodies.get(trial_id)
        if log.released or log.damaged or bodies is None or not log.length:
            return Outline(note=self._state.note(trial_id) or b"")
        last = log.length - 1
        ended = log.last_kind == OUTCOME
        try:
            first, end = await bodies.read(0, 1), await bodies.read(last, last + 1) if ended else [b""]
        except Exception as e:  # one that cannot be read is not to hide the others
            _log.warning("trial.no_outline trial=%s: %s", trial_id, e)
            return Outline()
        if not first or not end:  # it was released meanwhile
            return Outline(note=self._state.note(trial_id) or b"")
        return Outline(first[0], end[0])

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
        for entry in (await self._entries(trial_id, from_seq))[: head.length - from_seq]:
            if entries and limit < len(entry.payload):
                break
            entries.append(entry)
            limit -= len(entry.payload)
        return Export(trial_id, from_seq, prior, tuple(entries), head, partials, self._state.note(trial_id) or b"")

    async def load(self, number: int, exports: list[Export]) -> Refused | None:
        records: list[Record] = []
        slots: list[Slot | None] = []
        refused: Refused | None = None
        for export in exports:
            trial_id, head = export.trial_id, export.head
            doubt = self._doubt(trial_id)
            outcome = self._state.load(number, export)
            if isinstance(outcome, Refused):
                refused = outcome
                break
            for seq, entry in enumerate(outcome, len(self._bodies.get(trial_id, ()))):
                slots += [None] * (len(records) - len(slots))
                slots.append(self._keep(trial_id, entry))
                records.append(_appended(trial_id, head.attempt, head.owner_epoch, seq, entry))
            records.append(Raised(trial_id, head.attempt, head.owner_epoch))
            if self._doubt(trial_id) != doubt:
                records.append(Doubted(trial_id, self._doubt(trial_id)))
            if head.released:
                records.append(self._released(trial_id))
        await self._durable(records, slots)
        return refused

    async def freeze(self, number: int) -> Refused | None:
        refused = self._state.freeze(number)
        await self._durable([] if refused else [Promised(number)])
        return refused

    async def install(self, view: View) -> Refused | None:
        refused = self._state.install(view)
        await self._durable([] if refused else [Opened(view.number, view.members, view.min_replicas)])
        return refused

    async def release(self, trial_id: str, note: bytes = b"") -> bool:
        """Forget a trial's entries: it was collected. Again is a success; False when it is not known at all."""
        again = self._state.note(trial_id) is not None
        known = self._state.release(trial_id, note)
        await self._durable([self._released(trial_id)] if known and not again else [])
        if not self._state.frozen:
            self._state.forget(MAX_RELEASED, self._journal.holds if self._journal else lambda _: False)
        return known

    async def note(self, trial_id: str) -> bytes | None:
        """What was said of a trial when it was released; None for every other."""
        return self._state.note(trial_id)

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
            "bytes_in_memory": self._memory.used,
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
        """End this process, as an actor, when `renew` is not called for so long. Idempotent."""
        if self._lease is None:
            self._lease = Lease(lease_s)
            self._living = asyncio.create_task(live(self._lease))

    async def renew(self, heard: int) -> tuple[list[dict[str, Any]], Readings]:
        """The run lives; hands over the events after number `heard`, and what is kept here. What is committed is counted by those
        who commit."""
        if self._lease is not None:
            self._lease.renew()
        kept = {(CHECKPOINT_BYTES, "entries"): self._memory.used, (CHECKPOINT_BYTES, "routed_experts"): self._shelf.used}
        return self._events.unheard(heard), Readings(gauges=kept)

    def close(self) -> None:
        """Give the journal to whoever opens it next."""
        if self._journal is not None:
            self._disk.close()

    def _keep(self, trial_id: str, entry: Entry) -> Slot:
        bodies = self._bodies.get(trial_id)
        if bodies is None:
            bodies = self._bodies[trial_id] = Segments(self._memory)
        place = bodies.append(entry.payload)
        if entry.kind == OUTCOME:
            bodies.seal()
        return bodies, place

    def _redone(self, trial_id: str, entry: Entry, place: Place) -> None:
        self._placed([self._keep(trial_id, entry)], [place])

    def _drop(self, trial_id: str) -> None:
        self._shelf.release(trial_id)
        bodies = self._bodies.pop(trial_id, None)
        if bodies is not None:
            bodies.release()

    def _released(self, trial_id: str) -> Released:
        self._drop(trial_id)
        head = self._state.trials[trial_id].head
        return Released(trial_id, head.attempt, head.owner_epoch, head.length, head.chain, self._state.note(trial_id) or b"")

    def _report(self, journal: Journal) -> None:
        if journal.torn is not None:
            torn = journal.torn
            self._events.emit("journal.torn", file=str(torn.file), offset=torn.offset, bytes=torn.length, text=str(torn))
        for damage in journal.damage:
            where = {"file": str(damage.file), "offset": damage.offset, "bytes": damage.length, "text": str(damage)}
            self._events.emit("journal.damaged", trials=sorted(damage.trial_ids), records=damage.last - damage.first + 1, **where)
        for trial_id, log in self._state.trials.items():
            if log.damaged:
                self._events.emit("trial.refused", trial=trial_id, reason=log.damaged)

    def _doubt(self, trial_id: str) -> str:
        log = self._state.trials.get(trial_id)
        return log.damaged if log is not None else ""

    def _placed(self, slots: Sequence[Slot | None], places: Sequence[Place]) -> None:
        """The payloads of `slots` are on disk as well."""
        for slot, place in zip(slots, places, strict=False):
            if slot is not None:
                bodies, number = slot
                bodies.on_disk(number, place)
        self._memory.fit()

    async def _durable(self, records: Sequence[Record], slots: Sequence[Slot | None] = ()) -> None:
        if self._journal is None:
            return
        try:
            places = await self._disk.commit(records)
        except OSError as error:
            # The state already holds what the disk refused: from here on this replica may not acknowledge anything.
            if not self._failed:
                self._failed = True
                self._events.emit("journal.failed", file=str(self._journal.path), reason=str(error))
            raise StoreUnavailable(f"the journal of store {self.name} cannot be written: {error}") from error
        self._placed(slots, places)


def _ends(record: Record) -> bool:
    return isinstance(record, Appended) and record.kind == OUTCOME


def _appended(trial_id: str, attempt: int, owner_epoch: int, seq: int, entry: Entry) -> Appended:
    return Appended(trial_id, attempt, owner_epoch, seq, entry.kind, entry.key, entry.payload)


def create_store_actor(
    name: str, namespace: str | None, view: View | None, journal_dir: str | None = None, *,
    memory_bytes: int | None = None, payload_bytes: int = PAYLOAD_BYTES, loopback: bool = True, patience_s: float = 0.0, **options: Any,
) -> Any:  # fmt: skip
    """A detached store actor; the handle may still be starting. With `loopback` it listens for this machine alone;
    `patience_s` is how long it waits for a journal that another process still writes; `options` are Ray's (placement,
    runtime_env …).

    `max_restarts=0` is not an option: a restarted store would be empty, open, and accept anything.
    """
    import ray

    from rollout_ft.fleet.crew import shown_as
    from rollout_ft.fleet.node import node_id, node_ip, settle

    api = cast("Any", ray)

    async def get(ref: Any) -> list[bytes]:
        return await ref

    class StoreActor(Store):
        ping = api.method(concurrency_group="health")(Store.ping)
        forever = api.method(concurrency_group="watch")(Store.forever)

        def __init__(
            self, name: str, view: View | None, journal_dir: str | None, loopback: bool, patience_s: float, limits: dict[str, Any]
        ) -> None:
            until = monotonic() + patience_s
            while True:
                try:
                    Store.__init__(self, name, view, journal_dir, put=api.put, get=get, **limits)
                    break
                except JournalInUse:  # the store of that name in a cluster that was killed ends when its lease does
                    if monotonic() > until:
                        raise
                    time.sleep(LOCK_PAUSE_S)
            self._loopback = loopback
            self._door: asyncio.Task[Door] | None = None

        async def describe(self) -> dict[str, Any]:
            return {**await Store.describe(self), "node_id": node_id()}

        def __repr__(self) -> str:
            return shown_as(self.name)

        async def door(self) -> Door:
            """Where writers send what they commit."""
            if self._door is None:
                self._door = asyncio.create_task(self.listen(node_ip(self._loopback)))
                settle()
            return await asyncio.shield(self._door)

    fixed = {"name": name, "namespace": namespace, "max_restarts": 0, "max_task_retries": 0}
    actor = api.remote(concurrency_groups={"health": 2, "watch": 16})(StoreActor)
    settings = {"num_cpus": 0, "lifetime": "detached"} | options | fixed
    limits = {"memory_bytes": memory_bytes, "payload_bytes": payload_bytes}
    return actor.options(**settings).remote(name, view, journal_dir, loopback, patience_s, limits)
