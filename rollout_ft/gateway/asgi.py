"""The little of HTTP that the gateway and the engine actors share: read a body, send a reply, serve a port.

Owns ASGI plumbing. Knows nothing of routes. A body over its limit is refused before it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import uvicorn

from rollout_ft.config import GatewayConfig
from rollout_ft.errors import BadRequest
from rollout_ft.gateway.connection import WHOLE_BODY, accepting
from rollout_ft.types import Raw

INTERNAL = GatewayConfig(max_connections=2**20)
"""For ports that only our own actors know: as patient as a gateway, and open to all of them."""
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = dict[bytes, bytes]


class Disconnected(Exception):
    """The client closed its connection before the request was whole."""


@dataclass(slots=True)
class Exchange:
    """One request and the ways to answer it."""

    scope: Scope
    receive: Receive
    send: Send
    started: bool = False
    status: int = 0
    """What was answered; 0 while nothing was."""

    @property
    def method(self) -> str:
        return self.scope["method"]

    @property
    def path(self) -> str:
        return self.scope["path"]

    def headers(self) -> Headers:
        return dict(self.scope["headers"])

    async def body(self, limit_bytes: int) -> Raw:
        """The whole body. Raises BadRequest (413 over the limit, 415 for what is compressed), Disconnected when the client left."""
        headers = self.headers()
        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
        if encoding not in ("", "identity"):
            message = f"content-encoding {encoding[:40]!r} is not accepted: send the body as it is"
            raise BadRequest(message, 415, "unsupported_encoding", "content-encoding")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit_bytes:
            raise BadRequest(_too_large(limit_bytes), status=413, code="body_too_large")
        if WHOLE_BODY not in self.scope:
            return await self._gathered(limit_bytes)
        whole: Raw | None = await self.scope[WHOLE_BODY]()
        if whole is None:
            raise Disconnected
        return whole

    async def _gathered(self, limit_bytes: int) -> Raw:
        """A body in pieces, of which nobody has said how long it is."""
        parts: list[Raw] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit_bytes:
                raise BadRequest(_too_large(limit_bytes), status=413, code="body_too_large")
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def disconnected(self) -> None:
        """Returns when the client is gone."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    def began(self, status: int) -> None:
        """A reply leaves from here on: there is no other any more."""
        self.started, self.status = True, status

    async def reply(
        self, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = (), content: bytes = b"application/json"
    ) -> None:
        self.began(status)
        length = [] if status == 204 else [(b"content-type", content), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": [*length, *headers]})
        await self.send({"type": "http.response.body", "body": body})


def _too_large(limit_bytes: int) -> str:
    return f"the body is larger than {limit_bytes} bytes (gateway.max_body_bytes)"


class Server:
    """uvicorn on a socket that is bound already, inside this event loop."""

    def __init__(self, handle: Callable[[Exchange], Awaitable[None]], sock: socket.socket, limits: GatewayConfig = INTERNAL):
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await handle(Exchange(scope, receive, send))

        config = uvicorn.Config(
            app, http=accepting(limits),  # type: ignore[arg-type]
            ws="none", lifespan="off", access_log=False, log_level="critical", timeout_keep_alive=75,
            ssl_certfile=limits.tls_cert or None, ssl_keyfile=limits.tls_key or None, backlog=4096, server_header=False,
            date_header=False, proxy_headers=False,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._server.capture_signals = contextlib.nullcontext  # pyright: ignore[reportAttributeAccessIssue]
        self._task = asyncio.create_task(self._server.serve(sockets=[sock]))

    @property
    def connections(self) -> int:
        return len(self._server.server_state.connections)

    async def die(self) -> None:
        """Ends as a process that is killed does: every connection breaks."""
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]
        await self.aclose()

    async def ready(self) -> None:
        """Returns when the port answers; raises what kept it from that."""
        while not self._server.started:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.005)

    async def aclose(self) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
