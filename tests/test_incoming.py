"""Large bodies over real sockets: each arrives as it was sent, however it comes, and what comes behind it is the next request."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
from collections.abc import AsyncIterator
from typing import cast

import pytest
import uvloop

from rollout_ft.config import GatewayConfig
from rollout_ft.errors import BadRequest
from rollout_ft.gateway.asgi import Disconnected, Exchange, Server
from rollout_ft.gateway.incoming import BUFFER_BYTES, Incoming, Receiver

LIMIT = 4 * 2**20
SIZES = [0, BUFFER_BYTES, BUFFER_BYTES + 1, 3 * BUFFER_BYTES, 2**20, 2**20 + 1, 3 * 2**20 + 7]


@pytest.fixture(scope="module", params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """Gateways run on the second, which reads on where the first waits for the next round."""
    return request.param()


class Door:
    """Answers with the digest of the body; a path `/unread` without looking at it."""

    def __init__(self) -> None:
        self.left = asyncio.Event()
        self.port = 0

    async def handle(self, x: Exchange) -> None:
        try:
            body = b"" if x.path == "/unread" else await x.body(LIMIT)
        except Disconnected:
            return self.left.set()
        except BadRequest as e:
            return await x.reply(e.status, b"")
        await x.reply(200, hashlib.sha256(body).hexdigest().encode())


@contextlib.asynccontextmanager
async def door(**limits: float) -> AsyncIterator[Door]:
    sock = socket.create_server(("127.0.0.1", 0))
    made = Door()
    made.port = sock.getsockname()[1]
    server = Server(made.handle, sock, GatewayConfig.model_validate(limits))
    await server.ready()
    try:
        yield made
    finally:
        await server.aclose()


def some(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def post(body: bytes, *, path: str = "/", length: int | None = None, version: str = "1.1", headers: bytes = b"") -> bytes:
    return (
        f"POST {path} HTTP/{version}\r\ncontent-length: {len(body) if length is None else length}\r\n".encode() + headers + b"\r\n" + body
    )


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
    return int(head.split()[1]), await reader.readexactly(length)


def digest(body: bytes) -> tuple[int, bytes]:
    return 200, hashlib.sha256(body).hexdigest().encode()


@pytest.mark.parametrize("seed", range(4))
async def test_requests_of_any_size_in_any_pieces_are_answered_in_their_order(seed: int):
    chance = random.Random(seed)
    bodies = [some(chance.choice(SIZES)) for _ in range(6)]
    stream = b"".join(post(body) for body in bodies)
    async with door() as d:
        reader, writer = await asyncio.open_connection("127.0.0.1", d.port)

        async def send() -> None:
            at = 0
            while at < len(stream):
                size = chance.choice([1, 100, BUFFER_BYTES, 300_000, len(stream)])
                writer.write(stream[at : at + size])
                await writer.drain()
                await asyncio.sleep(0)
                at += size

        sending = asyncio.create_task(send())
        assert [await answer(reader) for _ in bodies] == [digest(body) for body in bodies]
        await sending
        writer.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["http/1.0", "close", "pieces", "expect"])
async def test_bodies_that_the_parser_has_to_end_are_the_same(size: int, how: str):
    body = some(size)
    chunk = 50_000
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in (body[i : i + chunk] for i in range(0, size, chunk))) + b"0\r\n\r\n"
    sent = {
        "http/1.0": post(body, version="1.0"),
        "close": post(body, headers=b"connection: close\r\n"),
        "pieces": b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n" + pieces,
        "expect": post(body, headers=b"expect: 100-continue\r\n"),
    }[how]
    async with door() as d:
        reader, writer = await asyncio.open_connection("127.0.0.1", d.port)
        writer.write(sent)
        if how == "expect" and (got := await answer(reader))[0] != 100:
            assert got == digest(body)
        else:
            assert await answer(reader) == digest(body)
        writer.close()


async def test_a_large_body_that_is_not_wanted_is_dropped_and_the_next_request_is_answered():
    async with door() as d:
        reader, writer = await asyncio.open_connection("127.0.0.1", d.port)
        body = some(2**20)
        writer.write(post(body, path="/unread") + post(body))
        assert [await answer(reader), await answer(reader)] == [digest(b""), digest(body)]
        writer.close()


async def test_a_body_over_the_limit_is_refused_on_its_word():
    async with door() as d:
        reader, writer = await asyncio.open_connection("127.0.0.1", d.port)
        writer.write(post(b"x", length=LIMIT + 1))
        assert (await answer(reader))[0] == 413
        writer.close()


@pytest.mark.parametrize("sent", [1, BUFFER_BYTES + 1, 2**20 + 1])
async def test_a_large_body_that_does_not_go_on_is_a_408_after_a_time(sent: int):
    async with door(body_timeout_s=0.3) as d:
        reader, writer = await asyncio.open_connection("127.0.0.1", d.port)
        writer.write(post(some(sent), length=2 * 2**20))
        assert (await answer(reader))[0] == 408
        assert await reader.read() == b""
        await d.left.wait()
        writer.close()


@pytest.mark.parametrize("how", ["half", "closed", "reset"])
async def test_a_client_that_leaves_in_a_large_body_is_seen_to_leave(how: str):
    async with door() as d:
        reader, writer = await asyncio.open_connection("127.0.0.1", d.port)
        writer.write(post(some(2**20), length=2 * 2**20))
        await writer.drain()
        if how == "half":
            writer.write_eof()
            assert await reader.read() == b""
        elif how == "closed":
            writer.close()
        else:
            writer.transport.abort()
        await d.left.wait()
        writer.close()


async def test_a_body_is_given_room_as_it_comes_and_not_on_its_word():
    class Nobody:
        connection_made = connection_lost = data_received = eof_received = pause_writing = resume_writing = print
        body_received = staticmethod(bool)

    incoming = Incoming(cast(Receiver, Nobody()), memoryview(bytearray(BUFFER_BYTES)))
    size, sent, begun = 5 * 2**20 + 3, some(5 * 2**20 + 3), 1000
    reading = asyncio.create_task(incoming.body(size, sent[:begun]))
    await asyncio.sleep(0)
    at = begun
    while at < size:
        room = incoming.get_buffer(-1)
        assert 0 < len(room) <= max(2**20, at)
        count = min(len(room), 700_000)
        room[:count] = sent[at : at + count]
        del room
        incoming.buffer_updated(count)
        at += count
    assert (at, await reading) == (size, sent)
    assert len(incoming.get_buffer(-1)) == BUFFER_BYTES
