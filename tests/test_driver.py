"""What the driver of an engine holds against it, and when it gives it up: on an engine that does as it is told, on a clock that jumps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from test_checkpoint_fakes import run
from test_generation import chunk, make, nothing

from rollout_ft.config import EngineConfig
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.gate import Closed
from rollout_ft.engine.port import Chunk
from rollout_ft.errors import EngineLost, EngineRefused
from rollout_ft.types import JSON

BROKEN = EngineLost("e", "connection: reset")


@dataclass
class Engine:
    """`says` of each real call what it ends in, else tokens; `answers` probes, `generates` for the canary, `sung` how often."""

    says: list[Exception] = field(default_factory=list[Exception])
    answers: bool = True
    generates: bool = True
    alive_asked: int = 0
    sung: list[float] = field(default_factory=list[float])
    info_asked: int = 0

    async def generate(self, rid: str, input_json: bytes, sampling: JSON, routed_from: int | None = None) -> AsyncIterator[Chunk]:
        if sampling["max_new_tokens"] == 0:
            self.sung.append(asyncio.get_running_loop().time())
            if not self.generates:
                await asyncio.Event().wait()
            yield Chunk([], [], (), "length")
            return
        if self.says:
            raise self.says.pop(0)
        yield chunk(1, finish="stop")

    async def load(self) -> int | None:
        return 0

    async def alive(self) -> bool:
        self.alive_asked += 1
        return self.answers

    async def scheduler_answers(self) -> None:
        self.info_asked += 1
        if not self.answers:
            await asyncio.Event().wait()

    async def abort(self, rid: str) -> None:
        return None


@dataclass
class Overseer:
    allows: list[bool] = field(default_factory=list[bool])
    asked: list[str] = field(default_factory=list[str])
    told: list[str] = field(default_factory=list[str])

    async def may_lose(self, reason: str) -> bool:
        self.asked.append(reason)
        return self.allows.pop(0) if self.allows else True

    def doubted(self, reason: str) -> None:
        self.told.append(reason)


class World:
    def __init__(self) -> None:
        self.engine, self.overseer = Engine(), Overseer()
        self.driver = Driver(self.engine, EngineConfig(compile_timeout_s=20, max_generations_per_turn=9))  # type: ignore[arg-type]
        self.driver.overseer = self.overseer

    async def turn(self) -> str:
        """One turn; what it ended in."""
        try:
            await self.driver.run(make(), nothing, 0)
        except (EngineLost, EngineRefused) as e:
            return str(e)
        return ""


def played(play: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(100_000):
            await play(World())

    run(main())


def test_connections_that_break_three_times_in_a_row_lose_an_engine_that_answers_every_probe():
    async def play(w: World) -> None:
        assert [await w.driver.is_lost(BROKEN) for _ in range(3)] == [False, False, True]
        assert len(w.overseer.asked) == 1

    played(play)


def test_a_token_in_between_clears_what_requests_said():
    async def play(w: World) -> None:
        for _ in range(4):
            assert not await w.driver.is_lost(BROKEN)
            assert not await w.driver.is_lost(BROKEN)
            assert await w.turn() == ""
        assert w.overseer.told[-1] == ""
        assert w.overseer.asked == []

    played(play)


def test_a_connection_that_broke_and_nobody_who_answers_any_more_is_a_lost_engine():
    async def play(w: World) -> None:
        w.engine.answers = False
        assert await w.driver.is_lost(BROKEN)
        assert asyncio.get_running_loop().time() < 2

    played(play)


def test_an_engine_that_may_not_be_given_up_is_waited_for_and_no_generation_is_spent_on_it():
    async def play(w: World) -> None:
        w.engine.answers, w.overseer.allows = False, [False] * 10
        waiting = asyncio.create_task(w.driver.is_lost(BROKEN))
        await asyncio.sleep(15)
        w.engine.answers = True
        assert not await waiting
        assert len(w.overseer.asked) >= 5

    played(play)


def test_one_that_is_seen_to_exit_meanwhile_is_lost_at_once():
    async def play(w: World) -> None:
        w.engine.answers, w.overseer.allows = False, [False] * 10
        waiting = asyncio.create_task(w.driver.is_lost(BROKEN))
        await asyncio.sleep(5)
        w.driver.lost = True
        assert await waiting

    played(play)


@pytest.mark.parametrize("generates", [True, False])
def test_after_requests_that_fail_in_a_row_the_canary_says_whether_the_engine_or_the_request_is_at_fault(generates: bool):
    async def play(w: World) -> None:
        w.engine.says, w.engine.generates = [EngineRefused(500, "no")] * 9, generates
        ended = await w.turn()
        assert "failed: 3 requests in a row" in ended
        assert await w.driver.is_lost(EngineLost("", "failed: 3 requests in a row")) is not generates

    played(play)


@pytest.mark.parametrize("status", [503, 429, None])
def test_what_is_refused_on_purpose_brings_no_doubt(status: int | None):
    async def play(w: World) -> None:
        w.engine.says = [EngineRefused(status, "full")] * 8
        assert await w.turn() == ""
        assert w.overseer.told == []

    played(play)


def test_an_engine_that_is_doubted_says_why_and_once_each_time():
    async def play(w: World) -> None:
        w.engine.says = [EngineRefused(500, "boom")]
        assert await w.turn() == ""
        assert [bool(reason) for reason in w.overseer.told] == [True, False]
        assert "boom" in w.overseer.told[0]

    played(play)


def test_an_idle_engine_that_does_not_answer_its_canary_three_times_is_lost():
    async def play(w: World) -> None:
        w.engine.generates = False
        why = await w.driver.probe_idle()
        assert "3 in a row" in why
        assert asyncio.get_running_loop().time() < 10 + 3 * (20 + 4)
        assert len(w.engine.sung) == 3

    played(play)


def test_one_canary_that_is_not_answered_costs_nothing():
    async def play(w: World) -> None:
        w.engine.generates = False
        probing = asyncio.create_task(w.driver.probe_idle())
        await asyncio.sleep(31)
        w.engine.generates = True
        await asyncio.sleep(100)
        assert not probing.done()
        assert [bool(reason) for reason in w.overseer.told] == [True, False]
        probing.cancel()

    played(play)


def test_an_engine_that_is_used_is_not_probed_and_one_that_is_closed_is_not_asked_to_generate():
    async def play(w: World) -> None:
        probing = asyncio.create_task(w.driver.probe_idle())
        for _ in range(20):
            await w.turn()
            await asyncio.sleep(5)
        assert w.engine.sung == []
        for why in (Closed.OWNER, Closed.STALE, Closed.OFFLOADED, Closed.PAUSED):
            w.driver.gate.close(why)
            await asyncio.sleep(60)
            w.driver.gate.open(why)
            assert w.engine.sung == []
            await w.turn()
        assert w.engine.info_asked == 6
        probing.cancel()

    played(play)


def test_a_paused_engine_that_answers_nothing_is_doubted_and_never_lost():
    async def play(w: World) -> None:
        probing = asyncio.create_task(w.driver.probe_idle())
        w.driver.gate.close(Closed.PAUSED)
        w.engine.answers = False
        await asyncio.sleep(2000)
        assert not probing.done()
        assert w.overseer.asked == []
        assert "canary" in w.overseer.told[0]
        probing.cancel()

    played(play)


def test_what_a_pause_cut_short_says_nothing():
    async def play(w: World) -> None:
        w.engine.generates = False
        probing = asyncio.create_task(w.driver.probe_idle())
        await asyncio.sleep(12)
        w.driver.gate.close(Closed.OWNER)
        await asyncio.sleep(100)
        assert w.overseer.told == []
        probing.cancel()

    played(play)
