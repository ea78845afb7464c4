"""Bodies in, replies and events out: as much of HTTP as the small engines need.

Owns the bytes of a request and a reply. Must not know of engines. It is plain ASGI, with no framework between, because
a request of 300 tokens has to cost less than a millisecond in all. The subtle invariant: the last event and the mark
that ends a stream leave in one write, so no reader sees the one without the other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import orjson

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_MAX_BODY_BYTES = 64 << 20
_JSON_TYPE: Final = (b"content-type", b"application/json")
_STREAM_TYPE: Final = (b"content-type", b"text/event-stream; charset=utf-8")
_DONE: Final = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """`body` is sent as JSON, `text` as it is."""

    status: int
    body: Any = None
    text: str = ""


def error_object(message: str, status: int) -> dict[str, Any]:
    """SGLang's error, where it is not from `/generate`."""
    kind = {400: "Bad Request", 413: "Request Entity Too Large", 503: "503"}[status]
    return {"object": "error", "message": message, "type": kind, "param": None, "code": status}


async def read_body(receive: Receive) -> bytes | None:
    """The whole body; None when it is too large."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        event = await receive()
        part: bytes = event.get("body", b"")
        parts.append(part)
        size += len(part)
        more = event.get("more_body", False)
        if size > _MAX_BODY_BYTES:
            return None
    return b"".join(parts)


async def send_reply(send: Send, reply: Reply) -> None:
    body = reply.text.encode() if reply.body is None else orjson.dumps(reply.body)
    headers = [*([_JSON_TYPE] if reply.body is not None else []), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await _send_part(send, body, more=False)


async def begin_stream(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [_STREAM_TYPE]})


async def send_event(send: Send, event: dict[str, Any], last: bool) -> None:
    await _send_part(send, b"data: " + orjson.dumps(event) + b"\n\n" + (_DONE if last else b""), more=not last)


async def _send_part(send: Send, part: bytes, more: bool) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": more})
