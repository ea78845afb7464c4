"""A real gateway in front of a real owner, host and store rules, in one process and without Ray.

Owns the stage for hostile clients and for the API's document: only the engine and the supervisor are played. Run as a
program it prints its URL and keys in one JSON line and serves until its standard input is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from rollout_ft.checkpoint.mirror import Mirror
from rollout_ft.checkpoint.store import Store
from rollout_ft.checkpoint.view import View
from rollout_ft.clock import wall
from rollout_ft.config import Config
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.host import SessionHost
from rollout_ft.engine.http import OwnerHTTP
from rollout_ft.engine.parsers import Own, TextParser
from rollout_ft.engine.port import Chunk, EngineInfo
from rollout_ft.errors import BadRequest, SessionClosed
from rollout_ft.faultpoints import Inert
from rollout_ft.fleet.listing import Around, Query, Rank, Row, counts, select
from rollout_ft.fleet.weights import Command
from rollout_ft.gateway.asgi import Server
from rollout_ft.gateway.gateway import Gateway
from rollout_ft.gateway.keys import Keys
from rollout_ft.gateway.owners import Owners
from rollout_ft.line import serve, token_of
from rollout_ft.samples.summary import summary
from rollout_ft.samples.trajectory import records, trajectory
from rollout_ft.telemetry.events import Events
from rollout_ft.telemetry.recent import Recent
from rollout_ft.telemetry.tracing import OFF, Tracing
from rollout_ft.testing.plain import STOP, PlainTemplate
from rollout_ft.types import JSON, UNSAID, Ended, Outcome, SessionSpec, VersionSpan, Why, session_id, split_session_id

KEYS = Keys("a secret")


@dataclass
class Engine:
    """Says something short that depends on the prompt; waits for `go` before that."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    calls: int = 0
    aborted: list[str] = field(default_factory=list[str])
    answer_bytes: int = 0

    async def generate(self, rid: str, input_json: bytes, sampling: JSON, routed_from: int | None = None) -> AsyncIterator[Chunk]:
        self.calls += 1
        await self.go.wait()
        said = hashlib.sha256(input_json).hexdigest()[:6].encode() + b"." * self.answer_bytes
        ids = [*said, STOP][: sampling["max_new_tokens"]]
        yield Chunk(ids, [-1.0] * len(ids), (VersionSpan("v0", 0, len(ids)),), "stop" if ids[-1] == STOP else "length")

    async def abort(self, rid: str) -> None:
        self.aborted.append(rid)

    async def load(self) -> int | None:
        return 0

    async def alive(self) -> bool:
        return True

    async def ready(self) -> bool:
        return True

    async def info(self) -> EngineInfo:
        return EngineInfo("v0", "small")

    async def aclose(self) -> None:
        return None


