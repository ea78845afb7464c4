"""What the owners of attached engines do, over the whole fleet.

Owns what follows elsewhere from what was seen at one engine: an owner's abort closes all of them, for owners abort all their
engines at about the same time, and what were sent to the next one would be aborted there; weights that arrive at one make
those without them stale; and what waits at a closed engine is let go of once others have been open for a while. Knows
nothing of how it was seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from rollout_ft.clock import Clock, monotonic
from rollout_ft.config import AttachConfig
from rollout_ft.engine.observer import Held
from rollout_ft.fleet.health import Health
from rollout_ft.fleet.member import Member, quietly
from rollout_ft.fleet.newest import Has, Newest
from rollout_ft.fleet.weights import Command, Op
from rollout_ft.telemetry.events import Events
from rollout_ft.types import JSON

ASK_S = 5.0


@dataclass(slots=True)
class Seen:
    """What its actor last said of an attached engine. `served`: the version with which it was open last."""

    open: bool = True
    held: str = ""
    version: str = ""
    served: str = ""
    since: float = 0.0
    """When it was opened or closed."""
    released: bool = False
    """What waited there was let go of since."""


class Watched(Protocol):
    """An engine of the fleet, as far as its owner is concerned."""

    engine_id: str
    health: Health
    member: Member | None
    seen: Seen


class Versions(Protocol):
    """Where the fleet's weights are kept."""

    async def arrived(self, version: str) -> None:
        """From now on this is the fleet's."""
        ...

    async def has(self, engine: Watched, version: str) -> None:
        """An engine has another version than before: the fleet's, or not."""
        ...


@dataclass(slots=True)
class Owners:
    config: AttachConfig
    events: Events
    engines: Callable[[], Collection[Watched]]
    versions: Versions
    clock: Clock = monotonic
    newest: Newest = field(init=False)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set["asyncio.Task[None]"])

    def __post_init__(self) -> None:
        self.newest = Newest(self.config.version_grace_s)

    # -- told by the engines' actors ------------------------------------------------------------------------------

    def up(self, engine: Watched, report: JSON) -> None:
        """It was attached, or found again. That it is there anew is as good as opened by its owner."""
        was = engine.seen.held
        engine.seen = Seen(report["open"], report["held"], report["version"], report["version"], self.clock())
        if was == Held.ABORTED:
            self._clear(engine, f"{engine.engine_id} was started anew")
        self._compare()

    def observed(self, engine: Watched, report: JSON) -> None:
        """What changed at one engine."""
        seen, was = engine.seen, engine.seen.held
        if report["open"] != seen.open:
            seen.since, seen.released = self.clock(), False
        moved = report["version"] != seen.version
        seen.open, seen.held, seen.version = report["open"], report["held"], report["version"]
        if seen.held == Held.ABORTED and was != Held.ABORTED:
            for other in self._others(engine):
                self._ask(other, "owner_suspected", engine.engine_id)
        elif seen.held != Held.ABORTED and was == Held.ABORTED:
            self._clear(engine, f"{engine.engine_id} is open again")
        elif report["spared"] and was == Held.SUSPECTED:
            self._clear(engine, f"what runs at {engine.engine_id} was spared")
        if seen.open and seen.served != seen.version:
            seen.served = seen.version
            if self.newest.arrived(seen.version):
                self._announce()
        if moved:
            self._spawn(self.versions.has(engine, seen.version))
        self._compare()

    def left(self, engine: Watched) -> None:
        """Its owner took it away: whatever was seen there says nothing about the others."""
        if engine.seen.held == Held.ABORTED:
            self._clear(engine, f"{engine.engine_id} was taken away")
        engine.seen = Seen()

    # -- told by who knows ----------------------------------------------------------------------------------------

    def told(self, command: Command) -> None:
        """What a trainer asked of all engines says something about theirs."""
        if command.op is Op.RESUME:
            self.told_open()
        if command.op in (Op.UPDATE, Op.LOAD, Op.NAME) and command.version:
            self.newest.told(command.version)

    def told_open(self) -> None:
        for engine in self._there():
            self._ask(engine, "owner_told")

    # -- as time passes -------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(self.config.poll_s)
            self._compare()
            self._release()

    def _compare(self) -> None:
        ready = [e for e in self._there() if e.seen.version]
        if self.newest.among([Has(e.engine_id, e.seen.version, e.seen.open) for e in ready], self.clock()):
            self._announce()

    def _announce(self) -> None:
        self.events.emit("fleet.version", weight_version=self.newest.version)
        self._spawn(self.versions.arrived(self.newest.version))

    def _release(self) -> None:
        """What waits at an engine that is closed goes where others are open, if they stay so for a while."""
        since = self.clock() - self.config.move_parked_s
        there = self._there()
        if any(e.seen.open and e.health.serves and e.seen.since <= since for e in there):
            for engine in there:
                if not engine.seen.open and not engine.seen.released and engine.seen.since <= since:
                    engine.seen.released = True
                    self._ask(engine, "release")

    # -- helpers --------------------------------------------------------------------------------------------------

    def _there(self) -> list[Watched]:
        return [e for e in self.engines() if e.member is not None and e.health.lives]

    def _others(self, engine: Watched) -> list[Watched]:
        return [e for e in self._there() if e is not engine]

    def _clear(self, engine: Watched, why: str) -> None:
        for other in self._others(engine):
            self._ask(other, "owner_cleared", why)

    def _ask(self, engine: Watched, method: str, *args: str) -> None:
        assert engine.member is not None
        self._spawn(quietly(engine.member.ask(method, *args, timeout_s=ASK_S)))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
