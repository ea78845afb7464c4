"""The deadlines of one engine's calls, on a clock that jumps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint_fakes import run

from rollout_ft.engine.pace import Floors, Pace
from rollout_ft.engine.patience import LOOKS, Patience
from rollout_ft.errors import EngineLost

pytestmark = pytest.mark.timeout(60)
FLOORS = Floors(first_token_s=30, token_s=10, compile_s=180, ceiling_s=600, factor=3)
LATE_S = 10 / LOOKS + 0.2
"""How much after a deadline it is acted upon, at most."""


class Engine:
    """Calls of an engine that was seen to do everything once."""

    def __init__(self, *, cold: bool = False):
        self.asked: list[tuple[float, str]] = []
        self.answers: list[bool] = []
        self.pace = Pace(FLOORS)
        if not cold:
            self.pace.first_token(0.1, 20, 0)
            self.pace.gap(0.1, 0.1, 0)
        self.patience = Patience(self.pace, self._may_lose)

    async def _may_lose(self, reason: str) -> bool:
        self.asked.append((now(), reason))
        return self.answers.pop(0) if self.answers else True

    def call(self, *chunks_s: float, tokens: int = 100, ends: bool = False) -> asyncio.Task[str]:
        """A call with chunks at these times after its begin, which then `ends`, or stands still; returns why it was given up."""

        async def body() -> str:
            try:
                async with self.patience.waits(tokens) as wait:
                    for before_s, at_s in pairwise((0.0, *chunks_s)):
                        await asyncio.sleep(at_s - before_s)
                        wait.moved(4)
                    if not ends:
                        await asyncio.Event().wait()
            except EngineLost as e:
                return f"{now():.0f} {e.reason}"
            return ""

        return asyncio.create_task(body())


def now() -> float:
    return asyncio.get_running_loop().time()


def played(play: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await play()

    run(main())


def test_an_engine_that_freezes_is_found_within_the_floor_of_a_token():
    async def play() -> None:
        engine = Engine()
        calls = [engine.call(1, 2, 3), engine.call(1, 2)]
        await asyncio.gather(*calls)
        assert 13 <= now() <= 13 + LATE_S
        assert all("no token of any of its 2 calls" in c.result() for c in calls)
        assert len(engine.asked) == 1

    played(play)


def test_a_prompt_that_is_never_answered_is_found_within_the_floor_of_a_first_token():
    async def play() -> None:
        await Engine().call()
        assert 30 <= now() <= 30 + LATE_S

    played(play)


def test_the_first_requests_after_a_start_may_wait_for_kernels_to_be_compiled():
    async def play() -> None:
        engine = Engine(cold=True)
        assert await engine.call(170, 340, 341, ends=True) == ""
        begun = now()
        await engine.call(1, 2)
        assert begun + 2 + 10 <= now() <= begun + 2 + 10 + LATE_S

    played(play)


def test_a_neighbours_long_prompt_does_not_look_like_a_hang():
    async def play() -> None:
        engine = Engine()
        streams = engine.call(*range(1, 20), 100, *range(101, 110), ends=True)
        await asyncio.sleep(19.5)
        assert await engine.call(80, 81, tokens=100_000, ends=True) == ""
        assert await streams == ""
        assert engine.asked == []

    played(play)


def test_after_a_long_prompt_a_frozen_engine_is_found_as_soon_as_before_it():
    async def play() -> None:
        engine = Engine()
        streams = engine.call(*range(1, 20), 49.4, *range(50, 60))
        await asyncio.sleep(19.5)
        assert await engine.call(30, 31, tokens=100_000, ends=True) == ""
        await streams
        assert 59 + 10 <= now() <= 59 + 10 + LATE_S

    played(play)


def test_beside_a_long_prompt_a_frozen_engine_is_found_when_the_prompt_should_have_been_computed():
    async def play() -> None:
        engine = Engine()
        streams = engine.call(*range(1, 20))
        await asyncio.sleep(19)
        await asyncio.gather(streams, engine.call(tokens=100_000))
        assert 19 + 160 <= now() <= 19 + 160 + LATE_S

    played(play)


def test_calls_that_come_while_it_is_frozen_put_nothing_off():
    async def play() -> None:
        engine = Engine()
        calls = [engine.call(1, 2)]
        for _ in range(9):
            await asyncio.sleep(1)
            calls.append(engine.call(tokens=100))
        await asyncio.gather(*calls)
        assert now() <= 12 + LATE_S + 1

    played(play)


def test_a_call_that_was_retracted_has_the_time_to_be_computed_anew_while_others_move():
    async def play() -> None:
        engine = Engine()
        others = engine.call(*range(1, 200), ends=True)
        assert await engine.call(1, 2, 110, 111, tokens=60_000, ends=True) == ""
        await others
        assert engine.asked == []

    played(play)


def test_one_call_that_stands_while_others_move_is_a_lost_request_and_the_engine_is_not_given_up():
    async def play() -> None:
        engine = Engine()
        others = engine.call(*range(1, 100), ends=True)
        lost = await engine.call(1, 2)
        assert "while others moved" in lost
        assert 32 <= now() <= 32 + LATE_S + 1
        assert await others == ""
        assert engine.asked == []

    played(play)


def test_a_call_in_the_engines_queue_waits_as_long_as_the_engine_works_through_those_before_it():
    async def play() -> None:
        engine = Engine()
        busy = engine.call(*range(1, 500), ends=True)
        await asyncio.sleep(0.5)
        assert await engine.call(400, 401, ends=True) == ""
        await busy

    played(play)


def test_a_call_that_later_ones_overtook_was_lost_on_the_way():
    async def play() -> None:
        engine = Engine()
        forgotten = engine.call()
        await asyncio.sleep(1)
        busy = engine.call(*range(1, 100), ends=True)
        assert "while others moved" in await forgotten
        assert 30 <= now() <= 30 + LATE_S + 1
        await busy

    played(play)


def test_a_pause_counts_for_nothing_and_after_it_everything_may_be_computed_anew():
    async def play() -> None:
        engine = Engine()
        call = engine.call(1, 2, tokens=10_000)
        await asyncio.sleep(3)
        engine.patience.stop()
        await asyncio.sleep(10_000)
        assert not call.done()
        engine.patience.go_on()
        await call
        assert 10_003 + 30 + 15 <= now() <= 10_003 + 45 + LATE_S

    played(play)


def test_what_passed_in_a_pause_is_not_learnt():
    async def play() -> None:
        engine = Engine()
        call = engine.call(1, 2, 300, 301, ends=True)
        await asyncio.sleep(3)
        engine.patience.stop()
        await asyncio.sleep(296)
        engine.patience.go_on()
        await call
        assert engine.pace.silence_s(now(), longest=0, streams=True) == 10

    played(play)


def test_an_engine_that_may_not_be_given_up_is_asked_about_again_and_loses_nothing_when_it_wakes():
    async def play() -> None:
        engine = Engine()
        engine.answers = [False, False, False]
        assert await engine.call(1, 2, 40, 41, ends=True) == ""
        assert len(engine.asked) == 3
        times = [at for at, _ in engine.asked]
        assert all(10 <= b - a <= 10 + 2 * LATE_S for a, b in pairwise(times))

    played(play)


def test_one_that_moves_while_it_is_being_asked_about_is_kept():
    async def play() -> None:
        engine = Engine()

        async def slow(_: str) -> bool:
            await asyncio.sleep(5)
            return True

        engine.patience = Patience(engine.pace, slow)
        assert await engine.call(1, 2, 15, 16, ends=True) == ""

    played(play)


def test_it_is_idle_from_the_end_of_its_last_call_on():
    async def play() -> None:
        engine = Engine()
        call = engine.call(1, 2, ends=True)
        await asyncio.sleep(1)
        assert engine.patience.idle_s == 0
        await call
        await asyncio.sleep(7)
        assert engine.patience.idle_s == pytest.approx(7)

    played(play)


CHUNKS = st.lists(st.floats(0.01, 9.0), min_size=1, max_size=30)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 20), CHUNKS, st.integers(1, 20_000)), min_size=1, max_size=6))
def test_an_engine_whose_tokens_come_in_time_is_never_given_up(calls: list[tuple[float, list[float], int]]):
    async def play() -> None:
        engine, running = Engine(), list[asyncio.Task[str]]()
        for later_s, gaps, tokens in calls:
            await asyncio.sleep(later_s)
            running.append(engine.call(*(sum(gaps[: i + 1]) for i in range(len(gaps))), tokens=tokens, ends=True))
        assert set(await asyncio.gather(*running)) == {""}
        assert engine.asked == []

    played(play)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(CHUNKS, st.integers(1, 20_000)), min_size=1, max_size=6))
def test_a_frozen_engine_is_always_found_and_all_its_calls_with_it(calls: list[tuple[list[float], int]]):
    async def play() -> None:
        engine = Engine()
        running = [engine.call(*(sum(gaps[: i + 1]) for i in range(len(gaps))), tokens=tokens) for gaps, tokens in calls]
        said = await asyncio.gather(*running)
        last = max(sum(gaps) for gaps, _ in calls)
        assert all(said)
        assert now() <= last + 30 + 3 * 9.0 + 3 * 10 + LATE_S

    played(play)


def test_a_chunk_costs_microseconds():
    async def measure() -> float:
        engine, chunks = Engine(), 20_000
        async with engine.patience.waits(100) as wait:
            wait.moved(1)
            began = time.perf_counter()
            for _ in range(chunks):
                wait.moved(16)
            return (time.perf_counter() - began) / chunks

    took_s = min(asyncio.run(measure()) for _ in range(5))
    assert took_s < 10e-6, f"{took_s * 1e6:.2f} us"
