"""How long the calls of one engine may wait for a token.

Owns the deadlines of all calls. Knows nothing of what they wait for. A chunk of any call shows that the engine works: what
counts is how long all of them stand still, and for one that stands while others move, how long it does. While the engine
is paused on purpose no time counts: `stop` suspends every deadline and `go_on` gives each its whole time again, prompt
included, for an engine that continues may have to compute its prompts anew. An engine that stands still is given up only
when `may_lose` agrees: until then its calls wait on, and what it says when it wakes is not lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rollout_ft.engine.pace import Pace
from rollout_ft.errors import EngineLost

LOOKS = 8
"""In the shortest deadline: one is seen to be over so much late."""
AGAIN_S = 0.05
"""What seems over is looked at again after this: it may be this process that stood still, with chunks left to be read."""
STALLED, ALONE = "stalled: ", "stalled alone: "


@dataclass(slots=True, eq=False)
class Wait:
    """One call. `tokens` are those of its prompt and output; `owed` as many while its first token is due, else 0."""

    patience: Patience
    began: float
    last: float
    tokens: int
    owed: int
    deadline: asyncio.Timeout
    why: str = ""

    def moved(self, tokens: int, cached: int = 0) -> None:
        """A chunk came with so many tokens; of the prompt, `cached` were not computed."""
        self.patience.moved(self, tokens, cached)


class Patience:
    def __init__(self, pace: Pace, may_lose: Callable[[str], Awaitable[bool]]):
        self._pace, self._may_lose = pace, may_lose
        self._loop = asyncio.get_running_loop()
        self._waits: dict[Wait, None] = {}
        self._stopped = False
        self._timer: asyncio.TimerHandle | None = None
        self._asking: asyncio.Task[None] | None = None
        self.last_move = self._since = self._turnover = self._loop.time()
        self._newest = 0.0
        self._longest = 0
        self._when_moved: Callable[[], None] | None = None

    @property
    def idle_s(self) -> float:
        """How long nothing has been asked of the engine."""
        return 0.0 if self._waits else self._loop.time() - self._turnover

    def when_moved(self, told: Callable[[], None]) -> None:
        """Tells once, of the next chunk of any call."""
        self._when_moved = told

    @asynccontextmanager
    async def waits(self, tokens: int) -> AsyncGenerator[Wait]:
        """For a call of a prompt of so many tokens, which says when it `moved`. Raises EngineLost when it waits for too long."""
        now, why = self._loop.time(), ""
        try:
            async with asyncio.timeout(None) as deadline:
                wait = Wait(self, now, now, tokens, max(1, tokens), deadline)
                self._waits[wait] = None
                self._timer = self._timer or self._loop.call_later(self._pace.shortest_s / LOOKS, self._look)
                try:
                    yield wait
                finally:
                    del self._waits[wait]
                    self._turnover, why = self._loop.time(), wait.why
        except TimeoutError:
            if not why:
                raise
            raise EngineLost("", why) from None

    def moved(self, wait: Wait, tokens: int, cached: int) -> None:
        now = self._loop.time()
        counts = wait.last >= self._since and not self._stopped
        if not wait.owed:
            if counts:
                self._pace.gap(now - self.last_move, now - wait.last, now, longest=self._longest)
        else:
            if counts:  # its turn to be computed came when the one before it had been
                self._pace.first_token(now - max(wait.began, self._turnover), wait.tokens - cached, now)
            wait.owed, self._turnover, self._newest = 0, now, max(self._newest, wait.began)
        wait.tokens += tokens
        wait.last = self.last_move = now
        if self._when_moved is not None:
            told, self._when_moved = self._when_moved, None
            told()

    def stop(self) -> None:
        self._stopped = True

    def go_on(self) -> None:
        self._stopped, self._since = False, self._loop.time()
        for wait in self._waits:
            wait.owed = wait.tokens or 1

    def _look(self, again: bool = False) -> None:
        self._timer = None
        if not self._waits:
            return
        now = self._loop.time()
        self._longest = max(w.owed for w in self._waits)
        late, why = self._overdue(now)
        if late and again:
            self._give_up(late, why)
        again_s = AGAIN_S if late and not again else self._pace.shortest_s / LOOKS
        self._timer = self._loop.call_later(again_s, self._look, bool(late) and not again)

    def _overdue(self, now: float) -> tuple[list[Wait], str]:
        if self._stopped:
            return [], ""
        return overdue(now, self._waits, self._pace, since=self._since, last_move=self.last_move, newest=self._newest)

    def _give_up(self, late: Iterable[Wait], why: str) -> None:
        if why.startswith(ALONE):
            self._end(late, why)
        elif self._asking is None:
            self._asking = asyncio.create_task(self._ask(why))

    async def _ask(self, why: str) -> None:
        asked = self._loop.time()
        try:
            lost = await self._may_lose(why)
        finally:
            self._asking = None
        if lost and not self._stopped and self.last_move < asked:
            self._end(self._waits, why)
        else:
            self._since = max(self._since, asked)

    def _end(self, waits: Iterable[Wait], why: str) -> None:
        for wait in waits:
            if not wait.why:  # else it is about to end
                wait.why = why
                wait.deadline.reschedule(self._loop.time())


def overdue(now: float, waits: Collection[Wait], pace: Pace, *, since: float, last_move: float, newest: float) -> tuple[list[Wait], str]:
    """The calls that have waited for too long, and why: all when the engine stands still. `since`: when time began to count;
    `newest`: when the call began that was the last to begin of those with a first token."""
    still = now - max(since, last_move, min(w.began for w in waits))
    longest, streams = max(w.owed for w in waits), any(not w.owed for w in waits)
    if still >= pace.silence_s(now, longest=longest, streams=streams):
        return list(waits), f"{STALLED}no token of any of its {len(waits)} calls for {still:.1f} s"
    alone = [
        w for w in waits if last_move - max(since, w.last) >= pace.alone_s(now, tokens=w.tokens, queued=w.owed > 0 and w.began >= newest)
    ]
    return alone, f"{ALONE}no token of a call for {now - max(since, alone[0].last):.1f} s while others moved" if alone else ""
