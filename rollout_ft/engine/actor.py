"""The Ray actor around one engine: its process, its sessions, its port for the gateways.

Owns the order of start and end. Everything that is decided is decided in the host and below; this is where the parts
meet. The actor never outlives its engine's death for long: it saves what was sampled, says so, and is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from rollout_ft import line
from rollout_ft.checkpoint.mirror import Mirror
from rollout_ft.checkpoint.ports import resolve
from rollout_ft.checkpoint.view import View
from rollout_ft.engine import installed, launched
from rollout_ft.engine.attached import Attached, Report
from rollout_ft.engine.control import HTTPControl, Never
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.experts import shape_of
from rollout_ft.engine.host import SessionHost
from rollout_ft.engine.http import OwnerHTTP, dump
from rollout_ft.engine.launch import environment
from rollout_ft.engine.launched import Launched
from rollout_ft.engine.overseer import Overseer
from rollout_ft.engine.parsers import make_parser, start_sglang
from rollout_ft.engine.ranks import Ranked
from rollout_ft.engine.sglang import SGLang
from rollout_ft.engine.unit import Unit
from rollout_ft.engine.weights import EngineWeights
from rollout_ft.errors import EngineLost, RolloutFTError, SessionClosed
from rollout_ft.fleet.crew import Setup, actor_name, shown_as
from rollout_ft.fleet.lease import Lease, live
from rollout_ft.fleet.node import assigned_gpus, node_id, node_ip, settle
from rollout_ft.fleet.remote import RemoteSupervisor
from rollout_ft.fleet.weights import Command, Weights
from rollout_ft.gateway.keys import Keys
from rollout_ft.line import token_of
from rollout_ft.rayapi import ray
from rollout_ft.samples.summary import summary
from rollout_ft.session.drift import load_renderer
from rollout_ft.session.render import ChatTemplate
from rollout_ft.telemetry.events import Events
from rollout_ft.telemetry.losses import Loss
from rollout_ft.telemetry.metrics import Readings, counting
from rollout_ft.telemetry.moments import Moment
from rollout_ft.telemetry.moments_made import of_entries
from rollout_ft.telemetry.tracing import LAST_FLUSH_S, LOST_FLUSH_S, tracing_of
from rollout_ft.testing.faults import fault_points
from rollout_ft.types import JSON, Ended, SessionSpec, Why


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, max_concurrency=1000, concurrency_groups={"health": 4, "watch": 16})
class EngineActor:
    def __init__(self, setup: Setup, engine_id: str, incarnation: int, view: View, target: str = ""):
        """`target`: the URL of an engine that somebody else owns; without one the engine is started here."""
        self._setup, self._config = setup, setup.config
        self._engine_id, self._incarnation = engine_id, incarnation
        self._name = actor_name(setup.config.run, engine_id, incarnation)
        self._view, self._target = view, target
        self._lease = Lease(setup.config.orphan_s)
        self._started: asyncio.Task[JSON] | None = None
        self._events = Events(self._name)
        self._readings: Callable[[], Readings] = Readings

    async def start(self) -> JSON:
        """Starts the engine and serves; returns where. Raises EngineLost with the reason when it does not come up.

        Idempotent: an answer that was lost on the way is asked for again.
        """
        if self._started is None:
            self._started = asyncio.create_task(self._start())
        return await asyncio.shield(self._started)

    async def _start(self) -> JSON:
        self._lease.allow(self._config.engine.start_timeout_s)
        asyncio.create_task(live(self._lease))  # noqa: RUF006 - lives as long as the process
        config = self._config
        self._supervisor = RemoteSupervisor(config.run, self._setup.namespace)
        renderer = asyncio.create_task(asyncio.to_thread(load_renderer, config))
        sglang = asyncio.create_task(start_sglang(config, environment(config)))
        self._unit = await self._start_unit(renderer)
        self._engine = SGLang(self._engine_id, self._unit.url)
        self._control = HTTPControl(self._engine_id, self._unit.url) if self._unit.ours else Never()
        self._mirror = Mirror(
            self._view, lambda name: resolve(name, self._setup.namespace), self._supervisor.view,
            commit_timeout_s=config.store.commit_timeout_s, call_timeout_s=config.store.call_timeout_s,
            payload_copies=config.store.payload_copies,
        )  # fmt: skip
        faults = fault_points(self._setup, self._unit)
        self._driver = Driver(self._engine, config.engine, self._events, counts=counting(config.telemetry.metrics))
        self._driver.tracing = tracing_of(self._setup, self._name)
        self._readings = self._driver.readings
        self._driver.ranks = await self._engine.ranks()
        self._driver.overseer = Overseer(self._supervisor, self._engine_id, self._incarnation)
        parser = await make_parser(config, self._engine_id, self._engine, await sglang)
        self._host = SessionHost(
            self._engine_id, config, await renderer, self._driver, parser, self._mirror, self._lose_engine, self._events, faults,
            shape_of(config),
        )  # fmt: skip
        ip = node_ip(self._setup.loopback)
        sock = socket.create_server((ip, 0), backlog=4096)
        owner = OwnerHTTP(self._host, config, await renderer)
        self._url = f"{ip}:{sock.getsockname()[1]}"
        self._line = await line.serve(owner.answer, sock, token_of(Keys(self._setup.secret).internal), cancels=True)
        self._weights = EngineWeights(self._engine, self._control, self._driver.gate, partial(self._events.emit, engine=self._engine_id))
        await self._weights.start()
        self._host.fleet = lambda: self._weights.fleet
        capacity = await self._engine.capacity()
        if capacity:
            self._driver.admission.limit.start(capacity)
        if isinstance(self._unit, Attached):
            await self._watch_owner(self._unit)
        asyncio.create_task(self._watch_unit())  # noqa: RUF006 - lives as long as the process
        if self._unit.ours:
            asyncio.create_task(self._watch_idle())  # noqa: RUF006 - lives as long as the process
        settle()
        self._lease.renew()
        return await self.describe()

    async def _start_unit(self, renderer: asyncio.Task[ChatTemplate]) -> Unit:
        config, engine_id = self._config, self._engine_id
        if self._target:
            return await Attached.start(config, engine_id, self._target, (await renderer).template.encode)
        if self._incarnation == 1:  # what was started once is known
            unasked = await installed.check(config, here=True)
            if unasked:
                self._events.emit("engine.unchecked", engine=engine_id, reason=unasked)

        async def begin() -> Launched | Ranked:
            if config.engine.nodes > 1:
                return await Ranked.begin(config, engine_id, self._name, self._setup.loopback)
            return await Launched.begin(config, engine_id, self._name, assigned_gpus())

        return await launched.start(begin, engine_id, config.engine.start_timeout_s)

    async def _watch_owner(self, unit: Attached) -> None:
        """What the engine's owner does to it is told to the supervisor, in order."""
        for warning in unit.warnings:
            self._events.emit("engine.warning", engine=self._engine_id, url=unit.url, warning=warning)
        reports: asyncio.Queue[Report] = asyncio.Queue()
        await unit.watch(self._driver, reports.put_nowait)
        asyncio.create_task(self._tell(reports))  # noqa: RUF006 - lives as long as the process

    async def _tell(self, reports: asyncio.Queue[Report]) -> None:
        while True:
            report = await reports.get()
            self._events.emit(
                "engine.opened" if report.open else "engine.closed", engine=self._engine_id, incarnation=self._incarnation,
                why=report.why, held=report.held, weight_version=report.version,
            )  # fmt: skip
            with contextlib.suppress(RolloutFTError):  # a supervisor that is new asks
                await self._supervisor.engine_observed(self._engine_id, self._incarnation, asdict(report))

    # -- an engine of somebody else: called by the supervisor -----------------------------------------------------

    async def owner_suspected(self, by: str) -> None:
        """An owner's abort was seen at the engine `by`."""
        self._theirs().suspected(by)

    async def owner_cleared(self, why: str) -> None:
        self._theirs().cleared(why)

    async def owner_told(self) -> None:
        """Somebody who knows says that its owner has opened it."""
        self._theirs().told()

    def _theirs(self) -> Attached:
        if not isinstance(self._unit, Attached):
            raise EngineLost(self._engine_id, "nobody else owns it")
        return self._unit

    async def _watch_unit(self) -> None:
        reason = await self._unit.wait()
        await self._host.engine_lost(reason)

    async def _watch_idle(self) -> None:
        await self._host.engine_lost(await self._driver.probe_idle())

    async def _lose_engine(self, reason: str) -> None:
        self._unit.kill()
        self._events.emit("engine.lost", engine=self._engine_id, incarnation=self._incarnation, reason=reason)
        await self._driver.tracing.flush(LOST_FLUSH_S)  # who is told next ends this process
        await self._supervisor.engine_lost(self._engine_id, self._incarnation, reason, self._readings(), self._events.unheard(0))

    # -- sessions: called by the supervisor -----------------------------------------------------------------------

    async def let_go(self) -> None:
        """Others serve and this engine does not: its sessions go there, as soon as somebody asks for them."""
        await self._host.let_go_of_all()

    async def carry_out(self, order: Command, fleet: Weights, timeout_s: float) -> JSON:
        """What a trainer asks of the engine."""
        return await self._weights.carry_out(order, fleet, timeout_s)

    async def open(self, trial_id: str, attempt: int, epoch: int, spec: SessionSpec | None, resume: bool, why: Why) -> JSON:
        return summary(await self._host.open(trial_id, attempt, epoch, spec, resume, why))

    async def adopt(self, sid: str, epoch: int, loss: Loss) -> JSON:
        session = await self._host.adopt(sid, epoch, loss)
        self._events.emit("session.adopted", session=sid, epoch=epoch, turns=len(session.tree.nodes), engine=self._engine_id)
        return summary(session)

    async def retire(self, sid: str) -> None:
        await self._host.retire(sid)

    async def drain(self, timeout_s: float) -> None:
        """Lets go of every session, of one with turns in flight when they have ended, or after `timeout_s`."""
        await self._host.drain(timeout_s)

    async def release(self) -> None:
        """Lets go of every session that has nothing at the engine just now: it goes on where it is asked for next."""
        await self._host.release()

    async def end(self, sid: str, ended: Ended) -> JSON:
        return summary(await self._host.end(sid, ended))

    async def holds(self, sid: str) -> bool:
        return sid in self._host.sessions()

    async def in_flight(self, limit: int) -> JSON:
        return self._host.in_flight(limit)

    async def summary(self, sid: str) -> JSON:
        return self._host.summary(sid)

    async def read(self, trial_id: str) -> JSON | None:
        """The summary of any trial, from the store."""
        session = await self._host.read(trial_id)
        return summary(session) if session is not None else None

    async def moments(self, trial_id: str) -> list[Moment]:
        """What a trial's checkpoint has of it."""
        return of_entries(await self._host.entries(trial_id))

    async def read_session(self, trial_id: str, what: str) -> bytes:
        """A trial's trajectory or records as JSON, from the store."""
        session = await self._host.read(trial_id)
        if session is None:
            raise SessionClosed(f"trial {trial_id} is not known")
        assemble = await self._host.assembly(session, what)
        return await asyncio.to_thread(lambda: dump(assemble()))

    # -- the actor ------------------------------------------------------------------------------------------------

    async def set_view(self, view: View) -> None:
        self._view = view
        self._mirror.set_view(view)

    async def describe(self) -> JSON:
        return {
            "engine_id": self._engine_id, "incarnation": self._incarnation, "url": self._url, "pid": os.getpid(),
            "engine_url": self._unit.url, "engine_pid": self._unit.pid(), "weights": self._weights.describe(), "view": self._view,
            "sessions": self._host.sessions(), "node": node_ip(self._setup.loopback), "node_id": node_id(),
            "target": self._target, "attached": self._unit.describe() if isinstance(self._unit, Attached) else None,
        }  # fmt: skip

    async def renew(self, heard: int) -> tuple[list[JSON], Readings]:
        """The run lives; hands over the events after number `heard`, and all that was counted."""
        self._lease.renew()
        return self._events.unheard(heard), self._readings()

    async def stop(self) -> None:
        """Ends the engine and then this process."""
        await self._unit.aclose()
        await self._driver.tracing.flush(LAST_FLUSH_S)
        ray.actor.exit_actor()

    @ray.method(concurrency_group="health")
    async def ping(self) -> int:
        return self._incarnation

    @ray.method(concurrency_group="watch")
    async def forever(self) -> None:
        """Never returns: its failure is the news of this actor's death."""
        await asyncio.Event().wait()

    def __repr__(self) -> str:
        return shown_as(self._name)
