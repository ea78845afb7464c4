"""The loads that a run is put under, one after the other.

Owns what is measured while which load runs. Must not know what is printed of it. The subtle invariant: within a load
the sessions wait for each other at the end of every part, so that the CPU between two readings is that of a known
number of turns of a known length.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace

from rollout_ft.cli.bench.generator import generator
from rollout_ft.cli.bench.loads import Chat, Kind, Load, Result
from rollout_ft.cli.bench.usage import OURS, Processes, Usage, plus, since, together
from rollout_ft.config import model_dir
from rollout_ft.fleet.node import TRIM_S
from rollout_ft.runtime import Run
from rollout_ft.trial.client import Session

PARTS = 5
WINDOWS = 6
WINDOW_S = 5.0
OTHERS = 16
OTHERS_PAUSE_S = 0.4
COLLECT_PAUSE_S = 0.1
"""A trainer that did not pause would measure how the machine's cores are shared, not whether we stand still."""
SETTLE_S = TRIM_S + 1
"""Long enough for every process to have given back what it does not need."""


@dataclass(frozen=True, slots=True)
class Sizes:
    sessions: int
    turns: int
    tokens_in: int
    tokens_out: int

    @property
    def total(self) -> int:
        return self.sessions * self.turns

    @property
    def context_tokens(self) -> int:
        """Of one session, at its end."""
        return self.turns * (self.tokens_in + self.tokens_out)


@dataclass(frozen=True, slots=True)
class Part:
    """Some turns, and what they cost."""

    result: Result
    spent: Usage

    @property
    def cpu_ms(self) -> float:
        """Ours, a turn."""
        return together(self.spent, OURS).cpu_s * 1e3 / self.result.turns


Take = Callable[[int], Awaitable[Part]]


@dataclass(frozen=True, slots=True)
class Grown:
    """Sessions that grew from nothing to their full length, all at once."""

    sizes: Sizes
    parts: list[Part]

    @property
    def whole(self) -> Part:
        return Part(joined([part.result for part in self.parts]), plus(part.spent for part in self.parts))


@dataclass(frozen=True, slots=True)
class Collecting:
    """Turns of other sessions, with nobody collecting and with one trajectory collected again and again."""

    quiet: Result
    beside: Result
    collected: Result


def joined(results: Sequence[Result]) -> Result:
    """Results of one load's steps as if it had been one step."""
    turns = sum(r.turns for r in results)
    return Result(
        seconds=sum(r.seconds for r in results), cpu_s=sum(r.cpu_s for r in results),
        prompt_tokens=sum(r.prompt_tokens for r in results), latencies_ms=[ms for r in results for ms in r.latencies_ms],
        direct_ms=[ms for r in results for ms in r.direct_ms],
        reading_ms=sum(r.reading_ms * r.turns for r in results) / max(1, turns),
        bytes_out=results[-1].bytes_out, bytes_in=results[-1].bytes_in,
    )  # fmt: skip


def parts_of(turns: int) -> list[int]:
    """So many turns in five parts, as equal as they can be; fewer parts of fewer turns."""
    cuts = [turns * i // PARTS for i in range(PARTS + 1)]
    return [b - a for a, b in itertools.pairwise(cuts) if b > a]


class Bench:
    """A run under load."""

    def __init__(self, run: Run, processes: Processes):
        self._run, self._processes = run, processes

    async def open(self, count: int, name: str) -> list[Session]:
        return list(await asyncio.gather(*(self._run.open_session(trial_id=f"{name}-{i}") for i in range(count))))

    async def delete(self, sessions: Sequence[Session]) -> Usage:
        """What is used when they are gone, and everybody had the time to notice."""
        await self.end(sessions)
        await asyncio.sleep(SETTLE_S)
        return self._processes.usage()

    async def end(self, sessions: Sequence[Session]) -> None:
        await asyncio.gather(*(self._run.client.request("DELETE", f"/sessions/{s.session_id}", key=s.api_key) for s in sessions))

    async def compared(self, sessions: Sequence[Session], sizes: Sizes) -> Result:
        """One request at a time, each followed by one as large straight to an engine."""
        async with generator(self._load(sessions, sizes, "compare")) as clients:
            return await clients.take(turns=sizes.turns)

    async def grown(self, sessions: Sequence[Session], sizes: Sizes, watch: AbstractAsyncContextManager[object] | None = None) -> Grown:
        """Everybody asks as soon as the answer is there, through the gateways; `watch` is entered for as long."""
        async with self.steps(sessions, sizes) as take, watch or contextlib.nullcontext():
            return Grown(sizes, [await take(turns) for turns in parts_of(sizes.turns)])

    @contextlib.asynccontextmanager
    async def steps(self, sessions: Sequence[Session], sizes: Sizes) -> AsyncGenerator[Take]:
        """Through the gateways, as many turns more of everybody as are asked for at a time."""
        async with generator(self._load(sessions, sizes, "through")) as clients:

            async def take(turns: int) -> Part:
                before = self._processes.usage()
                result = await clients.take(turns=turns)
                return Part(result, since(self._processes.usage(), before))

            yield take

    async def direct(self, sizes: Sizes) -> Result:
        """As many conversations of the same size, straight to the engines."""
        load = replace(self._load([], sizes, "direct"), chats=[Chat("", "")] * sizes.sessions)
        async with generator(load) as clients:
            return await clients.take(turns=sizes.turns)

    async def collecting(self, collected: Session, others: Sequence[Session], sizes: Sizes) -> Collecting:
        """Windows with and without, in turn: whatever else the machine does meets both."""
        load = replace(self._load(others, sizes, "through"), pause_s=OTHERS_PAUSE_S)
        trainer = replace(self._load([collected], sizes, "collect"), pause_s=COLLECT_PAUSE_S)
        quiet: list[Result] = []
        beside: list[Result] = []
        reads: list[Result] = []
        async with generator(load) as clients, generator(trainer) as collector:
            for window in range(WINDOWS):
                if window % 2 == 0:
                    quiet.append(await clients.take(seconds=WINDOW_S))
                else:
                    mine, its = await asyncio.gather(clients.take(seconds=WINDOW_S), collector.take(seconds=WINDOW_S))
                    beside.append(mine)
                    reads.append(its)
        return Collecting(joined(quiet), joined(beside), joined(reads))

    def _load(self, sessions: Sequence[Session], sizes: Sizes, kind: Kind) -> Load:
        chats = [Chat(s.base_url, s.api_key) for s in sessions]
        return Load(kind, chats, self._processes.engines, model_dir(self._run.config), sizes.tokens_in, sizes.tokens_out)
