"""The writer's side: commits that reach every replica of the view, and the takeover of a trial.

Owns the queue in front of the replicas (group commit: one outstanding call, what arrives meanwhile rides the next) and
what is done when replicas refuse or are silent: ask for the view, and send the same again. Must not choose replicas,
drop one, or know what an entry means.

The subtle invariant: a commit whose outcome is unknown blocks its trial. The lost call may still arrive, so the same
owner may only repeat exactly that append; anything else at its place could give two replicas different logs. A
takeover with a higher epoch ends the doubt, because it fences the lost call.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.log import Append, Entry
from rollout_ft.checkpoint.payloads import Payloads
from rollout_ft.checkpoint.ports import StorePort
from rollout_ft.checkpoint.replicas import Replicas, Retry, is_view_trouble, refusal
from rollout_ft.checkpoint.takeover import Adopted, adopt
from rollout_ft.checkpoint.view import View
from rollout_ft.errors import CommitRefused, RolloutFTError, StoreUnavailable
from rollout_ft.types import Partial

__all__ = ["Adopted", "Mirror"]

MAX_QUEUED = 8192
MAX_DOUBTS = 65_536


@dataclass(slots=True)
class _Waiting:
    """An append on its way; `sent` once a call that carries it has started."""

    append: Append
    encoded: bytes
    deadline: float
    done: asyncio.Future[None]
    sent: bool = False


class Mirror:
    """One writer process's access to the replicas of the current view."""

    def __init__(
        self,
        view: View,
        resolve: Callable[[str], StorePort],
        refresh: Callable[[], Awaitable[View]],
        *,
        commit_timeout_s: float,
        call_timeout_s: float,
        payload_copies: int = 1,
    ) -> None:
        self._replicas = Replicas(view, resolve, refresh, call_timeout_s)
        self.payloads = Payloads(self._replicas, payload_copies, call_timeout_s=call_timeout_s, fetch_timeout_s=commit_timeout_s)
        self._commit_timeout_s = commit_timeout_s
        self._queue: deque[_Waiting] = deque()
        self._room = asyncio.Semaphore(MAX_QUEUED)
        self._flusher: asyncio.Task[None] | None = None
        self._pending: dict[str, _Waiting] = {}
        self._doubts: dict[str, _Waiting] = {}
        self._closed = False

    @property
    def view(self) -> View:
        return self._replicas.view

    def set_view(self, view: View) -> None:
        """Learn a newer view at once; an older one is ignored."""
        self._replicas.set_view(view)

    async def commit(self, append: Append) -> None:
        """Return when every member of the view has it. One commit a trial at a time.

        Raises `Fenced` and `CommitRefused` when the store said no, `StoreUnavailable` when nobody knows: then repeat
        the very same append, or give the trial up. May overrun `commit_timeout_s` by one call.
        """
        encoded = wire.encode_append(append)
        await self._enter()
        try:
            while (earlier := self._pending.get(append.trial_id)) is not None and earlier.encoded != encoded:
                await asyncio.wait({earlier.done})
            waiting = earlier or self._admit(append, encoded)
            # A caller that is cancelled leaves the append on its way: it may be on a replica already.
            await asyncio.shield(waiting.done)
        finally:
            self._room.release()

    async def takeover(self, trial_id: str, attempt: int, owner_epoch: int) -> Adopted:
        """Fence the owners before, then read and adopt the union of all replicas; raises `Fenced` when too late."""
        deadline = self._now() + self._commit_timeout_s
        pauses = self._replicas.pauses()
        while True:
            try:
                adopted = await adopt(self._replicas, self.view, trial_id, attempt, owner_epoch)
                break
            except Retry as trouble:
                if self._now() >= deadline:
                    raise StoreUnavailable(f"takeover of {trial_id}: {trouble}") from None
                await self._replicas.renew(next(pauses))
        doubt = self._doubts.get(trial_id)
        if doubt is not None:
            known = any((entry.kind, entry.key) == _name(doubt.append) for entry in adopted.entries)
            if known or (attempt, owner_epoch) > (doubt.append.attempt, doubt.append.owner_epoch):
                del self._doubts[trial_id]
        return adopted

    async def read(self, trial_id: str) -> list[Entry]:
        """For operators: what some replica of the view has now; nobody is fenced and nothing is repaired."""
        why = "the view has no members"
        for name in self.view.members:
            answer = (await self._replicas.call([name], lambda port: port.read(trial_id)))[name]
            if not isinstance(answer, BaseException):
                return answer
            why = f"{name}: {answer}"
        raise StoreUnavailable(f"no replica could read {trial_id}; the last said {why}")

    async def put_partials(self, items: Sequence[tuple[str, int, int, Partial]]) -> None:
        """Best effort: what a replica does not get, or refuses, costs tokens and no correctness."""
        view = self.view
        for run in wire.split([wire.encode_partial(item) for item in items]):
            batch = wire.join(run)
            await self._replicas.call(view.members, lambda port, batch=batch: port.put_partials(view.number, batch))

    async def aclose(self) -> None:
        """Stop sending; what was still waiting is in doubt."""
        self._closed = True
        if self._flusher is not None:
            self._flusher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._flusher
        while self._queue:
            self._give_up(self._queue.popleft(), "this writer has closed")

    async def _enter(self) -> None:
        if not self._room.locked():
            await self._room.acquire()
            return
        try:
            async with asyncio.timeout(self._commit_timeout_s):
                await self._room.acquire()
        except TimeoutError:
            raise StoreUnavailable(f"{MAX_QUEUED} commits are waiting already: {self._replicas.trouble}") from None

    def _admit(self, append: Append, encoded: bytes) -> _Waiting:
        if self._closed:
            raise StoreUnavailable("this writer has closed")
        doubt = self._doubts.get(append.trial_id)
        if doubt is not None and doubt.encoded != encoded:
            if (append.attempt, append.owner_epoch) <= (doubt.append.attempt, doubt.append.owner_epoch):
                raise CommitRefused("in_doubt", append.trial_id, append.entry.key)
            del self._doubts[append.trial_id]
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(append, encoded, self._now() + self._commit_timeout_s, done)
        self._pending[append.trial_id] = waiting
        self._queue.append(waiting)
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())
        return waiting

    async def _flush(self) -> None:
        while self._queue:
            batch = self._take()
            try:
                await self._deliver(batch)
            finally:
                # Only a closing writer, or a mistake of ours, leaves any.
                for waiting in batch:
                    self._give_up(waiting, "this writer stopped before the store had answered")

    def _take(self) -> list[_Waiting]:
        batch = [self._queue.popleft()]
        size = len(batch[0].encoded)
        while self._queue and size + len(self._queue[0].encoded) <= wire.CALL_BYTES:
            size += len(self._queue[0].encoded)
            batch.append(self._queue.popleft())
        return batch

    async def _deliver(self, batch: list[_Waiting]) -> None:
        """Send until every append of the batch is accepted by all, refused by one, or out of time."""
        pauses = self._replicas.pauses()
        while True:
            with contextlib.suppress(Retry):
                await self._send(batch)
            self._expire(batch)
            batch = [waiting for waiting in batch if not waiting.done.done()]
            if not batch:
                return
            await self._replicas.renew(next(pauses))

    async def _send(self, batch: list[_Waiting]) -> None:
        view = self.view
        self._replicas.require_writable(view)
        for waiting in batch:
            waiting.sent = True
        encoded = wire.join(waiting.encoded for waiting in batch)
        answers = await self._replicas.call(view.members, lambda port: port.append_many(view.number, encoded))
        for waiting, verdict in zip(batch, self._replicas.judge(answers, len(batch)), strict=True):
            if verdict is None:
                self._finish(waiting, None)
            elif not is_view_trouble(verdict):
                self._finish(waiting, refusal(verdict, waiting.append.trial_id, waiting.append.entry.key))

    def _finish(self, waiting: _Waiting, error: RolloutFTError | None) -> None:
        """The store has spoken: the append is in, or will never be."""
        self._doubts.pop(waiting.append.trial_id, None)
        self._answer(waiting, error)

    def _expire(self, batch: list[_Waiting]) -> None:
        """Give up what is out of time: of the batch in hand, and of those that never left the queue."""
        now, trouble = self._now(), self._replicas.trouble
        for waiting in batch:
            if waiting.deadline <= now:
                self._give_up(waiting, f"not on all replicas of the view in time: {trouble}")
        while self._queue and self._queue[0].deadline <= now:
            self._give_up(self._queue.popleft(), f"not sent in time: {trouble}")

    def _give_up(self, waiting: _Waiting, why: str) -> None:
        if waiting.done.done():
            return
        if waiting.sent:
            self._doubts[waiting.append.trial_id] = waiting
            while len(self._doubts) > MAX_DOUBTS:
                del self._doubts[next(iter(self._doubts))]
        self._answer(waiting, StoreUnavailable(why))

    def _answer(self, waiting: _Waiting, error: RolloutFTError | None) -> None:
        del self._pending[waiting.append.trial_id]
        if error is None:
            waiting.done.set_result(None)
        else:
            waiting.done.set_exception(error)
            waiting.done.exception()  # a caller that was cancelled is not there to look at it

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _name(append: Append) -> tuple[str, str]:
    return append.entry.kind, append.entry.key
