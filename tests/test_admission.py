"""Who gets a place of the engine, and when."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.config import AdmissionConfig
from rollout_ft.engine.admission import Admission
from rollout_ft.errors import Overloaded


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def admission(places: int, clock: Clock | None = None, **config: Any) -> Admission:
    clock = clock or Clock()
    settings = AdmissionConfig(min_calls=1, start_calls=places, max_calls=1024, **config)
    return Admission(settings, clock, clock)


class Turns:
    """Turns that hold their place until they are told to go."""

    def __init__(self, admission: Admission):
        self.admission, self.order = admission, list[str]()
        self._go: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, began: float) -> None:
        self._go[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, began))
        await settled()

    async def _hold(self, name: str, began: float) -> None:
        async with self.admission.place(began):
            self.order.append(name)
            await self._go[name].wait()

    async def end(self, name: str) -> None:
        self._go[name].set()
        await settled()

    async def leave(self, name: str) -> None:
        self.tasks[name].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.tasks[name]
        await settled()

    async def end_all(self) -> None:
        while not all(task.done() for task in self.tasks.values()):
            for go in self._go.values():
                go.set()
            await settled()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_free_place_is_taken_at_once_and_never_more_than_there_are():
    turns = Turns(admission(2))
    for name in "abc":
        await turns.ask(name, 0)
    assert (turns.order, turns.admission.in_flight, turns.admission.waiting) == (["a", "b"], 2, 1)
    await turns.end("a")
    assert (turns.order, turns.admission.in_flight, turns.admission.waiting) == (["a", "b", "c"], 2, 0)
    await turns.end_all()
    assert turns.admission.in_flight == 0


async def test_of_those_that_wait_the_trial_that_began_first_is_first():
    turns = Turns(admission(1))
    await turns.ask("holds", 999)
    for name, began in (("young", 990.0), ("old", 100.0), ("middle", 700.0)):
        await turns.ask(name, began)
    await turns.end_all()
    assert turns.order == ["holds", "old", "middle", "young"]


async def test_of_two_that_began_together_the_one_that_came_first_is_first():
    clock = Clock()
    turns = Turns(admission(1, clock))
    await turns.ask("holds", 0)
    for name in ("first", "second", "third"):
        await turns.ask(name, 500)
    await turns.end_all()
    assert turns.order == ["holds", "first", "second", "third"]


async def test_a_young_trial_is_overtaken_for_a_bounded_time_however_many_old_ones_come():
    clock = Clock(1e6)
    turns = Turns(admission(1, clock, max_head_start_s=60))
    await turns.ask("old", 0)
    await turns.ask("young", clock.now)
    old = "old"
    for i in range(100):
        clock.now += 1
        await turns.ask(f"old {i}", 0)
        await turns.end(old)
        if turns.order[-1] == "young":
            break
        old = turns.order[-1]
    assert turns.order.index("young") <= 62
    await turns.end_all()


async def test_one_that_leaves_the_queue_takes_no_place_and_keeps_none():
    turns = Turns(admission(1))
    for name in "abc":
        await turns.ask(name, 0)
    await turns.leave("b")
    await turns.end("a")
    assert turns.order == ["a", "c"]
    await turns.leave("c")
    assert (turns.admission.in_flight, turns.admission.waiting) == (0, 0)


async def test_one_that_leaves_in_the_moment_it_is_given_a_place_gives_it_back():
    a = admission(1)
    a.in_flight = 1
    turns = Turns(a)
    await turns.ask("b", 0)
    await turns.ask("c", 0)
    a.leave()  # `b` is told, and has not run yet
    turns.tasks["b"].cancel()
    await settled()
    assert (turns.order, a.in_flight, a.waiting) == (["c"], 1, 0)
    await turns.end("c")
    assert a.in_flight == 0


async def test_one_too_many_is_told_when_to_come_again():
    clock = Clock()
    turns = Turns(admission(1, clock, max_waiting=2))
    turns.admission.call_s = 7.0
    for name in "abc":
        await turns.ask(name, 0)
    with pytest.raises(Overloaded, match="max_waiting") as e:
        async with turns.admission.place(0):
            pass
    assert (e.value.status, e.value.retry_after_s) == (429, 14)
    await turns.end_all()


async def test_a_limit_that_rises_lets_those_in_that_wait():
    turns = Turns(admission(1))
    for name in "abc":
        await turns.ask(name, 0)
    turns.admission.limit.start(3)
    turns.admission.grant()
    await settled()
    assert turns.order == ["a", "b", "c"]
    await turns.end_all()


STEP = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 2000)), st.tuples(st.just("end"), st.integers(0, 30)),
    st.tuples(st.just("leave"), st.integers(0, 30)),
    st.tuples(st.just("limit"), st.integers(1, 6)), st.tuples(st.just("wait"), st.integers(1, 50)),
)  # fmt: skip


@given(st.lists(STEP, max_size=60))
@settings(deadline=None, max_examples=150)
def test_whatever_comes_and_goes_no_place_is_lost_and_none_stands_empty(story: list[tuple[str, int]]):
    async def played() -> None:
        clock = Clock()
        turns = Turns(admission(2, clock))
        a = turns.admission
        for number, (what, n) in enumerate(story):
            running = [name for name, task in turns.tasks.items() if not task.done()]
            match what:
                case "ask":
                    await turns.ask(f"{number}", float(n))
                case "end" if turns.order:
                    await turns.end(turns.order[n % len(turns.order)])
                case "leave" if running:
                    await turns.leave(running[n % len(running)])
                case "limit":
                    a.limit.start(n)
                    a.grant()
                    await settled()
                case _:
                    clock.now += n
            holding = sum(not task.done() for name, task in turns.tasks.items() if name in turns.order)
            waiting = sum(not task.done() for name, task in turns.tasks.items() if name not in turns.order)
            assert (a.in_flight, a.waiting) == (holding, waiting)
            assert not waiting or a.in_flight >= a.limit.calls
        await turns.end_all()
        assert (a.in_flight, a.waiting) == (0, 0)

    asyncio.run(played())


async def test_thousands_that_wait_and_leave_are_not_kept():
    a = admission(1)
    turns = Turns(a)
    await turns.ask("holds", 0)
    for i in range(3000):
        turns.tasks[f"{i}"] = asyncio.create_task(a.wait(0))
    await settled()
    for i in range(2990):
        turns.tasks[f"{i}"].cancel()
    await settled()
    assert (a.waiting, len(a._heap) <= 40) == (10, True)
    for i in range(2990, 3000):
        turns.tasks[f"{i}"].cancel()
    await turns.end("holds")
