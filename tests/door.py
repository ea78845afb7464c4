"""The whole way of a request without Ray: gateway, owner, session, store, and an engine that says what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
from test_checkpoint_fakes import Cluster
from test_gateway import KEYS, SID, Answer, Supervisor, serve
from test_gateway import Owner as PlayedOwner

from rollout_ft import line
from rollout_ft.config import Config
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.host import SessionHost
from rollout_ft.engine.http import OwnerHTTP
from rollout_ft.engine.parsers import make_parser
from rollout_ft.engine.port import Chunk, EngineInfo
from rollout_ft.faultpoints import Inert
from rollout_ft.gateway.gateway import Gateway
from rollout_ft.gateway.owners import Owners
from rollout_ft.line import token_of
from rollout_ft.telemetry.events import Events
from rollout_ft.testing.plain import STOP, PlainTemplate
from rollout_ft.types import JSON, SessionSpec, VersionSpan


@dataclass
class Engine:
    """Says the next of `lines`; keeps what it was asked. A line that is an exception is raised."""

    lines: list[Any] = field(default_factory=list[Any])
    asked: list[tuple[list[int], JSON]] = field(default_factory=list[Any])
    hold: asyncio.Event | None = None

    async def generate(self, rid: str, input_json: bytes, sampling: JSON, routed_from: int | None = None) -> AsyncIterator[Chunk]:
        self.asked.append((orjson.loads(b"[" + input_json + b"]"), sampling))
        if self.hold is not None:
            await self.hold.wait()
        line = self.lines.pop(0) if self.lines else "ok"
        if isinstance(line, Exception):
            raise line
        ids = [*line.encode(), STOP][: sampling["max_new_tokens"]]
        stopped = next((line.index(s) + len(s) for s in sampling.get("stop", ()) if s in line), None)
        ids = ids[:stopped] if stopped is not None else ids
        finish = "stop" if ids[-1] == STOP or stopped is not None else "length"
        yield Chunk(ids, [-0.5] * len(ids), (VersionSpan("v1", 0, len(ids)),), finish)

    async def abort(self, rid: str) -> None: ...
    async def load(self) -> int | None:
        return 0

    async def alive(self) -> bool:
        return True

    async def ready(self) -> bool:
        return True

    async def info(self) -> EngineInfo:
        return EngineInfo("v1", "plain")

    async def aclose(self) -> None: ...


@dataclass
class Door:
    url: str
    engine: Engine
    host: SessionHost
    http: aiohttp.ClientSession

    async def ask(self, path: str, body: Any = None, *, headers: dict[str, str] | None = None, key: str = KEYS.session(SID)) -> Answer:
        sent = {"authorization": f"Bearer {key}", **(headers or {})}
        data = None if body is None else orjson.dumps(body)
        async with self.http.request("GET" if body is None else "POST", self.url + path, data=data, headers=sent) as r:
            return Answer(r.status, {k.lower(): v for k, v in r.headers.items()}, await r.read())

    async def chat(self, **fields: Any) -> Any:
        answer = await self.ask(f"/sessions/{SID}/v1/chat/completions", fields)
        assert answer.status == 200, answer.body
        return orjson.loads(answer.body)["choices"][0]["message"]

    async def messages(self, **fields: Any) -> Any:
        answer = await self.ask(f"/sessions/{SID}/v1/messages", {"max_tokens": 200, **fields})
        assert answer.status == 200, answer.body
        return orjson.loads(answer.body)

    @property
    def turns(self) -> int:
        return len(self.host.session(SID).tree.nodes)


async def nothing(reason: str) -> None: ...


@contextlib.asynccontextmanager
async def door(*lines: Any, spec: JSON | None = None, **config: Any) -> AsyncIterator[Door]:
    settings = Config.model_validate(config)
    mirror = Cluster("a", "b").mirror()
    engine, renderer = Engine(list(lines)), PlainTemplate()
    parser = await make_parser(settings, "e0", engine, None)
    host = SessionHost("e0", settings, renderer, Driver(engine, settings.engine), parser, mirror, nothing, Events("e0"), Inert())
    await host.open("t1", 1, 1, SessionSpec("t1", **(spec or {})), False)
    sock = socket.create_server(("127.0.0.1", 0))
    owner_url = f"127.0.0.1:{sock.getsockname()[1]}"
    owner = await line.serve(OwnerHTTP(host, settings, renderer).answer, sock, token_of(KEYS.internal), cancels=True)
    owners = Owners(Supervisor([PlayedOwner("e0", url=owner_url)]), token_of(KEYS.internal), 60)
    gateway = Gateway(settings.gateway, KEYS, Supervisor([PlayedOwner("e0", url=owner_url)]), owners, "", Inert(), settings.model)
    url, server = await serve(gateway.handle)
    async with aiohttp.ClientSession() as http:
        try:
            yield Door(url, engine, host, http)
        finally:
            if engine.hold is not None:
                engine.hold.set()
            await owners.aclose()
            await host.aclose()
            owner.close()
            await server.aclose()
