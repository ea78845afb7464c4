"""A connection between two of our processes: many calls at once, as frames over TCP.

Owns the framing and the matching of answers to calls; a call through Ray costs ten times the CPU of one here, one
through HTTP three times. Knows nothing of what the calls mean, and never repeats one or reconnects: a call whose line
broke is in doubt, and its caller decides.

The subtle invariant: what one end sends is taken up at the other in that order, each call begun before the next frame
is looked at; only answers may overtake each other.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import cast
from weakref import WeakSet

from rollout_ft.errors import RolloutFTError
from rollout_ft.types import Raw

Answer = Callable[[int, int, bytearray], Awaitable[Raw]]
"""`(what, argument, payload)` → the payload of the answer."""

_FRAME = struct.Struct("<IIBq")  # bytes of payload, number of the call (0: nobody waits), what, argument
MAX_FRAME_BYTES = 2**30
BUFFER_BYTES = 2**16
MAX_UNREAD_BYTES = 2**28
TOKEN_BYTES = 32
_FAILED, _CANCEL = 255, 254


class LineBroken(RolloutFTError):
    """Nobody knows whether the call was carried out."""


class CallFailed(RolloutFTError):
    """The other end could not carry the call out."""


class NobodyThere(RolloutFTError):
    """No connection: the call was not carried out."""


@dataclass(frozen=True, slots=True)
class Door:
    """Where a line begins, and what opens it."""

    host: str
    port: int
    token: bytes


def token_of(secret: str) -> bytes:
    return sha256(secret.encode()).digest()


class _Frames(asyncio.BufferedProtocol, ABC):
    """Cuts what arrives into frames: small ones out of one buffer, a large one straight into its own, without a copy."""

    def __init__(self) -> None:
        self._buffer = bytearray(BUFFER_BYTES)
        self._filled = 0
        self._large: bytearray | None = None
        self._head = (0, 0, 0)
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one, and no instance of the class

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._buffer if self._large is None else self._large)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        self._filled += nbytes
        if self._large is None:
            self._cut()
        elif self._filled == len(self._large):
            payload, self._large, self._filled = self._large, None, 0
            self.frame(*self._head, payload)

    def _cut(self) -> None:
        at = 0
        while self._filled - at >= _FRAME.size:
            size, *head = _FRAME.unpack_from(self._buffer, at)
            if size > MAX_FRAME_BYTES:
                return self.close()
            start, end = at + _FRAME.size, at + _FRAME.size + size
            if end > self._filled:
                if end - at > BUFFER_BYTES:
                    return self._expect(size, (head[0], head[1], head[2]), self._buffer[start : self._filled])
                break
            at = end
            self.frame(head[0], head[1], head[2], self._buffer[start:end])
        self._drop(at)

    def _expect(self, size: int, head: tuple[int, int, int], begun: bytearray) -> None:
        """The rest of this frame is read to where it belongs."""
        self._large, self._filled, self._head = bytearray(size), len(begun), head
        self._large[: len(begun)] = begun

    def _drop(self, count: int) -> None:
        """The first bytes of the buffer were taken."""
        rest = self._buffer[count : self._filled]
        self._buffer[: len(rest)], self._filled = rest, len(rest)

    @abstractmethod
    def frame(self, number: int, what: int, argument: int, payload: bytearray) -> None:
        """One frame has arrived whole."""

    def send(self, number: int, what: int, argument: int, *pieces: Raw | memoryview) -> None:
        """One frame; its payload may come in pieces."""
        if self._transport is None:
            return
        if self._transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            return self.close()  # who reads nothing for so long is as good as gone
        size = sum(map(len, pieces))
        self._transport.writelines([_FRAME.pack(size, number, what, argument), *pieces])

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class _Served(_Frames):
    """The answering end. The first bytes of a connection are the token."""

    def __init__(self, answer: Answer, token: bytes, cancels: bool):
        super().__init__()
        self._answer, self._token, self._cancels = answer, token, cancels
        self._known = False
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def _cut(self) -> None:
        if not self._known:
            if self._filled < TOKEN_BYTES:
                return
            self._known = hmac.compare_digest(bytes(self._buffer[:TOKEN_BYTES]), self._token)
            if not self._known:
                return self.close()
            self._drop(TOKEN_BYTES)
        super()._cut()

    def frame(self, number: int, what: int, argument: int, payload: bytearray) -> None:
        if what == _CANCEL:
            task = self._tasks.get(argument)
            if task is not None and self._cancels:
                task.cancel()
            return
        task = asyncio.create_task(self._run(number, what, argument, payload))
        if number:
            self._tasks[number] = task
            task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _run(self, number: int, what: int, argument: int, payload: bytearray) -> None:
        work = self._answer(what, argument, payload)
        del payload  # not to be kept for as long as an answer takes
        try:
            answer = await work
        except Exception as error:
            what, answer = _FAILED, f"{type(error).__name__}: {error}".encode()
        if len(answer) > MAX_FRAME_BYTES:
            what, answer = _FAILED, f"an answer of {len(answer)} bytes does not go over a line".encode()
        if number:
            self.send(number, what, argument, answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._cancels:
            for task in list(self._tasks.values()):
                task.cancel()


class Server:
    """Answers calls on a listening socket until it is closed."""

    def __init__(self, answer: Answer, token: bytes, cancels: bool):
        self._answer, self._token, self._cancels = answer, token, cancels
        self._connections: WeakSet[_Served] = WeakSet()
        self._listener: asyncio.Server | None = None

    async def start(self, sock: socket.socket) -> Server:
        self._listener = await asyncio.get_running_loop().create_server(self._connected, sock=sock, backlog=4096)
        return self

    def _connected(self) -> _Served:
        served = _Served(self._answer, self._token, self._cancels)
        self._connections.add(served)
        return served

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for served in list(self._connections):
            served.close()


async def serve(answer: Answer, sock: socket.socket, token: bytes, *, cancels: bool = False) -> Server:
    """With `cancels` a call ends when its caller does not wait any more."""
    return await Server(answer, token, cancels).start(sock)


class Line(_Frames):
    """The calling end of one connection."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[int, asyncio.Future[bytearray]] = {}
        self._numbers = 0
        self.open = True

    @classmethod
    async def to(cls, door: Door) -> Line:
        """Raises NobodyThere."""
        try:
            transport, line = await asyncio.get_running_loop().create_connection(cls, door.host, door.port)
        except OSError as error:
            raise NobodyThere(f"{door.host}:{door.port}: {error}") from error
        transport.write(door.token)
        return line

    def call(self, what: int, argument: int, *pieces: Raw | memoryview) -> asyncio.Future[bytearray]:
        """The answer, once it is there: LineBroken or CallFailed when there is none. Cancel it to wait no more."""
        answer: asyncio.Future[bytearray] = asyncio.get_running_loop().create_future()
        if not self.open:
            answer.set_exception(LineBroken("the line is closed"))
            return answer
        self._numbers = self._numbers % 0xFFFFFFFF + 1
        number = self._numbers
        if sum(map(len, pieces)) > MAX_FRAME_BYTES:
            answer.set_exception(CallFailed(f"more than {MAX_FRAME_BYTES} bytes do not go over a line"))
            return answer
        self._waiting[number] = answer
        answer.add_done_callback(lambda done: self._done(number, done))
        self.send(number, what, argument, *pieces)
        return answer

    def tell(self, what: int, argument: int, payload: bytes) -> None:
        """A call without an answer; lost in silence when the line breaks."""
        if self.open:
            self.send(0, what, argument, payload)

    def _done(self, number: int, answer: asyncio.Future[bytearray]) -> None:
        self._waiting.pop(number, None)
        if answer.cancelled() and self.open:
            self.send(0, _CANCEL, number, b"")

    def frame(self, number: int, what: int, argument: int, payload: bytearray) -> None:
        answer = self._waiting.get(number)
        if answer is None or answer.done():
            return
        if what == _FAILED:
            answer.set_exception(CallFailed(payload.decode(errors="replace")))
        else:
            answer.set_result(payload)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        for answer in list(self._waiting.values()):
            if not answer.done():
                answer.set_exception(LineBroken(f"the line broke: {exc or 'closed'}"))
