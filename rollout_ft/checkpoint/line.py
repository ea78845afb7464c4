"""A store's own line: what its writers send at every turn, as frames over TCP.

Owns the framing and the two calls that every turn pays for; a call through Ray costs ten times the CPU of one here.
Must not retry or reconnect by itself: a call whose line broke is in doubt, and its caller decides.

The subtle invariant: frames are taken up in the order in which they were sent, and each is decided before the next is
looked at; only their answers may overtake each other.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import struct
from collections.abc import Awaitable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, cast

from rollout_ft.errors import StoreUnavailable

_FRAME = struct.Struct("<IIBq")  # bytes of payload, number of the call, what, view
MAX_FRAME_BYTES = 2**30
TOKEN_BYTES = 32
_FAILED = 255


class Call(IntEnum):
    APPEND = 1
    PARTIALS = 2


@dataclass(frozen=True, slots=True)
class Door:
    """Where a store's line begins, and what opens it: told to whoever can call the actor."""

    host: str
    port: int
    token: bytes


class Answers(Protocol):
    async def append_many(self, view_number: int, batch: bytes) -> bytes: ...
    async def put_partials(self, view_number: int, batch: bytes) -> int: ...


class _Frames(asyncio.Protocol):
    """Cuts what arrives into frames."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, and no instance of the class

    def data_received(self, data: bytes) -> None:
        self._rest += data
        at = 0
        while len(self._rest) - at >= _FRAME.size:
            size, number, what, view = _FRAME.unpack_from(self._rest, at)
            if size > MAX_FRAME_BYTES:
                return self.close()
            if len(self._rest) - at - _FRAME.size < size:
                break
            start = at + _FRAME.size
            at = start + size
            self.frame(number, what, view, bytes(self._rest[start:at]))
        del self._rest[:at]

    def frame(self, number: int, what: int, view: int, payload: bytes) -> None:
        raise NotImplementedError

    def send(self, number: int, what: int, view: int, payload: bytes) -> None:
        if self._transport is not None:
            self._transport.write(_FRAME.pack(len(payload), number, what, view) + payload)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class _Served(_Frames):
    """The store's end. The first bytes of a connection are the token."""

    def __init__(self, store: Answers, token: bytes):
        super().__init__()
        self._store, self._token = store, token
        self._known = False
        self._tasks: set[asyncio.Task[None]] = set()

    def data_received(self, data: bytes) -> None:
        if not self._known:
            self._rest += data
            if len(self._rest) < TOKEN_BYTES:
                return
            self._known = hmac.compare_digest(bytes(self._rest[:TOKEN_BYTES]), self._token)
            if not self._known:
                return self.close()
            del self._rest[:TOKEN_BYTES]
            data = b""
        super().data_received(data)

    def frame(self, number: int, what: int, view: int, payload: bytes) -> None:
        task = asyncio.create_task(self._answer(number, what, view, payload))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, what: int, view: int, payload: bytes) -> None:
        try:
            if what == Call.APPEND:
                answer = await self._store.append_many(view, payload)
            else:
                answer = str(await self._store.put_partials(view, payload)).encode()
        except Exception as error:
            what, answer = _FAILED, f"{type(error).__name__}: {error}".encode()
        self.send(number, what, view, answer)


async def serve(store: Answers, host: str) -> Door:
    """Opens the store's end for as long as its process lives."""
    token = secrets.token_bytes(TOKEN_BYTES)
    server = await asyncio.get_running_loop().create_server(lambda: _Served(store, token), host, 0, backlog=1024)
    return Door(host, server.sockets[0].getsockname()[1], token)


class Line(_Frames):
    """The writer's end of one connection."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._numbers = 0
        self.open = True

    @classmethod
    async def to(cls, door: Door) -> Line:
        """Raises StoreUnavailable when nobody is there."""
        try:
            transport, line = await asyncio.get_running_loop().create_connection(cls, door.host, door.port)
        except OSError as error:
            raise StoreUnavailable(f"{door.host}:{door.port}: {error}") from error
        transport.write(door.token)
        return line

    def call(self, what: Call, view: int, payload: bytes) -> Awaitable[bytes]:
        """The answer; StoreUnavailable when it cannot be known whether the call was carried out."""
        self._numbers = (self._numbers + 1) & 0xFFFFFFFF
        number = self._numbers
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        if not self.open:
            answer.set_exception(StoreUnavailable("the line is closed"))
            return answer
        self._waiting[number] = answer
        answer.add_done_callback(lambda _: self._waiting.pop(number, None))
        self.send(number, what, view, payload)
        return answer

    def frame(self, number: int, what: int, view: int, payload: bytes) -> None:
        answer = self._waiting.get(number)
        if answer is None or answer.done():
            return
        if what == _FAILED:
            answer.set_exception(StoreUnavailable(payload.decode(errors="replace")))
        else:
            answer.set_result(payload)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        for answer in list(self._waiting.values()):
            if not answer.done():
                answer.set_exception(StoreUnavailable(f"the line broke: {exc or 'closed'}"))
