"""What an engine's actor is, without Ray: the engine's process, its driver, its sessions and its port for the gateways.

Owns the order of start and end of one incarnation in this process. Its methods are those that the supervisor's parts call
on the actor; what they call is the actor's own code. Only Ray is left out: no calls between processes, and its end is ours.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rollout_ft import line
from rollout_ft.checkpoint.mirror import Mirror
from rollout_ft.checkpoint.view import View
from rollout_ft.config import Config
from rollout_ft.engine import launched, ports
from rollout_ft.engine.control import HTTPControl
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.host import SessionHost
from rollout_ft.engine.http import OwnerHTTP, dump
from rollout_ft.engine.launch import command, environment
from rollout_ft.engine.launched import Launched
from rollout_ft.engine.parsers import make_parser
from rollout_ft.engine.process import EngineProcess
from rollout_ft.engine.sglang import SGLang
from rollout_ft.engine.weights import EngineWeights
from rollout_ft.errors import SessionClosed
from rollout_ft.faultpoints import Inert
from rollout_ft.fleet.weights import Command, Weights
from rollout_ft.samples.summary import summary
from rollout_ft.session.render import Renderer
from rollout_ft.telemetry.events import Events
from rollout_ft.telemetry.losses import Loss
from rollout_ft.telemetry.metrics import Counts
from rollout_ft.telemetry.moments import Moment
from rollout_ft.telemetry.moments_made import of_entries
from rollout_ft.types import JSON, Ended, SessionSpec, Why


@dataclass(frozen=True, slots=True)
class Means:
    """What all engines of a run share: `mirror` makes one of the stores, `lost` tells the supervisor, `counts` is that of all."""

    config: Config
    renderer: Renderer
    events: Events
    token: bytes
    directory: Path
    mirror: Callable[[], Mirror]
    lost: Callable[[str, int, str], None]
    counts: Counts


class LocalEngine:
    def __init__(self, means: Means, engine_id: str, incarnation: int):
        self._means, self.engine_id, self.incarnation = means, engine_id, incarnation
        self.dead = asyncio.Event()
        self._closing: list[Callable[[], Awaitable[None]]] = []
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> JSON:
        m, config = self._means, self._means.config
        self.unit = await launched.start(self._begin, self.engine_id, config.engine.start_timeout_s)
        self._closing.append(self.unit.aclose)
        engine = SGLang(self.engine_id, self.unit.url)
        self._closing.append(engine.aclose)
        self.driver, mirror = Driver(engine, config.engine, m.events, counts=m.counts), m.mirror()
        capacity = await engine.capacity()
        if capacity:
            self.driver.admission.limit.start(capacity)
        parser = await make_parser(config, self.engine_id, engine, None)
        self.host = SessionHost(self.engine_id, config, m.renderer, self.driver, parser, mirror, self._lose, m.events, Inert())
        self._closing += [self.host.aclose, mirror.aclose]
        sock = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self._url = f"127.0.0.1:{sock.getsockname()[1]}"
        self._line = await line.serve(OwnerHTTP(self.host, config, m.renderer).answer, sock, m.token, cancels=True)
        control = HTTPControl(self.engine_id, self.unit.url)
        self._closing.append(control.aclose)
        self._weights = EngineWeights(engine, control, self.driver.gate, partial(m.events.emit, engine=self.engine_id))
        await self._weights.start()
        self.host.fleet = lambda: self._weights.fleet
        self._watching = asyncio.create_task(self._watch())
        return await self.describe()

    async def _begin(self) -> Launched:
        """Its output goes to a file of the run's, for there is no Ray that has a place for it."""
        config, claimed, log = self._means.config, ports.claim(random.Random()), self._means.directory / f"{self.engine_id}.log"
        process = await EngineProcess.start(command(config, self.engine_id, claimed), environment(config), str(log))
        return Launched(self.engine_id, process, claimed, log, config.engine.log_bytes)

    async def _watch(self) -> None:
        await self.host.engine_lost(await self.unit.wait())

    async def _lose(self, reason: str) -> None:
        self.unit.kill()
        self._means.lost(self.engine_id, self.incarnation, reason)

    async def aclose(self) -> None:
        """Nothing of it is left."""
        if self.dead.is_set():
            return
        self.dead.set()
        if self._watching is not None:
            self._watching.cancel()
            self._line.close()
        for close in reversed(self._closing):
            await close()

    # -- called by the supervisor's parts -------------------------------------------------------------------------

    async def open(self, trial_id: str, attempt: int, epoch: int, spec: SessionSpec | None, resume: bool, why: Why) -> JSON:
        return summary(await self.host.open(trial_id, attempt, epoch, spec, resume, why))

    async def adopt(self, sid: str, epoch: int, loss: Loss) -> JSON:
        return summary(await self.host.adopt(sid, epoch, loss))

    async def retire(self, sid: str) -> None:
        await self.host.retire(sid)

    async def end(self, sid: str, ended: Ended) -> JSON:
        return summary(await self.host.end(sid, ended))

    async def holds(self, sid: str) -> bool:
        return sid in self.host.sessions()

    async def in_flight(self, limit: int) -> JSON:
        return self.host.in_flight(limit)

    async def summary(self, sid: str) -> JSON:
        return self.host.summary(sid)

    async def read(self, trial_id: str) -> JSON | None:
        session = await self.host.read(trial_id)
        return summary(session) if session is not None else None

    async def moments(self, trial_id: str) -> list[Moment]:
        """What a trial's checkpoint has of it."""
        return of_entries(await self.host.entries(trial_id))

    async def read_session(self, trial_id: str, what: str) -> bytes:
        session = await self.host.read(trial_id)
        if session is None:
            raise SessionClosed(f"trial {trial_id} is not known")
        return dump((await self.host.assembly(session, what))())

    async def let_go(self) -> None:
        await self.host.let_go_of_all()

    async def carry_out(self, command: Command, fleet: Weights, timeout_s: float) -> JSON:
        return await self._weights.carry_out(command, fleet, timeout_s)

    async def set_view(self, view: View) -> None:
        """It never changes here."""

    async def ping(self) -> int:
        return self.incarnation

    async def describe(self) -> JSON:
        return {
            "engine_id": self.engine_id, "incarnation": self.incarnation, "url": self._url, "node": "127.0.0.1", "node_id": "",
            "engine_pid": self.unit.pid(), "weights": self._weights.describe(), "sessions": self.host.sessions(),
        }  # fmt: skip