@dataclass
class Supervisor:
    """Knows the one owner; opens, restarts, ends and reads as the real one does, without moving anything."""

    host: SessionHost
    url: str
    attempts: dict[str, int] = field(default_factory=dict[str, int])
    released: list[str] = field(default_factory=list[str])

    async def locate(self, sid: str, failed: tuple[str, int] | None) -> JSON:
        if sid not in self.host.sessions():
            return {"state": "closed", "message": f"session {sid} is closed"}
        return {"state": "owned", "url": self.url, "engine_id": "e0", "incarnation": 1}

    async def suspect(self, engine_id: str, incarnation: int, reason: str) -> bool:
        return False

    async def open_session(self, spec: SessionSpec, resume: bool) -> JSON:
        attempt = self.attempts.get(spec.trial_id)
        if attempt is None:
            return await self._start(spec.trial_id, 1, spec, False)
        known = await self.trial(spec.trial_id)
        if known["state"] == "ended":
            raise BadRequest(f"trial {spec.trial_id} has ended", 409, "trial_ended")
        if resume:
            return await self._start(spec.trial_id, attempt + 1, None, True)
        if spec.idempotency_key and known["idempotency_key"] == spec.idempotency_key:
            return {k: known[k] for k in ("session_id", "trial_id", "attempt", "turns")}
        raise BadRequest(f"trial {spec.trial_id} exists", 409, "trial_exists", "trial_id")

    async def restart_trial(self, trial_id: str, from_attempt: int, resume: bool, why: Why) -> JSON:
        known = await self.trial(trial_id)
        if known["attempt"] != from_attempt or known["state"] == "ended":
            raise BadRequest(f"trial {trial_id} is at another attempt", 409, "stale_attempt")
        return await self._start(trial_id, from_attempt + 1, None, resume, why)

    async def _start(self, trial_id: str, attempt: int, spec: SessionSpec | None, resume: bool, why: Why = UNSAID) -> JSON:
        await self.host.retire(session_id(trial_id, attempt - 1))
        opened = summary(await self.host.open(trial_id, attempt, 1, spec, resume, why))
        self.attempts[trial_id] = attempt
        return {k: opened[k] for k in ("session_id", "trial_id", "attempt", "turns")}

    async def end_trial(self, trial_id: str, attempt: int | None, outcome: Outcome, reward: float | None, cause: str) -> JSON:
        known = await self.trial(trial_id)
        if attempt is not None and attempt != known["attempt"]:
            raise BadRequest(f"attempt {attempt} was replaced", 409, "stale_attempt")
        if known["state"] == "ended":
            if (known["outcome"], known["reward"]) == (outcome.value, reward):
                return known
            raise BadRequest(f"trial {trial_id} has ended", 409, "trial_ended")
        return summary(await self.host.end(known["session_id"], Ended(outcome, reward, cause, int(wall()))))

    async def release_trial(self, trial_id: str) -> JSON:
        self.released.append(trial_id)
        return {**await self.trial(trial_id), "state": "released"}

    async def trial(self, trial_id: str) -> JSON:
        if trial_id not in self.attempts:
            raise BadRequest(f"trial {trial_id} is not known", 404, "unknown_trial")
        session = await self.host.read(trial_id)
        assert session is not None
        return summary(session)

    async def trials(self, query: Query) -> JSON:
        return self._page(query)

    def _page(self, query: Query) -> JSON:
        around = Around({session_id(t, attempt): "e0" for t, attempt in self.attempts.items()}, {"e0": "healthy"})
        page = select([Row(t, attempt, 1) for t, attempt in self.attempts.items()], query, around)
        told = [{**row.describe(state), **self._needs(around, row, rank)} for row, state, rank in page.rows]
        return {"trials": told, "total": page.total, "next": page.next}

    def _needs(self, around: Around, row: Row, rank: Rank) -> JSON:
        why, remedy = around.words(row, rank)
        return {"engine_id": "e0", "attention": rank.name.lower(), "why": why, "remedy": remedy}

    async def timeline(self, trial_id: str) -> JSON:
        return {"trial": await self.trial(trial_id), "moments": [], "left_out": 0}

    async def events(self, since: str, limit: int) -> JSON:
        return Recent("00000000").since(since, limit)

    async def overview(self, query: Query, since: str, events: int, turns: int) -> bytes:
        flying = self.host.in_flight(turns) | {"silent": []}
        trials = self._page(query) | counts([Row(t, attempt, 1) for t, attempt in self.attempts.items()], Around())
        told = {"now": wall(), "fleet": await self.fleet(), "problems": [], "recoveries": [], "turns": flying, "trials": trials}
        return orjson.dumps(told | {"events": await self.events(since, events), "store_silent": ""})

    async def fleet(self) -> JSON:
        return {"serves": True, "engines": [], "weights": {"version": "v0"}}

    async def resize_fleet(self, count: int) -> JSON:
        return {"engines": []}

    async def attach_engines(self, urls: list[str]) -> JSON:
        raise BadRequest("the engines are started by us", param="urls")

    async def drain_engine(self, engine_id: str) -> JSON:
        raise BadRequest(f"engine {engine_id} is not known: GET /fleet lists them", 404, "unknown_engine", "engine_id")

    async def command(self, command: Command) -> JSON:
        return {"ok": True, "engines": {}, "weights": {}}

    async def read_session(self, sid: str, what: str) -> bytes:
        parts = split_session_id(sid)
        session = await self.host.read(parts[0]) if parts else None
        if session is None:
            raise SessionClosed(f"session {sid} is not known")
        return orjson.dumps((trajectory if what == "trajectory" else records)(session), option=orjson.OPT_SERIALIZE_NUMPY)


@dataclass
class Stack:
    port: int
    host: SessionHost
    engine: Engine
    gateway: Gateway
    supervisor: Supervisor
    store: Store
    server: Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def open(self, trial_id: str, **spec: Any) -> str:
        """A session; its id."""
        return (await self.supervisor.open_session(SessionSpec(trial_id, **spec), False))["session_id"]

    async def state(self) -> dict[str, bytes]:
        """All that the store holds, by trial: what must not change by a request that was refused."""
        entries = {t: await self.store.read(t) for t in await self.store.trials()}
        return {t: hashlib.sha256(repr(e).encode()).digest() for t, e in entries.items()}


def _bound() -> tuple[socket.socket, int]:
    sock = socket.create_server(("127.0.0.1", 0))
    return sock, sock.getsockname()[1]


@contextlib.asynccontextmanager
async def stack(config: Config | None = None, *, tracing: Tracing = OFF, **gateway: Any) -> AsyncIterator[Stack]:
    config = config or Config.model_validate({"gateway": gateway, "session": {"max_output_tokens": 64}})
    view = View(1, ("a",), 1)
    store = Store("a", view)

    async def current() -> View:
        return view

    mirror = Mirror(view, lambda _: store, current, commit_timeout_s=5, call_timeout_s=5)
    engine = Engine()
    engine.go.set()

    async def lose(reason: str) -> None:
        raise AssertionError(reason)

    renderer = PlainTemplate()
    driver, parser = Driver(engine, config.engine), TextParser(config.model, Own(), None)
    driver.tracing = tracing
    host = SessionHost("e0", config, renderer, driver, parser, mirror, lose, Events("test"), Inert())
    inner, inner_port = _bound()
    owner = await serve(OwnerHTTP(host, config, renderer).answer, inner, token_of(KEYS.internal), cancels=True)
    supervisor = Supervisor(host, f"127.0.0.1:{inner_port}")
    owners = Owners(supervisor, token_of(KEYS.internal), 60)
    sock, port = _bound()
    door = Gateway(config.gateway, KEYS, supervisor, owners, f"http://127.0.0.1:{port}", Inert(), config.model, tracing=tracing)
    server = Server(door.handle, sock, config.gateway)
    await server.ready()
    try:
        yield Stack(port, host, engine, door, supervisor, store, server)
    finally:
        engine.go.set()
        await owners.aclose()
        owner.close()
        await server.aclose()
        await host.aclose()
        await mirror.aclose()


async def main() -> None:
    async with stack() as s:
        sid = await s.open("api")
        line = {"url": s.url, "operator_key": KEYS.operator, "session_id": sid, "session_key": KEYS.session(sid)}
        print(orjson.dumps(line).decode(), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
