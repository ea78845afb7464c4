"""Whether an actor still answers, judged from its answers, its port and our own clock."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from rollout_ft.fleet.member import Gone
from rollout_ft.fleet.pulse import MISSES, Pulse


class Actor:
    """Stands in for a member: `answers` decides what each ping gives."""

    name, role = "run/engine-0/1", "engine-0"

    def __init__(self, *answers: Callable[[], None]):
        self.answers, self.asked = list(answers), 0

    async def ask(self, method: str, *, timeout_s: float) -> int:
        assert method == "ping"
        self.asked += 1
        await asyncio.sleep(0)
        self.answers.pop(0)()
        return 1


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def yes() -> None:
    return None


def silent() -> None:
    raise Gone("no answer")


def dead() -> None:
    raise Gone("dead", dead=True)


async def beats(actor: Any, door: str = "", clock: Clock | None = None) -> bool:
    return await Pulse(1.0, clock or Clock()).beats(actor, door)


async def test_one_miss_is_forgiven():
    assert await beats(Actor(silent, yes))


async def test_two_misses_are_not():
    actor = Actor(silent, silent, yes)
    assert not await beats(actor)
    assert actor.asked == MISSES


async def test_what_ray_calls_dead_is_not_asked_again():
    actor = Actor(dead, yes)
    assert not await beats(actor)
    assert actor.asked == 1


async def test_a_port_that_refuses_is_a_process_that_ended():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert await beats(Actor(yes), f"127.0.0.1:{port}")
    actor = Actor(yes)
    assert not await beats(actor, f"127.0.0.1:{port}")
    assert actor.asked == 0


async def test_an_answer_that_is_lost_is_no_miss():
    lost = asyncio.Event()

    class Lossy(Actor):
        async def ask(self, method: str, *, timeout_s: float) -> int:
            self.asked += 1
            if self.asked == 1:
                await lost.wait()
            return 1

    actor: Any = Lossy()
    assert await Pulse(0.05, Clock()).beats(actor)
    assert actor.asked == 2


async def test_a_miss_while_we_stood_still_ourselves_is_not_counted():
    clock = Clock()

    def stalled() -> None:
        clock.now += 10
        silent()

    assert await beats(Actor(silent, stalled, stalled, yes), clock=clock)


async def test_whoever_asks_meanwhile_gets_the_same_answer():
    actor: Any = Actor(silent, silent)
    pulse = Pulse(1.0, Clock())
    assert await asyncio.gather(pulse.beats(actor), pulse.beats(actor), pulse.beats(actor)) == [False] * 3
    assert actor.asked == MISSES


async def test_a_look_that_takes_long_holds_up_no_other():
    slow, quick = Actor(), Actor()
    slow.name, quick.name = "slow", "quick"
    looked: list[str] = []
    enough = asyncio.Event()

    async def look(member: Any) -> None:
        looked.append(member.name)
        if looked.count("quick") == 3:
            enough.set()
        if member is slow:
            await asyncio.Event().wait()

    members: Any = [slow, quick]
    patrol = asyncio.create_task(Pulse(0.01).patrol(lambda: members, look))
    await enough.wait()
    patrol.cancel()
    assert looked.count("slow") == 1
