"""Whether an actor still answers: two misses and it does not.

Owns the pings of the supervisor. Knows nothing of what follows. Whoever asks about an actor that is being asked already
waits for the same answer. A miss while this process itself stood still says nothing about the other, and is not counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

from rollout_ft.clock import Clock, monotonic
from rollout_ft.fleet.member import Gone, Member
from rollout_ft.fleet.nodes import refuses

MISSES = 2
SENDS = 3
PINGS_PER_S = 500
"""Of a supervisor, together: a large fleet is pinged less often."""


class Pulse:
    def __init__(self, ping_s: float, clock: Clock = monotonic):
        self._ping_s, self._clock = ping_s, clock
        self._asking: dict[str, asyncio.Task[bool]] = {}

    async def beats(self, member: Member, door: str = "") -> bool:
        """False after two misses, or at once when nobody listens at `door` (host:port), or when Ray says that it is dead."""
        task = self._asking.get(member.name)
        if task is None:
            task = self._asking[member.name] = asyncio.create_task(self._beats(member, door))
            task.add_done_callback(lambda _: self._asking.pop(member.name, None))
        return await asyncio.shield(task)

    async def _beats(self, member: Member, door: str) -> bool:
        misses = 0
        while misses < MISSES:
            host, _, port = door.rpartition(":")
            if host and await refuses(host, int(port)):
                return False
            began = self._clock()
            try:
                await self._ping(member)
                return True
            except Gone as e:
                if e.dead:
                    return False
            misses += self._clock() - began < 1.5 * self._ping_s
        return False

    async def _ping(self, member: Member) -> None:
        """One ping, sent again while it is not answered: one answer that is lost on the way is no miss. Raises Gone."""
        pings: set[asyncio.Task[object]] = set()
        try:
            for n in range(SENDS):
                pings.add(asyncio.create_task(member.ask("ping", timeout_s=self._ping_s * (SENDS - n) / SENDS)))
                done, _ = await asyncio.wait(pings, timeout=self._ping_s / SENDS, return_when=asyncio.FIRST_COMPLETED)
                if done:
                    done.pop().result()
                    return
            raise Gone(f"{member.name}: silent")
        finally:
            for ping in pings:
                ping.cancel()
                ping.add_done_callback(lambda t: t.cancelled() or t.exception())

    async def patrol(self, members: Callable[[], Collection[Member]], look: Callable[[Member], Awaitable[None]]) -> None:
        """Looks at every member again and again. A look that takes long holds up no other."""
        looking: dict[str, asyncio.Task[None]] = {}
        while True:
            crowd = members()
            for member in crowd:
                if member.name not in looking:
                    task = looking[member.name] = asyncio.ensure_future(look(member))
                    task.add_done_callback(lambda _, name=member.name: looking.pop(name, None))
            await asyncio.sleep(max(self._ping_s, len(crowd) / PINGS_PER_S))
