"""The engines of the run: which serve, which are being replaced.

Owns the record of each engine and its replacement. Knows nothing of sessions. What is reported about an incarnation
that was replaced already changes nothing, so that every report may come twice, late, or from several.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field

from rollout_ft.checkpoint.view import View
from rollout_ft.clock import monotonic
from rollout_ft.errors import BadRequest, ConfigError, EngineLost, EngineUnfit
from rollout_ft.fleet.commands import Commands
from rollout_ft.fleet.crew import Crew
from rollout_ft.fleet.health import Event, Health, State, step
from rollout_ft.fleet.killcap import KillCap
from rollout_ft.fleet.member import Gone, Member, quietly
from rollout_ft.fleet.owners import Owners, Seen, Watched
from rollout_ft.fleet.placement import Candidate, share
from rollout_ft.fleet.pulse import MISSES, Pulse
from rollout_ft.fleet.restarts import Restarts
from rollout_ft.fleet.weights import Command, Op
from rollout_ft.telemetry.events import Events
from rollout_ft.telemetry.losses import OTHER, Loss, loss_of, unseen_s
from rollout_ft.types import JSON

TAKE_OVER_S = 5.0
ACTOR_START_S = 30.0
"""For the process of an actor that asks Ray for nothing; one that is placed on a node that died meanwhile never starts."""
AGAIN_S = 0.2
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
    stale: str = ""
    released: bool = False
    node: str = ""
    target: str = ""
    """The URL of an engine that somebody else owns."""
    seen: Seen = field(default_factory=Seen)
    draining: bool = False
    """It takes no session any more."""
    restarts: Restarts = field(default_factory=Restarts)
    up_since: float = -math.inf
    """Of one that came to others that serve: those that begin together warm up together."""
    last_loss: tuple[int, str, float] = (0, "", 0.0)
    """Which incarnation was lost last, why, and when that was noticed."""

    def candidate(self, sessions: int, warmup_s: float) -> Candidate:
        """What would wait for an owner is in doubt."""
        health, ramp = self.health, share(monotonic() - self.up_since, warmup_s)
        suspect = health.state is State.SUSPECT or not self.seen.open
        return Candidate(self.engine_id, health.serves, sessions, suspect=suspect, draining=self.draining, share=ramp)

    def describe(self) -> JSON:
        theirs = {"target": self.target, "open": self.seen.open, "held": self.seen.held} if self.target else {}
        return {
            "engine_id": self.engine_id, "state": self.health.state.value, "incarnation": self.health.incarnation,
            "reason": self.health.reason, "url": self.url, "weight_version": self.weight_version, "stale": self.stale,
            "node": self.node, "draining": self.draining, **theirs,
        }  # fmt: skip


class Engines:
    def __init__(self, crew: Crew, pulse: Pulse, events: Events, view: Callable[[], View]):
        self._crew, self._pulse, self._events, self._view = crew, pulse, events, view
        launched = 0 if crew.setup.config.engine.attach.active else crew.setup.config.engine.count
        self.by_id = {f"engine-{i}": Engine(f"engine-{i}") for i in range(launched)}
        self.owners: Owners | None = None
        """Where there are engines that somebody else owns."""
        self.on_lost: Callable[[Engine, str], None] = lambda engine, reason: None
        """Told once of each start of an engine that is lost after it was up."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.commands = Commands(crew.setup.config.fleet, events, self.by_id.values, self._told, self._hung, self._unpark)
        self.warmup_s = crew.setup.config.fleet.warmup_s
        self._cap = KillCap(crew.setup.config.fleet.max_kills_share, crew.setup.config.fleet.kill_window_s)
        self._refusal = ""

    async def start(self, existing: list[Member], floor: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """Takes over the engines that live and starts the others, waiting for these only where none lives; returns which sessions the
        living hold, with epochs.

        `floor` has the highest incarnation of each role that ever had a name here.
        """
        self._floor = floor
        for member in existing:
            if member.role not in self.by_id and self.owners is None:
                self.by_id[member.role] = Engine(member.role)  # it joined while the run went on
            elif member.role not in self.by_id:
                self._crew.gone(member)
        held: dict[str, dict[str, int]] = {}
        engines = list(self.by_id.values())
        there = await asyncio.gather(*(self._found(engine, existing, held) for engine in engines))
        missing = [engine for engine, found in zip(engines, there, strict=True) if not found]
        if self.commands.weights.released or any(e.health.lives for e in engines):
            for engine in missing:  # a model may take minutes to load: nobody waits for it where others serve
                self._spawn(self._start_later(engine))
        else:
            await self._some([asyncio.ensure_future(self._start_one(engine)) for engine in missing])
        if not any(e.health.lives for e in self.by_id.values()):
            if self._refusal:
                raise ConfigError(self._refusal)
            raise EngineLost("all", "; ".join(f"{e.engine_id}: {e.health.reason}" for e in self.by_id.values()))
        return held

    async def _found(self, engine: Engine, existing: Iterable[Member], held: dict[str, dict[str, int]]) -> bool:
        """Whether it was there, and is taken over."""
        mine = sorted((m for m in existing if m.role == engine.engine_id), key=lambda m: m.incarnation)
        for old in mine[:-1]:
            self._crew.gone(old)
        engine.health = Health(incarnation=self._floor.get(engine.engine_id, 0) + 1)
        if not mine:
            return False
        engine.health = Health(incarnation=mine[-1].incarnation)
        if await self._take_over(engine, mine[-1], held):
            return True
        self._crew.gone(mine[-1])
        engine.health = Health(incarnation=self._floor[engine.engine_id] + 1)
        return False

    async def _some(self, starts: list[asyncio.Future[None]]) -> None:
        """Returns when all are up; where they are somebody else's, nobody waits for those that are not there."""
        left = set(starts)
        while left:
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            for start in done:
                start.result()
            if self.owners is not None and any(e.health.serves for e in self.by_id.values()):
                for start in left:
                    self._spawn(start)
                return

    async def _take_over(self, engine: Engine, member: Member, held: dict[str, dict[str, int]]) -> bool:
        try:
            described = await member.ask("describe", timeout_s=TAKE_OVER_S)
        except (Gone, AttributeError):
            return False
        held[engine.engine_id] = described["sessions"]
        try:
            await self._up(engine, member, described)
        except Gone as e:
            self.lost(engine.engine_id, member.incarnation, str(e), silent=True)
        return True

    async def _start_later(self, engine: Engine) -> None:
        await self.commands.memory_is_ours()
        await self._start_one(engine)

    async def _start_one(self, engine: Engine) -> None:
        incarnation = engine.health.incarnation
        try:
            member = engine.member = await self._crew.engine(engine.engine_id, incarnation, self._view(), engine.target)
            if not self._crew.setup.config.engine.num_gpus:
                await self._placed(member)
            described = await member.ask("start", timeout_s=self._crew.setup.config.engine.start_timeout_s + 30)
            await member.ask("set_view", self._view())
            await self._up(engine, member, described)
        except (ConfigError, EngineUnfit) as e:  # another start would end in the same way
            self._refusal = str(e)
            if engine.member is not None:
                self._crew.gone(engine.member)
            self._retire(engine, incarnation, str(e))
        except Exception as e:  # whatever it is, an engine that did not start is tried again
            engine.restarts = engine.restarts.failed()
            self._events.emit("engine.start_failed", engine=engine.engine_id, incarnation=incarnation, reason=str(e))
            self.lost(engine.engine_id, incarnation, str(e), silent=isinstance(e, Gone))

    async def _placed(self, member: Member) -> None:
        """Raises Gone with what is known of an actor that Ray does not start."""
        try:
            await member.ask("ping", timeout_s=ACTOR_START_S)
        except Gone as e:
            if e.dead:
                raise
            node = self._crew.node_of(member)
            where = f"on node {node}" if node else "on any node"
            raise Gone(f"its actor is still pending after {ACTOR_START_S:g} s {where}, though it asks for no resources: {e}") from e

    async def _up(self, engine: Engine, member: Member, described: JSON) -> None:
        """It answers; whether it serves is said by its weights. Raises Gone."""
        engine.member, engine.url, engine.node = member, described["url"], described["node"]
        self._crew.seen(member, described["node_id"])
        engine.health = step(engine.health, Event.UP, incarnation=member.incarnation)
        self._spawn(self._watch(engine.engine_id, member))
        await self.commands.join(engine, member)
        if self.owners is not None:
            self.owners.up(engine, described["attached"])
        engine.restarts = engine.restarts.up()
        self._events.emit("engine.up", engine=engine.engine_id, incarnation=member.incarnation, state=engine.health.state.value)

    def _told(self, engine: Engine, member: Member, report: JSON) -> None:
        """What an engine's actor says of its weights."""
        engine.weight_version, engine.stale, engine.released = report["version"], report["stale"], report["offloaded"]
        stale = Event.WEIGHTS_MISSED if engine.stale else Event.WEIGHTS_LOADED
        for event in (Event.OFFLOADED,) if engine.released else (Event.ONLOADED, stale):
            engine.health = step(engine.health, event, incarnation=member.incarnation, reason=engine.stale)

    def _hung(self, engine_id: str, incarnation: int, reason: str) -> None:
        """It did not answer an update: nothing but its end gets it out of there."""
        if self.may_lose(engine_id, incarnation, reason):
            self.lost(engine_id, incarnation, reason)

    def _unpark(self) -> None:
        """What waits at engines that serve nothing goes to those that do, where there are any."""
        if any(e.health.serves for e in self.by_id.values()):
            for engine in self.by_id.values():
                if engine.member is not None and engine.health.lives and not engine.health.serves:
                    self._spawn(quietly(engine.member.ask("let_go", timeout_s=TAKE_OVER_S)))

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
        engine.last_loss = incarnation, reason, monotonic()
        self._events.emit("engine.dead", engine=engine_id, incarnation=incarnation, reason=reason)
        if engine.member is not None:
            self._crew.gone(engine.member, silent=silent)
        if engine.url:
            engine.url = ""
            self.on_lost(engine, reason)
        limits = self._crew.setup.config.engine
        engine.restarts = engine.restarts.died(monotonic(), limits.restart_window_s)
        if not engine.target and engine.restarts.count > limits.max_restarts:
            why = f"it died more than {limits.max_restarts} times in {limits.restart_window_s:g} s (engine.max_restarts)"
            return self._retire(engine, incarnation, f"{reason}; {why}")
        self._spawn(self._replace(engine))

    def loss(self, engine_id: str, incarnation: int) -> Loss:
        """What became of an engine that had a session."""
        engine = self.by_id.get(engine_id)
        lost, reason, at = engine.last_loss if engine is not None else (0, "", 0.0)
        if engine is not None and engine.health.incarnation == incarnation != lost and engine.health.state is not State.DEAD:
            return Loss()
        if lost != incarnation:
            return Loss(OTHER)
        silence_s = MISSES * self._crew.setup.config.fleet.ping_s
        return Loss(loss_of(reason), monotonic() - at, unseen_s(reason, silence_s))

    def _retire(self, engine: Engine, incarnation: int, reason: str) -> None:
        engine.health = step(engine.health, Event.RETIRE, incarnation=incarnation, reason=reason)
        self._events.emit("engine.retired", engine=engine.engine_id, reason=reason)

    def retire(self, engine_id: str, reason: str = "the run ends") -> None:
        """The engine ends on purpose and is not replaced."""
        engine = self.by_id[engine_id]
        engine.health = step(engine.health, Event.RETIRE, incarnation=engine.health.incarnation, reason=reason)

    # -- who comes and goes while the run goes on -----------------------------------------------------------------

    def expect(self, engine_id: str, target: str) -> None:
        """An engine that is there when the run starts."""
        self.by_id[engine_id] = Engine(engine_id, target=target)

    def resize(self, count: int, drain_s: float) -> JSON:
        """So many engines of ours: those that are missing start, the newest of those that are too many are drained."""
        there = [e for e in self.by_id.values() if e.health.state is not State.RETIRED and not e.draining]
        numbers = [int(e.engine_id.rpartition("-")[2]) for e in self.by_id.values()]
        for number in range(max(numbers) + 1, max(numbers) + 1 + count - len(there)):
            self.join(f"engine-{number}")
        for engine in there[count:]:
            self._spawn(self.leave(engine.engine_id, "drained", drain_s))
        return {"engines": [e.describe() for e in self.by_id.values()]}

    def join(self, engine_id: str, target: str = "") -> None:
        """An engine more, or again: it starts, and takes sessions once it serves."""
        engine = self.by_id.get(engine_id)
        if engine is not None and engine.health.state is not State.RETIRED:
            if engine.draining:
                self._spawn(self._join_again(engine))
            return
        last = engine.health.incarnation if engine is not None else self._floor.get(engine_id, 0)
        self.by_id[engine_id] = joined = Engine(engine_id, Health(incarnation=last + 1), target=target)
        self._events.emit("engine.joined", engine=engine_id, url=target)
        self._spawn(self._start_later(joined))

    async def _join_again(self, engine: Engine) -> None:
        """It came back before it was let go of."""
        while engine.health.state is not State.RETIRED:
            await asyncio.sleep(AGAIN_S)
        self.join(engine.engine_id, engine.target)

    async def leave(self, engine_id: str, reason: str, drain_s: float) -> None:
        """The engine takes no session any more; those that it has go elsewhere when their turns have ended, or after
        `drain_s`. Then it is let go of, and ended if we started it."""
        engine = self.by_id[engine_id]
        if engine.draining or engine.health.state is State.RETIRED:
            return
        engine.draining = True
        self._events.emit("engine.draining", engine=engine_id, reason=reason)
        incarnation, member = engine.health.incarnation, engine.member
        if member is not None and engine.health.lives:
            await quietly(member.ask("drain", drain_s, timeout_s=drain_s + TAKE_OVER_S))
        self.retire(engine_id, reason)
        if self.owners is not None:
            self.owners.left(engine)
        self._events.emit("engine.retired", engine=engine_id, incarnation=incarnation, reason=reason)
        if engine.member is not None:
            with contextlib.suppress(Gone):
                await engine.member.ask("stop", timeout_s=TAKE_OVER_S)
            self._crew.gone(engine.member)

    async def arrived(self, version: str) -> None:
        """Weights that an owner loaded are the fleet's from now on."""
        with contextlib.suppress(BadRequest):  # where no engine has them any more there is nothing to say
            await self.commands.carry_out(Command(Op.UPDATE, version, "external", whole=True))

    async def has(self, engine: Watched, version: str) -> None:
        """An owner loaded other weights into one engine."""
        if engine.member is not None and isinstance(engine, Engine):
            await self.commands.look_again(engine, engine.member)

    async def _replace(self, engine: Engine) -> None:
        await asyncio.sleep(engine.restarts.pause_s)
        await self.commands.memory_is_ours()
        starting = step(engine.health, Event.STARTING, incarnation=engine.health.incarnation + 1)
        if starting is engine.health or engine.draining:
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
        if engine is None or engine.health.incarnation != incarnation or not engine.health.lives or engine.member is None:
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

    def living(self) -> list[Member]:
        return [e.member for e in self.by_id.values() if e.member is not None and e.health.lives]

    async def push_view(self, view: View) -> None:
        """Tells every writer of a new view; one that does not hear it is refused by the stores and asks."""
        ping_s = self._crew.setup.config.fleet.ping_s
        await asyncio.gather(*(quietly(m.ask("set_view", view, timeout_s=ping_s)) for m in self.living()))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
