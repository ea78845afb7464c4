"""How a gateway's requests reach the engine actor that owns the session: as calls over one line per pair.

Owns the encoding of requests and replies. Knows nothing of what they mean: at the owner's end a call is an HTTP exchange
like any other. A reply that is not whole is no reply.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import msgspec

from rollout_ft.errors import RolloutFTError
from rollout_ft.gateway.asgi import Exchange
from rollout_ft.types import Raw

Reply = tuple[int, dict[str, str], bytes]
"""`(status, headers in lower case, body)`."""


class Call(IntEnum):
    REQUEST = 1
    DELIVERED = 2


_encode = msgspec.msgpack.Encoder().encode
_request = msgspec.msgpack.Decoder(tuple[str, str, dict[bytes, bytes]])
_reply = msgspec.msgpack.Decoder(tuple[int, dict[str, str], bytes])
_delivered = msgspec.msgpack.Decoder(tuple[str, str])


class IncompleteReply(RolloutFTError):
    """The handler ended before its reply was whole."""


def encode_request(method: str, path: str, headers: dict[bytes, bytes]) -> bytes:
    """What comes before the body; the call's argument is its length, so that no body is copied to be sent."""
    return _encode((method, path, headers))


def decode_reply(data: Raw) -> Reply:
    return _reply.decode(data)


def encode_delivered(sid: str, request_id: str) -> bytes:
    """The reply to this request was written whole to a socket that was still open."""
    return _encode((sid, request_id))


def decode_delivered(data: Raw) -> tuple[str, str]:
    return _delivered.decode(data)


@dataclass(slots=True)
class Sent:
    """A reply on its way."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict[str, str])
    body: list[bytes] = field(default_factory=list[bytes])
    whole: bool = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {k.decode().lower(): v.decode("latin-1") for k, v in message["headers"]}
        else:
            self.body.append(message.get("body", b""))
            self.whole = not message.get("more_body")

    def encoded(self) -> bytes:
        """Raises IncompleteReply."""
        if not self.whole:
            raise IncompleteReply(f"{self.status} without an end")
        return _encode((self.status, self.headers, b"".join(self.body)))


def received(head_bytes: int, request: bytearray) -> tuple[Exchange, Sent]:
    """A call as an HTTP exchange, and where its reply gathers. A caller that leaves is a cancellation."""
    with memoryview(request)[:head_bytes] as head:
        method, path, headers = _request.decode(head)
    del request[:head_bytes]  # what stays is the body, where it is
    unread = [{"type": "http.request", "body": request, "more_body": False}]
    del request
    sent = Sent()

    async def receive() -> MutableMapping[str, Any]:
        if unread:
            return unread.pop()
        return await asyncio.get_running_loop().create_future()

    return Exchange({"type": "http", "method": method, "path": path, "headers": list(headers.items())}, receive, sent.send), sent
