"""Environments for agents in processes of their own: `trial.remote` speaks to it.

Owns a loopback port for as long as a run's attempts, and which session's tools are behind it. The key of a session opens its
environment and no other; an attempt that is over has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator

import orjson
from aiohttp import web

from rollout_ft.trial.environment import EnvironmentLost
from rollout_ft.trial.tools import Tools
from rollout_ft.types import JSON

MAX_ACTION_BYTES = 2**24


class ToolServer:
    def __init__(self) -> None:
        self._tools: dict[str, Tools] = {}
        self._runner: web.AppRunner | None = None
        self._starting = asyncio.Lock()
        self._url = ""

    async def start(self) -> None:
        """Idempotent."""
        async with self._starting:
            if self._runner is not None:
                return
            app = web.Application(client_max_size=MAX_ACTION_BYTES)
            app.add_routes([web.post("/step", self._step), web.post("/begin", self._begin)])
            self._runner = web.AppRunner(app, access_log=None)
            await self._runner.setup()
            sock = socket.create_server(("127.0.0.1", 0))
            self._url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            await web.SockSite(self._runner, sock).start()

    @contextlib.contextmanager
    def serving(self, key: str, tools: Tools) -> Generator[str]:
        """Who has the key may use these tools, at this URL, as long as the block takes."""
        self._tools[key] = tools
        try:
            yield self._url
        finally:
            del self._tools[key]

    async def _step(self, request: web.Request) -> web.Response:
        tools, body = await self._asked(request)
        try:
            return _reply(await tools.step(body.get("action")))  # pyright: ignore[reportArgumentType] - it says what is wrong
        except ValueError as e:
            return _reply({"error": str(e)}, 400)
        except EnvironmentLost as e:
            return _reply({"error": str(e)}, 410)

    async def _begin(self, request: web.Request) -> web.Response:
        tools, body = await self._asked(request)
        steps = body.get("steps")
        if not isinstance(steps, int) or steps < 0:
            return _reply({"error": "steps is how many steps lie behind the agent"}, 400)
        try:
            tools.begin_at(steps)
        except ValueError as e:
            return _reply({"error": str(e)}, 400)
        return _reply({})

    async def _asked(self, request: web.Request) -> tuple[Tools, JSON]:
        key, data = request.headers.get("authorization", "").removeprefix("Bearer "), await request.read()
        tools = self._tools.get(key)
        if tools is None:
            raise web.HTTPUnauthorized(text='{"error": "the key opens no environment: its attempt is over, or it was never one"}')
        try:
            return tools, dict(orjson.loads(data))
        except (ValueError, TypeError):
            raise web.HTTPBadRequest(text='{"error": "the body is no JSON object"}') from None

    async def aclose(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()


def _reply(body: JSON, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")
