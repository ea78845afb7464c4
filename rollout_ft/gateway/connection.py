"""One client's connection: how long it may take, how much it may send, how slowly it may read.

Owns the limits that uvicorn and httptools have not: time and size of a request's head, time of its body, pipelined
requests, time of a reply that is not read, connections in all. Knows nothing of routes. A request that breaks one is
answered 4xx and its connection closed; where a reply has begun already there is nothing to say, and it is only closed.

The subtle invariant: nothing is written while a reply is on its way, so that no client takes a refusal for a part of
it. A client that closes its sending side has left, as with most servers: otherwise nobody who waits for a long
generation could be seen to leave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, cast

import httptools
import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from rollout_ft.config import GatewayConfig
from rollout_ft.gateway.incoming import BUFFER_BYTES, Incoming
from rollout_ft.types import Raw

WHOLE_BODY = "rollout_ft.whole_body"
"""In the scope of a request with a large body: asks for it in one piece."""
MAX_PIPELINED = 8
_BODY = (b"content-length", b"transfer-encoding")
MIN_READ_BYTES = 16 * 1024
"""What a client has to read of its reply within `send_timeout_s`, if there is so much left."""


@dataclass(frozen=True, slots=True)
class Refusal:
    status: int
    code: str
    message: str

    def response(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        body = orjson.dumps({"error": {"message": self.message, "type": kind, "code": self.code, "param": None}})
        retry = b"retry-after: 1\r\n" if self.status == 503 else b""
        head = b"HTTP/1.1 %d \r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % (self.status, len(body))
        return head + retry + b"\r\n" + body


_MALFORMED = Refusal(400, "invalid_http", "this is not an HTTP/1.1 request that can be read")


class TooMuch(Exception):
    """Stops the parser in the middle of a request; what the client is told is in `_refusal`."""


def accepting(limits: GatewayConfig) -> Callable[..., Incoming]:
    """Makes what uvicorn serves each connection with."""
    shared = memoryview(bytearray(BUFFER_BYTES))

    def accept(**uvicorns: Any) -> Incoming:
        return Incoming(Connection(**uvicorns, limits=limits), shared)

    return accept


class Connection(HttpToolsProtocol):
    reads: Incoming

    def __init__(self, *args: Any, limits: GatewayConfig, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._deadline: asyncio.TimerHandle | None = None
        self._reader: asyncio.TimerHandle | None = None
        self._refusal = _MALFORMED
        self._in_head = False
        self._head_bytes = self._unfinished = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most = self._limits.max_connections
        if len(self.connections) > most:
            return self._refuse(Refusal(503, "too_many_connections", f"this gateway has {most} connections (gateway.max_connections)"))
        self._expect_within(self._limits.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        self._cancel_reader()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    # -- what comes in --------------------------------------------------------------------------------------------

    def data_received(self, data: memoryview) -> None:  # type: ignore[override]
        if self._deadline is None and not self._answering():
            self._expect_within(self._limits.header_timeout_s)  # also for bytes that begin no request: they end the keep-alive
        before = self._in_head
        super().data_received(cast(bytes, data))
        if before and self._in_head and not self.transport.is_closing():
            self._unfinished += len(data)  # a name or value without an end is told to nobody
            if self._unfinished > self._limits.max_header_bytes:
                self._refuse(self._too_large())

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to whatever stopped the parser."""
        self._refuse(self._refusal)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes, self._unfinished = True, 0, 0
        self._expect_within(self._limits.header_timeout_s)

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what comes behind a body is counted and dropped: a key must not change after it was checked
            super().on_header(name, value)
        self._count(len(name) + len(value))

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._limits.max_header_bytes:
            self._stop(self._too_large())
        if len(self.headers) > self._limits.max_headers:
            self._stop(Refusal(431, "headers_too_large", f"more than {self._limits.max_headers} headers (gateway.max_headers)"))

    def _too_large(self) -> Refusal:
        most = self._limits.max_header_bytes
        return Refusal(431, "headers_too_large", f"the headers are larger than {most} bytes (gateway.max_header_bytes)")

    def _stop(self, refusal: Refusal) -> NoReturn:
        self._refusal = refusal
        raise TooMuch

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._expect_within(self._limits.body_timeout_s)
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(Refusal(400, "too_many_pipelined", f"more than {MAX_PIPELINED} requests at once on one connection"))
        if cast(Any, self.parser).should_upgrade() and any(name in _BODY for name, _ in self.headers):
            message = "no other protocol is spoken here, and a body behind an offer of one cannot be read: leave the Upgrade header out"
            self._stop(Refusal(400, "upgrade_not_supported", message))
        super().on_headers_complete()
        size = self._large_body()
        if size:
            cast(Any, self.scope)[WHOLE_BODY] = partial(self._whole_body, self.cycle, size)

    def _large_body(self) -> int:
        """The length of a body that is worth to be read by itself; 0 for others, and where the parser is needed: pieces,
        a client that waits to be told to go on, a connection that ends with this request."""
        sizes = [int(value) for name, value in self.headers if name == _BODY[0]]
        plain = len(sizes) == 1 and self.cycle.keep_alive and not self.cycle.waiting_for_100_continue
        return sizes[0] if plain and sizes[0] > BUFFER_BYTES else 0

    async def _whole_body(self, cycle: RequestResponseCycle, size: int) -> Raw | None:
        """The body of the newest request, whose end the parser does not see; None when the client leaves before."""
        body: Raw | None = cycle.body
        if cycle.more_body and not cycle.disconnected:
            self.flow.resume_reading()
            body = await self.reads.body(size, cycle.body)
        cycle.body = bytearray()
        cycle.message_event.clear()
        return None if cycle.disconnected else body

    def body_received(self) -> None:
        """The parser still waits for the body that went past it: the next request is another's."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.on_message_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._cancel_deadline()

    # -- deadlines ------------------------------------------------------------------------------------------------

    def _expect_within(self, seconds: float) -> None:
        self._cancel_deadline()
        self._deadline = self.loop.call_later(seconds, self._too_slow)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self._in_head:
            key, what = "header_timeout_s", "the head of the request"
        elif self._answering():
            key, what = "body_timeout_s", "the body"
        else:
            return self.transport.close()
        seconds = getattr(self._limits, key)
        self._refuse(Refusal(408, "request_timeout", f"{what} did not arrive within {seconds:g} s (gateway.{key})"))

    def _cycle(self) -> RequestResponseCycle | None:
        return self.cycle

    def _answering(self) -> bool:
        """The newest request waits for the rest of its reply."""
        cycle = self._cycle()
        return cycle is not None and not cycle.response_complete

    def _refuse(self, refusal: Refusal) -> None:
        """Says no and closes; says nothing where it could be taken for a part of another reply."""
        cycle = self._cycle()
        replied = cycle is not None and cycle.response_started
        if self.pipeline or (replied and (self._answering() or not self._in_head)):
            return self.transport.abort()
        self.transport.write(refusal.response())
        self.transport.close()
        self._watch_reader()

    # -- what goes out --------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_reader()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_reader()

    def _watch_reader(self) -> None:
        """From here on the client has to read; nothing more is written until it did, or another reply is complete."""
        self._cancel_reader()
        unread = self.transport.get_write_buffer_size()
        if unread:
            self._reader = self.loop.call_later(self._limits.send_timeout_s, self._check_reader, unread)

    def _check_reader(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() > max(0, unread - MIN_READ_BYTES):
            self.transport.abort()
        else:
            self._watch_reader()

    def _cancel_reader(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
