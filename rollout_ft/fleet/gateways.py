"""The run's gateways: which are up, and the port that they share.

Owns their replacement. A gateway holds nothing that matters, so that one that is gone is simply started again, wherever
its address is; the port stays the same as long as one of them has ever been up.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from rollout_ft.errors import ConfigError
from rollout_ft.fleet.crew import Crew, Setup
from rollout_ft.fleet.member import Gone, Member
from rollout_ft.fleet.pulse import Pulse
from rollout_ft.gateway.actor import bind
from rollout_ft.telemetry.events import Events
from rollout_ft.types import JSON

PAUSE_S = 1.0
START_S = 60.0


class Gateways:
    def __init__(self, crew: Crew, pulse: Pulse, events: Events):
        self._crew, self._pulse, self._events = crew, pulse, events
        self._by_role: dict[str, Member] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending = False
        self.port, self.node = crew.setup.config.gateway.port, ""
        """`node`: the address of one that has a gateway."""

    async def start(self, alive: Sequence[tuple[Member, JSON]], floor: Mapping[str, int]) -> None:
        """Takes over those that live and starts the others. Raises ConfigError when the port cannot be had."""
        living = {m.role: (m, d) for m, d in alive if m.role.startswith("gateway-")}
        for _, described in living.values():
            self.port, self.node = described["port"], described["node"]
        if not living:
            self.port = claim_port(self._crew.setup)
        roles = [f"gateway-{i}" for i in range(self._crew.setup.config.gateway.count)]
        await asyncio.gather(*(self._up(r, living[r][0] if r in living else None, floor.get(r, 0) + 1) for r in roles))

    def members(self) -> list[Member]:
        return list(self._by_role.values())

    def end(self) -> None:
        """None is replaced any more."""
        self._ending = True

    async def look(self, member: Member) -> None:
        """What the patrol does about one gateway."""
        if not await self._pulse.beats(member):
            self._lost(member, "does not answer", silent=True)

    async def _up(self, role: str, member: Member | None, incarnation: int) -> None:
        if member is None:
            member = await self._crew.gateway(role, incarnation, self.port)
            try:
                started: JSON = await member.ask("start", timeout_s=START_S)
            except Gone:
                self._crew.gone(member, silent=True)
                raise
            self.node = started["node"]
        self._by_role[role] = member
        self._spawn(self._watch(member))

    async def _watch(self, member: Member) -> None:
        self._lost(member, await member.death())

    def _lost(self, member: Member, reason: str, *, silent: bool = False) -> None:
        if self._by_role.get(member.role) is not member:
            return
        del self._by_role[member.role]
        self._crew.gone(member, silent=silent)
        self._spawn(self._replace(member, reason))

    async def _replace(self, member: Member, reason: str) -> None:
        incarnation = member.incarnation
        while not self._ending:
            self._events.emit("gateway.lost", gateway=self._crew.name(member.role, incarnation), reason=reason)
            incarnation += 1
            try:
                return await self._up(member.role, None, incarnation)
            except Exception as e:  # whatever it is, a gateway that did not start is tried again
                reason = f"start failed: {e}"
                await asyncio.sleep(PAUSE_S)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def claim_port(setup: Setup) -> int:
    """The gateways' port: the configured one if nobody else has it, else a free one."""
    host, port = setup.config.gateway.host, setup.config.gateway.port
    try:
        with socket.create_server((host, port)) as alone:
            port = alone.getsockname()[1]
        bind(host, port).close()
    except OSError as e:
        raise ConfigError(f"gateway.port: {host}:{port} cannot be used ({e.strerror}); set another, or 0 for a free one") from None
    return port
