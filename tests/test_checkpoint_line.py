"""The line between a writer and a store, over real sockets."""

from __future__ import annotations

import asyncio
import dataclasses
import struct

import pytest

from rollout_ft.checkpoint.line import TOKEN_BYTES, Call, Door, Line, serve
from rollout_ft.errors import StoreUnavailable


class Echo:
    """Answers with what it got; `gates` hold back the answers to some batches."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.gates: dict[bytes, asyncio.Event] = {}

    async def append_many(self, view_number: int, batch: bytes) -> bytes:
        self.seen.append(batch)
        if batch in self.gates:
            await self.gates[batch].wait()
        if batch == b"bad":
            raise ValueError("cannot be read")
        return b"%d:" % view_number + batch

    async def put_partials(self, view_number: int, batch: bytes) -> int:
        return len(batch)


async def test_a_call_is_answered_with_what_the_store_said() -> None:
    line = await Line.to(await serve(Echo(), "127.0.0.1"))
    assert await line.call(Call.APPEND, 7, b"x" * 300_000) == b"7:" + b"x" * 300_000
    assert await line.call(Call.PARTIALS, 7, b"four") == b"4"
    line.close()


async def test_answers_may_overtake_each_other_and_still_find_their_call() -> None:
    store = Echo()
    store.gates[b"slow"] = asyncio.Event()
    line = await Line.to(await serve(store, "127.0.0.1"))
    slow, fast = line.call(Call.APPEND, 1, b"slow"), line.call(Call.APPEND, 1, b"fast")
    assert await fast == b"1:fast"
    store.gates[b"slow"].set()
    assert await slow == b"1:slow"
    assert store.seen == [b"slow", b"fast"]
    line.close()


async def test_a_call_that_fails_in_the_store_is_in_doubt_and_leaves_the_line_open() -> None:
    line = await Line.to(await serve(Echo(), "127.0.0.1"))
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        await line.call(Call.APPEND, 1, b"bad")
    assert await line.call(Call.APPEND, 1, b"good") == b"1:good"
    line.close()


async def test_every_call_of_a_line_that_breaks_is_in_doubt() -> None:
    store = Echo()
    store.gates[b"slow"] = asyncio.Event()
    line = await Line.to(await serve(store, "127.0.0.1"))
    waiting = line.call(Call.APPEND, 1, b"slow")
    line.close()
    with pytest.raises(StoreUnavailable, match="broke"):
        await waiting
    assert not line.open
    with pytest.raises(StoreUnavailable, match="closed"):
        await line.call(Call.APPEND, 1, b"later")


async def test_nobody_gets_in_with_another_token() -> None:
    store = Echo()
    door = await serve(store, "127.0.0.1")
    line = await Line.to(dataclasses.replace(door, token=bytes(TOKEN_BYTES)))
    with pytest.raises(StoreUnavailable):
        await line.call(Call.APPEND, 1, b"x")
    assert store.seen == []


async def test_a_store_that_is_not_there_is_unavailable() -> None:
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        await Line.to(Door("127.0.0.1", 1, bytes(TOKEN_BYTES)))


@pytest.mark.parametrize("piece", [1, 5, 16, 1000])
async def test_frames_are_whole_however_they_arrive(piece: int) -> None:
    store = Echo()
    door = await serve(store, "127.0.0.1")
    reader, writer = await asyncio.open_connection(door.host, door.port)
    frame = struct.pack("<IIBq", 5, 1, Call.APPEND, 3) + b"hello"
    data = door.token + frame + frame
    for at in range(0, len(data), piece):
        writer.write(data[at : at + piece])
        await writer.drain()
    answer = struct.pack("<IIBq", 7, 1, Call.APPEND, 3) + b"3:hello"
    assert await reader.readexactly(2 * len(answer)) == answer + answer
    writer.close()


async def test_a_frame_that_claims_to_be_endless_closes_the_line() -> None:
    door = await serve(Echo(), "127.0.0.1")
    reader, writer = await asyncio.open_connection(door.host, door.port)
    writer.write(door.token + struct.pack("<IIBq", 2**32 - 1, 1, Call.APPEND, 1))
    assert await reader.read() == b""
    writer.close()
