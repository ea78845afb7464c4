"""A line between two processes, over real sockets."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct

import pytest

from rollout_ft.line import BUFFER_BYTES, TOKEN_BYTES, CallFailed, Door, Line, LineBroken, NobodyThere, serve

TOKEN = bytes(range(TOKEN_BYTES))
SAY = 1


class Echo:
    """Answers with what it got; `gates` hold back the answers to some payloads."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.gates: dict[bytes, asyncio.Event] = {}
        self.left: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def answer(self, what: int, argument: int, raw: bytearray) -> bytes:
        payload = bytes(raw)
        self.seen.append(payload)
        try:
            if payload in self.gates:
                await self.gates[payload].wait()
        except asyncio.CancelledError:
            self.left.set_result(payload)
            raise
        if payload == b"bad":
            raise ValueError("cannot be read")
        return b"%d:" % argument + payload


async def opened(echo: Echo, *, cancels: bool = False) -> Door:
    sock = socket.create_server(("127.0.0.1", 0))
    await serve(echo.answer, sock, TOKEN, cancels=cancels)
    return Door("127.0.0.1", sock.getsockname()[1], TOKEN)


async def test_a_call_is_answered_with_what_the_store_said() -> None:
    line = await Line.to(await opened(Echo()))
    assert await line.call(SAY, 7, b"x" * 300_000) == b"7:" + b"x" * 300_000
    line.close()


async def test_answers_may_overtake_each_other_and_still_find_their_call() -> None:
    echo = Echo()
    echo.gates[b"slow"] = asyncio.Event()
    line = await Line.to(await opened(echo))
    slow, fast = line.call(SAY, 1, b"slow"), line.call(SAY, 1, b"fast")
    assert await fast == b"1:fast"
    echo.gates[b"slow"].set()
    assert await slow == b"1:slow"
    assert echo.seen == [b"slow", b"fast"]
    line.close()


async def test_a_call_that_fails_at_the_other_end_leaves_the_line_open() -> None:
    line = await Line.to(await opened(Echo()))
    with pytest.raises(CallFailed, match="cannot be read"):
        await line.call(SAY, 1, b"bad")
    assert await line.call(SAY, 1, b"good") == b"1:good"
    line.close()


async def test_every_call_of_a_line_that_breaks_is_in_doubt() -> None:
    echo = Echo()
    echo.gates[b"slow"] = asyncio.Event()
    line = await Line.to(await opened(echo))
    waiting = line.call(SAY, 1, b"slow")
    line.close()
    with pytest.raises(LineBroken, match="broke"):
        await waiting
    assert not line.open
    with pytest.raises(LineBroken, match="closed"):
        await line.call(SAY, 1, b"later")


async def test_nobody_gets_in_with_another_token() -> None:
    echo = Echo()
    door = await opened(echo)
    line = await Line.to(dataclasses.replace(door, token=bytes(TOKEN_BYTES)))
    with pytest.raises(LineBroken):
        await line.call(SAY, 1, b"x")
    assert echo.seen == []


async def test_an_end_that_is_not_there_carries_nothing_out() -> None:
    with pytest.raises(NobodyThere, match=r"127\.0\.0\.1:1"):
        await Line.to(Door("127.0.0.1", 1, bytes(TOKEN_BYTES)))


@pytest.mark.parametrize("piece", [1, 5, 16, 1000])
async def test_frames_are_whole_however_they_arrive(piece: int) -> None:
    echo = Echo()
    door = await opened(echo)
    reader, writer = await asyncio.open_connection(door.host, door.port)
    frame = struct.pack("<IIBq", 5, 1, SAY, 3) + b"hello"
    data = door.token + frame + frame
    for at in range(0, len(data), piece):
        writer.write(data[at : at + piece])
        await writer.drain()
    answer = struct.pack("<IIBq", 7, 1, SAY, 3) + b"3:hello"
    assert await reader.readexactly(2 * len(answer)) == answer + answer
    writer.close()


@pytest.mark.parametrize("piece", [1000, 65_536, 100_000])
async def test_frames_of_all_sizes_are_whole_in_whatever_pieces_they_arrive(piece: int) -> None:
    echo = Echo()
    door = await opened(echo)
    sizes = [0, 5, BUFFER_BYTES - 18, BUFFER_BYTES - 17, BUFFER_BYTES - 16, BUFFER_BYTES, 3 * BUFFER_BYTES, 1]
    sent = [bytes([65 + i]) * size for i, size in enumerate(sizes)]
    data = door.token + b"".join(struct.pack("<IIBq", len(p), i + 1, SAY, 3) + p for i, p in enumerate(sent))
    reader, writer = await asyncio.open_connection(door.host, door.port)
    for at in range(0, len(data), piece):
        writer.write(data[at : at + piece])
        await asyncio.sleep(0)
    for payload in sent:
        _, _, _, argument = struct.unpack("<IIBq", await reader.readexactly(17))
        assert await reader.readexactly(2 + len(payload)) == b"%d:" % argument + payload
    assert echo.seen == sent
    writer.close()


async def test_a_frame_that_claims_to_be_endless_closes_the_line() -> None:
    door = await opened(Echo())
    reader, writer = await asyncio.open_connection(door.host, door.port)
    writer.write(door.token + struct.pack("<IIBq", 2**32 - 1, 1, SAY, 1))
    assert await reader.read() == b""
    writer.close()


async def test_a_call_that_nobody_waits_for_any_more_ends_where_that_is_wanted() -> None:
    echo = Echo()
    echo.gates[b"slow"] = asyncio.Event()
    line = await Line.to(await opened(echo, cancels=True))
    slow = line.call(SAY, 1, b"slow")
    assert await line.call(SAY, 1, b"fast") == b"1:fast"
    slow.cancel()
    assert await echo.left == b"slow"
    line.close()


async def test_all_calls_of_a_broken_line_end_where_that_is_wanted() -> None:
    echo = Echo()
    echo.gates[b"slow"] = asyncio.Event()
    line = await Line.to(await opened(echo, cancels=True))
    slow = line.call(SAY, 1, b"slow")
    await line.call(SAY, 1, b"fast")
    line.close()
    assert await echo.left == b"slow"
    with pytest.raises(LineBroken):
        await slow


async def test_a_call_goes_on_without_its_caller_where_nothing_else_is_wanted() -> None:
    echo = Echo()
    echo.gates[b"slow"] = asyncio.Event()
    door = await opened(echo)
    line = await Line.to(door)
    line.call(SAY, 1, b"slow").cancel()
    await line.call(SAY, 1, b"fast")
    echo.gates[b"slow"].set()
    await line.call(SAY, 1, b"later")
    assert not echo.left.done()
    line.close()


async def test_what_is_told_arrives_before_the_next_call() -> None:
    echo = Echo()
    line = await Line.to(await opened(echo))
    line.tell(SAY, 1, b"told")
    await line.call(SAY, 1, b"called")
    assert echo.seen == [b"told", b"called"]
    line.close()


async def test_what_is_too_large_for_a_line_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_ft.line.MAX_FRAME_BYTES", 100)
    line = await Line.to(await opened(Echo()))
    for large in (b"x" * 101, b"x" * 99):  # the call itself; its answer, which is longer
        with pytest.raises(CallFailed, match=r"does not go over|do not go over"):
            await line.call(SAY, 1, large)
    assert await line.call(SAY, 1, b"small") == b"1:small"
    line.close()
