"""One hop between a client and the gateway, which loses what a plan says and writes down what it saw.

Owns the ways in which a network loses a request or its reply, and the record of every try. Knows nothing of what a
reply means. The plan is a pure function of a seed; which turn a request is, is the number of different conversations
seen before it, so that a repeat is recognised whatever its headers say.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import aiohttp
from aiohttp import web

COUNT = "x-stainless-retry-count"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}
PAGE = "<html><head><title>{0}</title></head><body><center><h1>{0}</h1></center><hr><center>nginx</center></body></html>"


class Loss(StrEnum):
    SWALLOWED = "swallowed"
    """The reply was read to its end, and the client's connection closed without a byte of it."""
    CUT = "cut"
    """The same, after half of the body; of a stream, after its first event."""
    LATE = "late"
    """The reply is held back until the client has given up."""
    REFUSED = "refused"
    """Nobody listens when the turn begins; connections that were open are closed."""
    BAD_GATEWAY = "bad_gateway"
    """A 502 in HTML, the request never having left."""
    IMPATIENT = "impatient"
    """The hop gives up long before a generation ends: a 504 in HTML. An answer that is there already goes through."""


Plan = Mapping[int, Sequence[Loss]]
"""Turn → what befalls its first try, its second, …; every further try goes through."""


def plan(seed: int, turns: int, *, among: Sequence[Loss] = tuple(Loss), most: int = 2) -> Plan:
    """Each turn loses up to `most` of its tries."""
    rng = random.Random(seed)
    made: dict[int, list[Loss]] = {}
    for turn in range(1, turns + 1):
        losses = [rng.choice(among) for _ in range(rng.randint(0, most))]
        made[turn] = [loss for i, loss in enumerate(losses) if i == 0 or loss is not Loss.REFUSED]
    return made


@dataclass(slots=True)
class Try:
    """One request as it passed, and what became of it.

    `marked`: something that was passed on says that it may be a repeat. `delivered`: the gateway was rid of a whole reply.
    """

    turn: int
    loss: Loss | None
    retry_count: int
    marked: bool
    status: int = 0
    delivered: bool = False
    turn_key: str = ""
    outcome: str = ""


@dataclass
class Network:
    """`strip`: request headers that this hop does not pass on."""

    upstream: str
    losses: Plan = field(default_factory=dict[int, Any])
    strip: frozenset[str] = frozenset()
    retry_after_ms: int | None = None
    """What the pages of this hop tell clients to wait: nothing, as a rule."""
    patience_s: float = 0.05
    refusal_s: float = 0.2
    tries: list[Try] = field(default_factory=list[Try])

    async def __aenter__(self) -> Network:
        self._turns: dict[str, int] = {}
        self._http = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None))
        self._runner = web.AppRunner(self._app(), handler_cancellation=True, access_log=None)
        await self._runner.setup()
        self._port = _bound(0)  # never listens: without `_site`, connections are refused
        self._site: web.SockSite | None = None
        self.url = f"http://127.0.0.1:{self._port.getsockname()[1]}"
        self._opening = asyncio.create_task(self._open(self.refusal_s if self._refuses(1) else 0))
        if not self._refuses(1):
            await self._opening
        return self

    async def __aexit__(self, *_: object) -> None:
        self._opening.cancel()
        await self._runner.cleanup()
        await self._http.close()
        self._port.close()

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    # -- one try --------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        seen = self._note(request, body)
        if seen.loss is Loss.BAD_GATEWAY:
            return self._page(502, "502 Bad Gateway")
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP_BY_HOP | self.strip}
        try:
            async with asyncio.timeout(self.patience_s if seen.loss is Loss.IMPATIENT else None):
                async with self._http.request(request.method, self.upstream + request.path_qs, data=body, headers=headers) as reply:
                    seen.status = reply.status
                    seen.turn_key, seen.outcome = reply.headers.get("x-rollout-ft-turn", ""), reply.headers.get("x-rollout-ft-outcome", "")
                    return await self._pass(request, reply, seen)
        except aiohttp.ClientConnectionError:
            return _close(request, web.Response())
        except TimeoutError:
            seen.status = 0
            return self._page(504, "504 Gateway Time-out")

    async def _pass(self, request: web.Request, reply: aiohttp.ClientResponse, seen: Try) -> web.StreamResponse:
        response = web.StreamResponse(status=reply.status, headers=_kept(reply.headers))
        if self._refuses(seen.turn + 1):
            response.force_close()
        if seen.loss in (None, Loss.IMPATIENT):  # the answer was there already
            await response.prepare(request)
            try:
                async for chunk in reply.content.iter_any():
                    await response.write(chunk)
            except aiohttp.ClientPayloadError:  # the gateway lost it: so does this hop
                return _close(request, response)
            seen.delivered = reply.status == 200
            if self._refuses(seen.turn + 1):
                await self._refuse()
            await response.write_eof()
            return response
        whole = await reply.read()
        seen.delivered = reply.status == 200
        if seen.loss is Loss.LATE:
            await asyncio.Event().wait()  # the client leaving cancels this
        if seen.loss is Loss.CUT:
            response.content_length = len(whole)
            await response.prepare(request)
            is_stream = reply.content_type == "text/event-stream"
            await response.write(whole[: whole.index(b"\n\n") + 2] if is_stream else whole[: len(whole) // 2])
        return _close(request, response)

    def _note(self, request: web.Request, body: bytes) -> Try:
        conversation = json.dumps(json.loads(body)["messages"], sort_keys=True) if body else ""
        turn = self._turns.setdefault(conversation, len(self._turns) + 1)
        before = sum(t.turn == turn for t in self.tries) + self._refuses(turn)
        losses = self.losses.get(turn, ())
        loss = losses[before] if before < len(losses) else None
        count = int(request.headers.get(COUNT, "0"))
        marked = (count > 0 and COUNT not in self.strip) or "idempotency-key" in request.headers
        seen = Try(turn, loss, count, marked)
        self.tries.append(seen)
        return seen

    def _page(self, status: int, title: str) -> web.Response:
        headers = {} if self.retry_after_ms is None else {"retry-after-ms": str(self.retry_after_ms)}
        return web.Response(status=status, text=PAGE.format(title), content_type="text/html", headers=headers)

    # -- listening ------------------------------------------------------------------------------------------------

    def _refuses(self, turn: int) -> bool:
        return list(self.losses.get(turn, ()))[:1] == [Loss.REFUSED]

    async def _refuse(self) -> None:
        """Nobody listens for a moment; a client's first wait is longer."""
        assert self._site is not None
        await self._site.stop()
        self._opening = asyncio.create_task(self._open(self.refusal_s))

    async def _open(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self._site = web.SockSite(self._runner, _bound(self._port.getsockname()[1]))
        await self._site.start()


def _close(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return response


def _bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def _kept(headers: Any) -> dict[str, str]:
    return {k: v for k, v in headers.items() if k.lower() not in HOP_BY_HOP}
