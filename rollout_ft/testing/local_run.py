"""A whole run in one process and without Ray: a gateway, the owners of sessions, stores, the rules of the fleet.

Owns what stands in for Ray: members that are called directly, a crew that makes them here. Everything that is decided and
everything that a turn passes through is the product's own code, and engines are processes of their own, which may be
killed and stopped. For loads of hundreds of trials on dozens of engines, for which actors would be too many processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_ft.checkpoint.log import Head
from rollout_ft.checkpoint.mirror import Mirror
from rollout_ft.checkpoint.store import Store
from rollout_ft.checkpoint.view import View
from rollout_ft.clock import wall
from rollout_ft.config import Config, FleetConfig, TrialConfig
from rollout_ft.errors import BadRequest
from rollout_ft.faultpoints import Inert
from rollout_ft.fleet.crew import Crew, Setup
from rollout_ft.fleet.engines import Engines
from rollout_ft.fleet.listing import Query
from rollout_ft.fleet.looks import Looks, memory
from rollout_ft.fleet.member import Gone, Member
from rollout_ft.fleet.pulse import Pulse
from rollout_ft.fleet.register import Register
from rollout_ft.fleet.sessions import Sessions
from rollout_ft.fleet.stores import Stores
from rollout_ft.fleet.weights import Command
from rollout_ft.gateway.asgi import Server
from rollout_ft.gateway.gateway import Gateway
from rollout_ft.gateway.keys import Keys
from rollout_ft.gateway.owners import Owners
from rollout_ft.line import token_of
from rollout_ft.session.drift import load_renderer
from rollout_ft.telemetry.events import Events
from rollout_ft.telemetry.metrics import Counts
from rollout_ft.telemetry.totals import Totals
from rollout_ft.testing.local_engine import LocalEngine, Means
from rollout_ft.trial.agents import InlineAgent
from rollout_ft.trial.client import Client
from rollout_ft.trial.runner import OnGroup, OnResult, TrialResult, TrialRunner
from rollout_ft.types import JSON, Outcome, SessionSpec, Why

ENDS_S = 10.0


@dataclass(frozen=True, slots=True)
class LocalMember(Member):
    """One that is called directly."""

    async def ask(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        engine: LocalEngine = self.handle
        if engine.dead.is_set():
            raise Gone(f"{self.name}: dead", dead=True)
        try:
            async with asyncio.timeout(timeout_s):
                return await getattr(engine, method)(*args)
        except TimeoutError as e:
            raise Gone(f"{self.name}: silent") from e

    async def death(self) -> str:
        await self.handle.dead.wait()
        return "ended"


class LocalCrew(Crew):
    def __init__(self, setup: Setup, means: Means):
        super().__init__(setup)
        self._means = means
        self.engines: dict[str, LocalEngine] = {}
        self._ending: set[asyncio.Task[None]] = set()

    async def engine(self, engine_id: str, incarnation: int, view: View, target: str = "") -> Member:
        engine = self.engines[engine_id] = LocalEngine(self._means, engine_id, incarnation)
        return LocalMember(engine_id, incarnation, self.name(engine_id, incarnation), engine)

    def gone(self, member: Member, *, silent: bool = False) -> None:
        task = asyncio.create_task(member.handle.aclose())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def aclose(self) -> None:
        await asyncio.gather(*(engine.aclose() for engine in self.engines.values()), *self._ending)


class LocalStores(Stores):
    """Replicas in this process, which never end."""

    def __init__(self, stores: dict[str, Store], view: View):
        self._all, self.view = stores, view

    async def lookup(self, trial_id: str) -> Head | None:
        return await next(iter(self._all.values())).lookup(trial_id)

    def port(self) -> Store:
        return next(iter(self._all.values()))

    async def check(self) -> View:
        return self.view

    async def release(self, trial_id: str, note: bytes) -> None:
        for store in self._all.values():
            await store.release(trial_id, note)

    async def note(self, trial_id: str) -> bytes | None:
        return await next(iter(self._all.values())).note(trial_id)


class HeardEvents(Events):
    """Told to who listens as they happen: here nobody collects them."""

    def __init__(self, source: str):
        super().__init__(source)
        self.listener: Callable[[JSON], None] = lambda event: None

    def emit(self, name: str, **fields: Any) -> None:
        super().emit(name, **fields)
        self.listener(self._buffer[-1])


class LocalSupervisor:
    """What the gateway asks."""

    def __init__(self, config: FleetConfig, engines: Engines, stores: LocalStores, events: Events):
        self.config, self.engines, self.stores = config, engines, stores
        self.sessions, self.totals = Sessions(engines, stores, events), Totals()
        self.recent, self.recoveries = memory()
        self.looks = Looks(engines, stores, self.sessions, self.recent, self.recoveries)

    async def locate(self, sid: str, failed: tuple[str, int] | None) -> JSON:
        return await self.sessions.locate(sid, failed)

    async def suspect(self, engine_id: str, incarnation: int, reason: str) -> bool:
        return await self.engines.suspect(engine_id, incarnation, reason)

    async def open_session(self, spec: SessionSpec, resume: bool) -> JSON:
        return await self.sessions.open(spec, resume)

    async def restart_trial(self, trial_id: str, from_attempt: int, resume: bool, why: Why) -> JSON:
        return await self.sessions.restart(trial_id, from_attempt, resume, why)

    async def end_trial(self, trial_id: str, attempt: int | None, outcome: Outcome, reward: float | None, cause: str) -> JSON:
        return await self.sessions.end(trial_id, attempt, outcome, reward, cause)

    async def release_trial(self, trial_id: str) -> JSON:
        return await self.sessions.release(trial_id)

    async def trial(self, trial_id: str) -> JSON:
        return await self.sessions.read(trial_id)

    async def trials(self, query: Query) -> JSON:
        return await self.looks.trials(query)

    async def overview(self, query: Query, since: str, events: int, turns: int) -> bytes:
        return await self.looks.overview(await self.fleet(), query, since, events, turns)

    async def events(self, since: str, limit: int) -> JSON:
        return self.looks.events(since, limit)

    async def timeline(self, trial_id: str) -> JSON:
        return await self.looks.timeline(trial_id)

    def heard(self, event: JSON) -> None:
        self.totals.saw(event)
        self.recent.add([event])
        self.recoveries.add([event])

    async def fleet(self) -> JSON:
        held, view = self.sessions.held(), self.stores.view
        engines = [e.describe() | {"sessions": held[e.engine_id]} for e in self.engines.by_id.values()]
        return {
            "run": "local", "serves": any(e.health.serves for e in self.engines.by_id.values()), "engines": engines,
            "view": {"number": view.number, "members": list(view.members), "min_replicas": view.min_replicas},
            "weights": self.engines.commands.weights.describe(wall()), "warnings": self.engines.commands.warnings(),
            "nodes": {}, "gateways": [], "sessions": held.total(), "metrics": self.totals.flat(),
        }  # fmt: skip

    async def command(self, command: Command) -> JSON:
        return await self.engines.commands.carry_out(command)

    async def resize_fleet(self, count: int) -> JSON:
        return self.engines.resize(count, self.config.drain_timeout_s)

    async def attach_engines(self, urls: list[str]) -> JSON:
        raise BadRequest("the engines are started by us: say how many (count)", param="urls")

    async def drain_engine(self, engine_id: str) -> JSON:
        await self.engines.leave(engine_id, "drained", self.config.drain_timeout_s)
        return {"engine_id": engine_id}

    async def read_session(self, sid: str, what: str) -> bytes:
        return await self.sessions.read_session(sid, what)


@dataclass(slots=True)
class LocalRun:
    config: Config
    url: str
    gateways: list[Server]
    client: Client
    keys: Keys
    crew: LocalCrew
    engines: Engines
    events: Events
    counts: Counts
    """Of everything here, also of what is lost meanwhile."""
    store: Store
    register: Register

    async def run_trials(
        self, tasks: Sequence[JSON], agent: Callable[..., Any], *, prefix: str, config: TrialConfig, on_result: OnResult,
        on_group: OnGroup | None = None,
    ) -> list[TrialResult]:  # fmt: skip
        """As `Run.run_trials`; the run forgets each trial when `on_result` has returned."""
        runner = TrialRunner(self.client, InlineAgent(agent), config, self.keys.session)
        slots = config.concurrency
        return await runner.run(tasks, concurrency=slots, prefix=prefix, on_result=on_result, release=True, on_group=on_group)

    async def whole(self) -> None:
        """Returns when every engine serves."""
        while not all(e.health.serves for e in self.engines.by_id.values()):
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def local_run(config: Config, gateways: int = 1) -> AsyncGenerator[LocalRun]:
    """A run that is up, with so many gateways on its port; nothing of it is left afterwards."""
    keys, events, counts = Keys(secrets.token_hex(16)), HeardEvents("run"), Counts()
    token = token_of(keys.internal)
    view = View(1, tuple(f"store-{i}" for i in range(config.store.replicas)), config.store.min_replicas)
    stores = {name: Store(name, view) for name in view.members}

    async def current() -> View:
        return view

    def mirror() -> Mirror:
        timeouts = config.store
        return Mirror(
            view, stores.__getitem__, current, commit_timeout_s=timeouts.commit_timeout_s, call_timeout_s=timeouts.call_timeout_s
        )  # fmt: skip

    def lost(engine_id: str, incarnation: int, reason: str) -> None:
        engines.lost(engine_id, incarnation, reason)

    with tempfile.TemporaryDirectory(prefix="rft-local-") as directory:
        means = Means(config, load_renderer(config), events, token, Path(directory), mirror, lost, counts)
        crew = LocalCrew(Setup(config, "local", "", loopback=True), means)
        engines = Engines(crew, Pulse(config.fleet.ping_s), events, lambda: view)
        supervisor = LocalSupervisor(config.fleet, engines, LocalStores(stores, view), events)
        supervisor.totals.counts, events.listener = counts, supervisor.heard
        sock = socket.create_server(("127.0.0.1", config.gateway.port), backlog=4096, reuse_port=True)
        port = sock.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        client = Client(url, keys.operator)
        socks = [sock, *(socket.create_server(("127.0.0.1", port), backlog=4096, reuse_port=True) for _ in range(gateways - 1))]
        owners = [Owners(supervisor, token, config.gateway.ping_s) for _ in socks]
        servers = [
            Server(Gateway(config.gateway, keys, supervisor, mine, url, Inert(), config.model, counts).handle, bound, config.gateway)
            for mine, bound in zip(owners, socks, strict=True)
        ]
        try:
            await engines.start([], {})
            for server in servers:
                await server.ready()
            store, register = next(iter(stores.values())), supervisor.sessions.register
            yield LocalRun(config, url, servers, client, keys, crew, engines, events, counts, store, register)
        finally:
            for engine in engines.by_id.values():
                engines.retire(engine.engine_id)
            await client.aclose()
            for mine, server in zip(owners, servers, strict=True):
                await mine.aclose()
                await server.aclose()
            async with asyncio.timeout(ENDS_S):
                await crew.aclose()
