"""The engines of the run: which serve, which are being replaced.

Owns the record of each engine and its replacement. Knows nothing of sessions. What is reported about an incarnation
that was replaced already changes nothing, so that every report may come twice, late, or from several.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from rollout_ft.checkpoint.view import View
from rollout_ft.clock import monotonic
from rollout_ft.errors import ConfigError, EngineLost
from rollout_ft.fleet.crew import Crew
from rollout_ft.fleet.health import Event, Health, State, step
from rollout_ft.fleet.killcap import KillCap
from rollout_ft.fleet.member import Gone, Member
from rollout_ft.fleet.placement import Candidate, share
from rollout_ft.fleet.pulse import Pulse
from rollout_ft.fleet.restarts import Restarts
from rollout_ft.telemetry.events import Events
from rollout_ft.types import JSON

TAKE_OVER_S = 5.0
ACTOR_START_S = 30.0
"""For the process of an actor that asks Ray for nothing; one that is placed on a node that died meanwhile never starts."""
SILENT = "does not answer"
SPARED = (
    "more engines are in trouble at once than fleet.max_kills_share lets go of: look for what they share (network, disk, driver, "
    "power). It takes no new session while others can, and it is decided again when fleet.kill_window_s has passed"
)


@dataclass(slots=True)
class Engine:
    engine_id: str
    health: Health = field(default_factory=Health)
    member: Member | None = None
    url: str = ""
    weight_version: str = ""
    node: str = ""
    restarts: Restarts = field(default_factory=Restarts)
    up_since: float = -math.inf
    """Of one that came to others that serve: those that begin together warm up together."""

    def candidate(self, sessions: int, warmup_s: float) -> Candidate:
        health, ramp = self.health, share(monotonic() - self.up_since, warmup_s)
        return Candidate(self.engine_id, health.serves, sessions, suspect=health.state is State.SUSPECT, share=ramp)

    def describe(self) -> JSON:
        return {
            "engine_id": self.engine_id, "state": self.health.state.value, "incarnation": self.health.incarnation,
            "reason": self.health.reason, "url": self.url, "weight_version": self.weight_version, "node": self.node,
        }  # fmt: skip


class Engines:
    def __init__(self, crew: Crew, pulse: Pulse, events: Events, view: Callable[[], View]):
        self._crew, self._pulse, self._events, self._view = crew, pulse, events, view
        self.by_id = {f"engine-{i}": Engine(f"engine-{i}") for i in range(crew.setup.config.engine.count)}
        self._tasks: set[asyncio.Task[None]] = set()
        self.warmup_s = crew.setup.config.fleet.warmup_s
        self._cap = KillCap(crew.setup.config.fleet.max_kills_share, crew.setup.config.fleet.kill_window_s)
        self.weight_version = ""
        self._refusal = ""

    async def start(self, existing: list[Member], floor: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """Takes over the engines that live and starts the others; returns which sessions the living hold, with epochs.

        `floor` has the highest incarnation of each role that ever had a name here.
        """
        held: dict[str, dict[str, int]] = {}

        async def one(engine: Engine) -> None:
            mine = sorted((m for m in existing if m.role == engine.engine_id), key=lambda m: m.incarnation)
            for old in mine[:-1]:
                self._crew.gone(old)
            engine.health = Health(incarnation=floor.get(engine.engine_id, 0) + 1)
            if mine:
                engine.health = Health(incarnation=mine[-1].incarnation)
                if await self._take_over(engine, mine[-1], held):
                    return
                self._crew.gone(mine[-1])
                engine.health = Health(incarnation=floor[engine.engine_id] + 1)
            await self._start_one(engine)

        await asyncio.gather(*(one(engine) for engine in self.by_id.values()))
        if not any(e.health.serves for e in self.by_id.values()):
            if self._refusal:
                raise ConfigError(self._refusal)
            raise EngineLost("all", "; ".join(f"{e.engine_id}: {e.health.reason}" for e in self.by_id.values()))
        return held

    async def _take_over(self, engine: Engine, member: Member, held: dict[str, dict[str, int]]) -> bool:
        try:
            described = await member.ask("describe", timeout_s=TAKE_OVER_S)
        except (Gone, AttributeError):
            return False
        self._up(engine, member, described)
        held[engine.engine_id] = described["sessions"]
        return True

    async def _start_one(self, engine: Engine) -> None:
        incarnation = engine.health.incarnation
        try:
            member = engine.member = await self._crew.engine(engine.engine_id, incarnation, self._view())
            if not self._crew.setup.config.engine.num_gpus:
                await member.ask("ping", timeout_s=ACTOR_START_S)
            described = await member.ask("start", timeout_s=self._crew.setup.config.engine.start_timeout_s + 30)
            await member.ask("set_view", self._view())
        except ConfigError as e:  # another start would end in the same way
            self._refusal = str(e)
            if engine.member is not None:
                self._crew.gone(engine.member)
            return self._retire(engine, incarnation, str(e))
        except Exception as e:  # whatever it is, an engine that did not start is tried again
            engine.restarts = engine.restarts.failed()
            self._events.emit("engine.start_failed", engine=engine.engine_id, incarnation=incarnation, reason=str(e))
            return self.lost(engine.engine_id, incarnation, str(e), silent=isinstance(e, Gone))
        self._up(engine, member, described)

    def _up(self, engine: Engine, member: Member, described: JSON) -> None:
        engine.member, engine.url, engine.node = member, described["url"], described["node"]
        self._crew.seen(member, described["node_id"])
        engine.weight_version, engine.restarts = described["weight_version"], engine.restarts.up()
        self.weight_version = self.weight_version or engine.weight_version
        engine.health = step(engine.health, Event.UP, incarnation=member.incarnation)
        if engine.weight_version == self.weight_version:
            engine.health = step(engine.health, Event.WEIGHTS_LOADED, incarnation=member.incarnation)
        self._events.emit("engine.up", engine=engine.engine_id, incarnation=member.incarnation, state=engine.health.state.value)
        self._spawn(self._watch(engine.engine_id, member))

    async def _watch(self, engine_id: str, member: Member) -> None:
        reason = await member.death()
        self.lost(engine_id, member.incarnation, f"actor died: {reason}")

    def lost(self, engine_id: str, incarnation: int, reason: str, *, silent: bool = False) -> None:
        """The engine is dead: nothing is placed there any more, and another incarnation is started.

        `silent`: its actor did not answer, so that its node may be what is lost.
        """
        engine = self.by_id.get(engine_id)
        if engine is None:
            return
        after = step(engine.health, Event.LOST, incarnation=incarnation, reason=reason)
        if after is engine.health or after.state is not State.DEAD:
            return
        engine.health = after
        self._events.emit("engine.dead", engine=engine_id, incarnation=incarnation, reason=reason)
        if engine.member is not None:
            self._crew.gone(engine.member, silent=silent)
        limits = self._crew.setup.config.engine
        engine.restarts = engine.restarts.died(monotonic(), limits.restart_window_s)
        if engine.restarts.count > limits.max_restarts:
            why = f"it died more than {limits.max_restarts} times in {limits.restart_window_s:g} s (engine.max_restarts)"
            return self._retire(engine, incarnation, f"{reason}; {why}")
        self._spawn(self._replace(engine))

    def _retire(self, engine: Engine, incarnation: int, reason: str) -> None:
        engine.health = step(engine.health, Event.RETIRE, incarnation=incarnation, reason=reason)
        self._events.emit("engine.retired", engine=engine.engine_id, reason=reason)

    def retire(self, engine_id: str) -> None:
        """The engine ends on purpose and is not replaced."""
        engine = self.by_id[engine_id]
        engine.health = step(engine.health, Event.RETIRE, incarnation=engine.health.incarnation, reason="the run ends")

    async def _replace(self, engine: Engine) -> None:
        await asyncio.sleep(engine.restarts.pause_s)
        starting = step(engine.health, Event.STARTING, incarnation=engine.health.incarnation + 1)
        if starting is engine.health:
            return  # it was retired meanwhile
        engine.health = starting
        await self._start_one(engine)
        engine.up_since = monotonic()

    def doubted(self, engine_id: str, incarnation: int, reason: str) -> None:
        """What the engine's actor thinks of it; with no reason, it is trusted again."""
        engine = self.by_id.get(engine_id)
        if engine is None:
            return
        after = step(engine.health, Event.DOUBT if reason else Event.PROGRESS, incarnation=incarnation, reason=reason)
        if after.state is not engine.health.state:
            name = "engine.doubted" if reason else "engine.trusted"
            self._events.emit(name, engine=engine_id, incarnation=incarnation, reason=reason)
        engine.health = after

    def may_lose(self, engine_id: str, incarnation: int, reason: str) -> bool:
        """Whether the engine may be replaced on suspicion: not when so many were that they have a cause in common."""
        engine = self.by_id.get(engine_id)
        if engine is None or engine.health.incarnation != incarnation or engine.health.state is State.DEAD:
            return True
        self.doubted(engine_id, incarnation, reason)
        fleet = sum(e.health.state is not State.RETIRED for e in self.by_id.values())
        verdict = self._cap.judge((engine_id, incarnation), fleet, monotonic())
        if verdict.news:
            self._events.emit("engine.spared", engine=engine_id, incarnation=incarnation, reason=reason, remedy=SPARED)
        return verdict.kill

    async def suspect(self, engine_id: str, incarnation: int, reason: str) -> bool:
        """Whether this incarnation is dead. One that does not answer is declared so: fenced first, killed later."""
        engine = self.by_id.get(engine_id)
        if engine is None or engine.health.incarnation != incarnation or not engine.health.serves or engine.member is None:
            return True
        before = engine.health
        engine.health = step(before, Event.DOUBT, incarnation=incarnation, reason=reason)
        if await self._pulse.beats(engine.member, engine.url):
            if before.state is State.HEALTHY:
                engine.health = step(engine.health, Event.PROGRESS, incarnation=incarnation)
            return False
        return self._silent(engine, incarnation, reason)

    async def look(self, member: Member) -> None:
        """What the patrol does about one engine."""
        engine = self.by_id[member.role]
        if engine.member is not member:
            return
        if not await self._pulse.beats(member, engine.url):
            self._silent(engine, member.incarnation, SILENT)
        elif engine.health.reason == SILENT:
            self.doubted(engine.engine_id, member.incarnation, "")

    def _silent(self, engine: Engine, incarnation: int, reason: str) -> bool:
        """Its actor does not answer: whether it is given up."""
        lost = self.may_lose(engine.engine_id, incarnation, reason)
        if lost:
            self.lost(engine.engine_id, incarnation, reason, silent=True)
        return lost

    def serving(self) -> list[Member]:
        return [e.member for e in self.by_id.values() if e.member is not None and e.health.serves]

    async def push_view(self, view: View) -> None:
        """Tells every writer of a new view; one that does not hear it is refused by the stores and asks."""
        ping_s = self._crew.setup.config.fleet.ping_s
        await asyncio.gather(*(_quietly(m.ask("set_view", view, timeout_s=ping_s)) for m in self.serving()))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _quietly(call: Awaitable[object]) -> None:
    try:
        await call
    except Gone:
        return
