"""The run's supervisor: the one actor that decides who does what.

Owns the order in which a run starts, is rebuilt and ends. Everything that it knows is soft: killed, it is started
again by Ray under the same name and learns all from the actors and the stores. It does no work per turn.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from typing import Any

from rollout_ft.checkpoint.view import View
from rollout_ft.clock import wall
from rollout_ft.errors import BadRequest, RolloutFTError
from rollout_ft.fleet.crew import Crew, Setup, shown_as
from rollout_ft.fleet.engines import Engine, Engines
from rollout_ft.fleet.gateways import Gateways
from rollout_ft.fleet.lease import Lease
from rollout_ft.fleet.listing import Query
from rollout_ft.fleet.looks import Looks, memory
from rollout_ft.fleet.member import Gone, Member
from rollout_ft.fleet.node import node_id
from rollout_ft.fleet.owners import Owners
from rollout_ft.fleet.predecessor import Claim, judge
from rollout_ft.fleet.pulse import Pulse
from rollout_ft.fleet.replacing import ask_for_another
from rollout_ft.fleet.sessions import Sessions
from rollout_ft.fleet.stores import Stores
from rollout_ft.fleet.weights import Command, latest
from rollout_ft.fleet.workers import Workers, engine_id_of
from rollout_ft.fleet.workers import base_url as base
from rollout_ft.gateway.actor import base_url
from rollout_ft.rayapi import ray
from rollout_ft.telemetry.events import Events
from rollout_ft.telemetry.feed import Feed, News
from rollout_ft.telemetry.metrics import ENGINES, SESSIONS_ACTIVE, STALENESS, Readings
from rollout_ft.telemetry.publisher import Publisher
from rollout_ft.telemetry.totals import Totals
from rollout_ft.types import JSON, Outcome, SessionSpec, Why

_log = logging.getLogger("rollout_ft")


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000)
class Supervisor:
    def __init__(self, setup: Setup):
        self._setup = setup
        self._crew = Crew(setup)
        self._feed = Feed()
        self._events = Events(f"supervisor:{self._feed.name}")
        self._totals = Totals(wall())
        self._publisher = Publisher(setup.config.run) if setup.config.telemetry.metrics else None
        self._recent, self._recoveries = memory()
        self._fresh: list[JSON] = []
        """What was told since the last round, which has it from all actors: only then is it in about its order."""
        self._started: asyncio.Task[None] | None = None
        self._ending = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeping: asyncio.Task[None] | None = None

    # -- start, rebuild, end --------------------------------------------------------------------------------------

    async def start(self) -> JSON:
        """Starts the run, or finds it running; returns `{gateway_url}`. Idempotent, and implied by every other call."""
        if self._started is None or _failed(self._started):
            self._started = asyncio.create_task(self._start())
        await asyncio.shield(self._started)
        warnings = [self._stores.warning] if self._stores.warning else []
        return {"gateway_url": base_url(self._setup.config.gateway, self._gateways.port, self._gateways.node), "warnings": warnings}

    async def claim(self, setup: Setup) -> Claim:
        """A process that goes on with a run asks whether this is its run; if it is, it is its owner from now on."""
        claim = judge(setup, self._setup, ending=self._ending)
        if claim is Claim.ADOPTED:
            await self.start()
            self._lease.renew()
            self._events.emit("run.adopted")
        return claim

    async def _start(self) -> None:
        self._lease = Lease(self._setup.config.orphan_s)
        existing = await self._crew.existing()
        described = await asyncio.gather(*(self._describe(m) for m in existing))
        alive = [(m, d) for m, d in zip(existing, described, strict=True) if d is not None]
        floor: Counter[str] = Counter()
        for member, described_as in zip(existing, described, strict=True):
            floor[member.role] = max(floor[member.role], member.incarnation)
            if described_as is None and not member.role.startswith(("store-", "faults")):
                self._crew.gone(member)  # silent: half-started or frozen. A silent store may be the only copy, and is spared
            if described_as is not None:
                self._crew.seen(member, described_as.get("node_id", ""))
                for role, incarnation in _remembered(described_as):
                    floor[role] = max(floor[role], incarnation)
        weights = latest(d["weights"]["fleet"] for m, d in alive if m.role.startswith("engine-"))
        await self._crew.disband(keep={m.name for m, _ in alive})
        known_view = max([self._setup.last_view, *(d["view"].number for m, d in alive if m.role.startswith("engine-"))])
        pulse = Pulse(self._setup.config.fleet.ping_s)
        self._engines = Engines(self._crew, pulse, self._events, lambda: self._stores.view)
        self._engines.commands.restore(weights)
        self._attach()
        self._stores = Stores(self._crew, pulse, self._events, self._engines.push_view)
        self._gateways = Gateways(self._crew, pulse, self._events)
        self._sessions = Sessions(self._engines, self._stores, self._events)
        self._looks = Looks(self._engines, self._stores, self._sessions, self._recent, self._recoveries)
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep_alive())
        await self._stores.start([m for m, _ in alive if m.role.startswith("store-")], known_view, floor)
        gateways = asyncio.create_task(self._gateways.start(alive, floor))
        for url in await self._workers.first() if self._workers else ():
            self._engines.expect(engine_id_of(url), url)
        held = await self._engines.start([m for m, _ in alive if m.role.startswith("engine-")], floor)
        self._sessions.restore(held)
        await gateways
        if any(member.role != "faults" for member in existing):  # a plan of faults is there before the run
            self._events.emit("supervisor.rebuilt", actors=len(alive), sessions=sum(map(len, held.values())))
        self._spawn(pulse.patrol(self._counted, self._look))
        if self._workers is not None and self._engines.owners is not None:
            self._spawn(self._workers.follow(self._came, self._left))
            self._spawn(self._engines.owners.watch())

    def _attach(self) -> None:
        """Where the engines are somebody else's: who they are, and what their owners do."""
        engine, self._workers = self._setup.config.engine, None
        if not engine.attach.active:
            return
        engines = self._engines
        self._workers = Workers(engine.attach, engine.start_timeout_s)
        engines.owners = Owners(engine.attach, self._events, lambda: list(engines.by_id.values()), engines)
        if replace_url := engine.attach.replace_url:

            def ask(lost: Engine, reason: str) -> None:
                self._spawn(ask_for_another(replace_url, lost.target, reason, lost.health.incarnation, self._events))

            engines.on_lost = ask

    def _came(self, url: str) -> None:
        self._engines.join(engine_id_of(url), url)

    async def _left(self, url: str, reason: str) -> None:
        self._spawn(self._engines.leave(engine_id_of(url), reason, 0))

    def _counted(self) -> list[Member]:
        return [*self._engines.living(), *self._stores.counted(), *self._gateways.members()]

    async def _look(self, member: Member) -> None:
        """The patrol: a node that is gone takes its actors along in silence."""
        if member.role.startswith("engine-"):
            await self._engines.look(member)
        elif member.role.startswith("store-"):
            await self._stores.look(member)
        else:
            await self._gateways.look(member)

    async def _describe(self, member: Member) -> JSON | None:
        try:
            return await member.ask("describe", timeout_s=5)
        except (Gone, RolloutFTError, AttributeError):
            return None

    async def _keep_alive(self) -> None:
        """Passes the lease on to every actor and collects their events; ends the run when the lease ran out.

        From the start's beginning: engines may take minutes, and who started the run waits for them.
        """
        while not self._lease.expired:
            if self._started is not None and not self._started.done():
                self._lease.renew()
            await self._collect()
            await asyncio.sleep(self._setup.config.orphan_s / 10)
        self._events.emit("run.orphaned")
        await self.stop()
        ray.actor.exit_actor()  # on purpose: Ray does not start it again

    async def _collect(self) -> None:
        members = self._crew_members()
        await asyncio.gather(*(self._renew(m) for m in members))
        self._totals.keep({member.role for member in members})
        self._told(self._events.take())
        self._recent.add(self._fresh)
        self._recoveries.add(self._fresh)
        self._fresh = []
        try:
            self._measure()
        except Exception:  # a run does not end for its metrics
            _log.exception("the run's metrics are not up to date")

    def _told(self, events: list[JSON]) -> None:
        fresh = self._feed.tell(events)
        for event in fresh:
            self._totals.saw(event)
        self._fresh += fresh

    def _measure(self) -> None:
        engines = self._engines
        behind = [engines.commands.weights.behind(e.weight_version) for e in engines.by_id.values() if e.health.serves]
        self._totals.fleet = {
            **{(ENGINES, state): n for state, n in Counter(e.health.state.value for e in engines.by_id.values()).items()},
            (SESSIONS_ACTIVE,): self._sessions.count(), (STALENESS,): max(behind, default=0),
            **self._stores.gauges(),
        }  # fmt: skip
        if self._publisher is not None:
            self._publisher.publish(self._totals)

    async def _renew(self, member: Member) -> None:
        readings: Readings | None = None
        heard = self._feed.delivered(member.name)
        try:
            events, readings = await member.ask("renew", heard, timeout_s=self._setup.config.orphan_s / 5)
            self._told(events)
        except Exception as e:  # whatever it is, the others go on; one that is lost is found elsewhere
            _log.debug("%s does not tell its events: %s", member.name, e)
        self._totals.take(member.role, member.incarnation, readings)

    def _crew_members(self) -> list[Member]:
        engines = [e.member for e in self._engines.by_id.values() if e.member is not None]
        return [*engines, *self._gateways.members(), *self._stores.members()]

    async def renew(self, cursor: str) -> News:
        """The run's owner lives; returns the events behind the cursor of the last answer that it has."""
        await self.start()
        self._lease.renew()
        await self._collect()
        return self._feed.after(cursor)

    async def stop(self) -> None:
        """Ends every actor of the run but this one, engines first."""
        self._ending = True
        self._gateways.end()
        engines = [e.member for e in self._engines.by_id.values() if e.member is not None]
        for engine in self._engines.by_id.values():
            self._engines.retire(engine.engine_id)
        await asyncio.gather(*(self._stop(m) for m in engines))
        if self._setup.otel is not None:  # what they trace ends with what they answer
            await asyncio.gather(*(self._stop(m) for m in self._gateways.members()))
        await asyncio.gather(*(asyncio.to_thread(member.kill) for member in await self._crew.existing()))
        await self._crew.disband()

    async def _stop(self, member: Member) -> None:
        try:
            await member.ask("stop", timeout_s=5)
        except (Gone, RolloutFTError):
            await asyncio.to_thread(member.kill)

    # -- called by actors -----------------------------------------------------------------------------------------

    async def view(self) -> View:
        """The current view, for a writer that was refused or not answered."""
        await self.start()
        return await self._stores.check()

    async def locate(self, sid: str, failed: tuple[str, int] | None) -> JSON:
        await self.start()
        return await self._sessions.locate(sid, failed)

    async def suspect(self, engine_id: str, incarnation: int, reason: str) -> bool:
        await self.start()
        return await self._engines.suspect(engine_id, incarnation, reason)

    async def engine_observed(self, engine_id: str, incarnation: int, report: JSON) -> None:
        """What changed at an engine that somebody else owns."""
        await self.start()
        engine = self._engines.by_id.get(engine_id)
        if engine is not None and engine.health.incarnation == incarnation and self._engines.owners is not None:
            self._engines.owners.observed(engine, report)

    async def may_lose(self, engine_id: str, incarnation: int, reason: str) -> bool:
        await self.start()
        return self._engines.may_lose(engine_id, incarnation, reason)

    async def engine_doubted(self, engine_id: str, incarnation: int, reason: str) -> None:
        await self.start()
        self._engines.doubted(engine_id, incarnation, reason)

    async def engine_lost(self, engine_id: str, incarnation: int, reason: str, readings: Readings, events: list[JSON]) -> None:
        await self.start()
        self._totals.take(engine_id, incarnation, readings)
        self._told(events)
        self._engines.lost(engine_id, incarnation, reason)

    # -- called by the gateways' routes ---------------------------------------------------------------------------

    async def open_session(self, spec: SessionSpec, resume: bool) -> JSON:
        await self.start()
        return await self._sessions.open(spec, resume)

    async def restart_trial(self, trial_id: str, from_attempt: int, resume: bool, why: Why) -> JSON:
        await self.start()
        return await self._sessions.restart(trial_id, from_attempt, resume, why)

    async def end_trial(self, trial_id: str, attempt: int | None, outcome: Outcome, reward: float | None, cause: str) -> JSON:
        await self.start()
        return await self._sessions.end(trial_id, attempt, outcome, reward, cause)

    async def release_trial(self, trial_id: str) -> JSON:
        await self.start()
        return await self._sessions.release(trial_id)

    async def trial(self, trial_id: str) -> JSON:
        await self.start()
        return await self._sessions.read(trial_id)

    async def trials(self, query: Query) -> JSON:
        """`{trials, total, next}`."""
        await self.start()
        return await self._looks.trials(query)

    async def overview(self, query: Query, since: str, events: int, turns: int) -> bytes:
        """What a person wants to see at once, as JSON."""
        fleet = await self.fleet()  # first: before the run is started, or rebuilt, there is nothing to look with
        return await self._looks.overview(fleet, query, since, events, turns)

    async def events(self, since: str, limit: int) -> JSON:
        await self.start()
        return self._looks.events(since, limit)

    async def timeline(self, trial_id: str) -> JSON:
        await self.start()
        return await self._looks.timeline(trial_id)

    async def command(self, command: Command) -> JSON:
        """What a trainer asks of all engines."""
        await self.start()
        done = await self._engines.commands.carry_out(command)
        if self._engines.owners is not None:
            self._engines.owners.told(command)
        return done

    async def resize_fleet(self, count: int) -> JSON:
        """So many engines that we start; those that are too many end when their turns have."""
        await self.start()
        if self._workers is not None:
            raise BadRequest("the engines are somebody else's: name them (urls), or end one (POST /fleet/drain)", param="count")
        return self._engines.resize(count, self._setup.config.fleet.drain_timeout_s)

    async def attach_engines(self, urls: list[str]) -> JSON:
        """Engines of somebody else that are there as well, or again."""
        await self.start()
        if self._workers is None:
            raise BadRequest("the engines are started by us: say how many (count); engine.attach is for those of others", param="urls")
        for url in urls:
            self._came(base(url))
        return {"engines": [e.describe() for e in self._engines.by_id.values()]}

    async def drain_engine(self, engine_id: str) -> JSON:
        """The engine takes no session any more, and ends when its turns have."""
        await self.start()
        engine = self._engines.by_id.get(engine_id)
        if engine is None:
            raise BadRequest(f"engine {engine_id} is not known: GET /fleet lists them", 404, "unknown_engine", "engine_id")
        self._spawn(self._engines.leave(engine_id, "drained", self._setup.config.fleet.drain_timeout_s))
        await asyncio.sleep(0)
        return engine.describe()

    async def read_session(self, sid: str, what: str) -> bytes:
        await self.start()
        return await self._sessions.read_session(sid, what)

    async def fleet(self) -> JSON:
        await self.start()
        self._told(self._events.take())
        held, view = self._sessions.held(), self._stores.view
        engines = [e.describe() | {"sessions": held[e.engine_id]} for e in self._engines.by_id.values()]
        return {
            "run": self._setup.config.run, "serves": any(e.health.serves for e in self._engines.by_id.values()),
            "engines": engines, "view": {"number": view.number, "members": list(view.members), "min_replicas": view.min_replicas},
            "weights": self._engines.commands.weights.describe(wall()),
            "warnings": [*([self._stores.warning] if self._stores.warning else []), *self._engines.commands.warnings()],
            "nodes": {self._crew.name("supervisor", 1): node_id(), **{m.name: self._crew.node_of(m) for m in self._crew_members()}},
            "gateways": [m.name for m in self._gateways.members()], "sessions": held.total(),
            "metrics": self._totals.flat() if self._publisher is not None else {},
        }  # fmt: skip

    async def pids(self) -> dict[str, int]:
        """The process of every actor, for measuring and for fault plans."""
        await self.start()
        described = {m.name: await self._describe(m) for m in self._crew_members()}
        return {name: d["pid"] for name, d in described.items() if d} | {"supervisor": os.getpid()}

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def __repr__(self) -> str:
        return shown_as(self._crew.name("supervisor", 1))


def _remembered(described: JSON) -> list[tuple[str, int]]:
    """Who an actor knows of: Ray forgets the name of an actor that is dead, and a number that came again would be believed.

    Gateways remember the engines that they were sent to, engines and stores the members of their view.
    """
    view = described.get("view")
    names = view.members if isinstance(view, View) else described.get("members", ())
    members = [(name.split("/")[1], int(name.split("/")[2])) for name in names]
    return [*members, *described.get("incarnations", {}).items()]


def _failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
