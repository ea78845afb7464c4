"""What a client sends, read to where it belongs: heads and small bodies to the parser, a large body to its own place.

Owns the bytes between the socket and the connection. Knows nothing of HTTP but how long a body is. A parser hands on
each piece as a copy, and whoever gathers them copies them again: a long conversation comes in half a megabyte.

The subtle invariant: only as many bytes are asked for as belong to the body, and its end is told before anything else is
read, so that whatever comes behind it is the parser's again.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from rollout_ft.types import Raw

BUFFER_BYTES = 2**16
_CLAIMED_BYTES = 2**20
"""What a body is given on its word; more only as fast as it comes."""


class Receiver(Protocol):
    """What stands behind: the parser's protocol, without its transport's."""

    reads: Incoming

    def connection_made(self, transport: Any) -> None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def data_received(self, data: memoryview) -> None: ...
    def body_received(self) -> None: ...
    def eof_received(self) -> bool | None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class Incoming(asyncio.BufferedProtocol):
    """`shared` is a buffer of the event loop: nothing stays in it."""

    def __init__(self, receiver: Receiver, shared: memoryview):
        self._receiver, self._shared = receiver, shared
        self._large: bytearray | None = None
        self._filled = self._size = 0
        self._whole: asyncio.Future[bytearray | None] | None = None
        receiver.reads = self
        self.connection_made, self.eof_received = receiver.connection_made, receiver.eof_received
        self.pause_writing, self.resume_writing = receiver.pause_writing, receiver.resume_writing

    async def body(self, size: int, begun: Raw) -> bytearray | None:
        """The next `size` bytes, of which some have come already; None when the client leaves before."""
        self._large, self._filled, self._size = bytearray(min(size, max(_CLAIMED_BYTES, len(begun)))), len(begun), size
        self._large[: len(begun)] = begun
        self._whole = asyncio.get_running_loop().create_future()
        return await self._whole

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._large is None:
            return self._shared
        if self._filled == len(self._large):
            self._large += bytes(min(self._filled, self._size - self._filled))
        return memoryview(self._large)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._large is None:
            return self._receiver.data_received(self._shared[:nbytes])
        self._filled += nbytes
        if self._filled == self._size:
            self._receiver.body_received()
            self._end(self._large)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(None)
        self._receiver.connection_lost(exc)

    def _end(self, body: bytearray | None) -> None:
        self._large, whole, self._whole = None, self._whole, None
        if whole is not None and not whole.done():
            whole.set_result(body)
