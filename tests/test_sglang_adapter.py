"""The adapter for SGLang's protocol: single events, and a real engine process of the small kind."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ports import free_port

from rollout_ft.engine.port import Chunk
from rollout_ft.engine.sglang import SGLang, _chunk, _events, _joined
from rollout_ft.errors import EngineLost, EngineRefused
from rollout_ft.gateway.asgi import Exchange, Server
from rollout_ft.testing.small_engine.routed import Experts
from rollout_ft.types import VersionSpan

ROOT = Path(__file__).parents[1]
ABORTED = {"type": "abort", "message": "Aborted", "status_code": None}


def event(ids: list[int], completion_tokens: int, finish: Any = None, logprobs: list[float] | None = None, **meta: Any) -> dict[str, Any]:
    triples = [[p, i, None] for p, i in zip(logprobs or [-float(i) for i in ids], ids, strict=True)]
    whole = {"completion_tokens": completion_tokens, "finish_reason": finish, "output_token_logprobs": triples, "weight_version": "v0"}
    return {"output_ids": ids, "meta_info": {**whole, **meta}}


def test_events_that_come_together_are_one_chunk():
    together, error = _joined([event([1, 2], 2), event([3], 3), event([4], 4, {"type": "stop"}), event([9], 9)], 0)
    assert (together.ids, together.logprobs, together.finish, error) == ([1, 2, 3, 4], [-1, -2, -3, -4], "stop", None)


def test_the_tokens_before_an_error_in_the_stream_count():
    together, error = _joined([event([1, 2], 2), {"error": {"message": "KV cache is out of memory", "code": 500}}], 0)
    assert together.ids == [1, 2]
    assert (error and error.status) == 500


def read(*events: dict[str, Any]) -> list[Chunk]:
    chunks: list[Chunk] = []
    for each in events:
        chunks.append(_chunk(each, sum(len(c.ids) for c in chunks)))
    return chunks


# Single events.


@pytest.mark.parametrize(
    "events",
    [
        [event([1, 2], 2), event([1, 2, 3], 3), event([1, 2, 3, 4], 4, {"type": "stop"})],
        [event([1, 2], 2), event([3], 3), event([4], 4, {"type": "stop"})],
        [event([1, 2, 3], 3), event([4], 4), event([], 4, {"type": "stop"})],
    ],
    ids=["cumulative", "incremental", "an empty last one"],
)
def test_chunks_add_up_whether_events_are_cumulative_or_deltas(events: list[dict[str, Any]]):
    chunks = read(*events)
    assert [i for c in chunks for i in c.ids] == [1, 2, 3, 4]
    assert [p for c in chunks for p in c.logprobs] == [-1, -2, -3, -4]
    assert [c.finish for c in chunks] == ["", "", "stop"]


def test_routed_experts_come_with_the_last_chunk_as_they_were_sent():
    chunks = read(event([1, 2], 2, routed_experts="AAAA"), event([3], 3, {"type": "stop"}, routed_experts="BBBB"))
    assert [bytes(c.routed) for c in chunks] == [b"", b"BBBB"]


@pytest.mark.parametrize("sent", [None, 3, [1], {}])
def test_routed_experts_of_any_other_form_are_none(sent: Any):
    (chunk,) = read(event([1], 1, {"type": "stop"}, routed_experts=sent))
    assert chunk.routed == b""


def test_a_request_that_was_retracted_says_so():
    (chunk,) = read(event([1], 1, {"type": "stop"}, num_retractions=1))
    assert chunk.recaptured


def test_an_abort_that_repeats_the_last_id_adds_nothing():
    chunks = read(event([1, 2], 2), event([3], 3), event([3], 3, ABORTED))
    assert [c.ids for c in chunks] == [[1, 2], [3], []]
    assert (chunks[-1].logprobs, chunks[-1].finish) == ([], "abort")


def test_an_abort_that_repeats_everything_adds_only_what_is_new():
    chunks = read(event([1, 2], 2), event([1, 2, 3], 3, ABORTED))
    assert [c.ids for c in chunks] == [[1, 2], [3]]


def test_an_abort_that_leaves_tokens_out_adds_nothing_behind_the_hole():
    chunks = read(event([1, 2], 2), event([5], 5, ABORTED))
    assert [c.ids for c in chunks] == [[1, 2], []]


def test_an_abort_without_a_status_is_a_finish_and_one_with_a_status_an_error():
    assert read(event([1], 1, ABORTED))[0].finish == "abort"
    with pytest.raises(EngineRefused, match="queue is full") as e:
        read(event([], 0, {"type": "abort", "message": "The request queue is full.", "status_code": 503}))
    assert e.value.status == 503


def test_an_error_inside_the_stream_is_an_error():
    with pytest.raises(EngineRefused, match="too long") as e:
        _chunk({"error": {"message": "too long", "code": 400}}, 0)
    assert e.value.status == 400


@pytest.mark.parametrize("error", ["out of memory", {"message": "no code"}])
def test_an_error_of_any_shape_is_an_error(error: Any):
    with pytest.raises(EngineRefused):
        _chunk({"error": error}, 0)


def test_spans_of_weight_versions_are_passed_on():
    spans = [{"version": "v0", "start": 0, "end": 2}, {"version": "v1", "start": 2, "end": 3}]
    assert read(event([1, 2, 3], 3, weight_versions=spans))[0].spans == (VersionSpan("v0", 0, 2), VersionSpan("v1", 2, 3))


def test_without_spans_the_version_of_the_event_covers_all_tokens():
    assert [c.spans for c in read(event([1, 2], 2), event([3], 3))] == [(VersionSpan("v0", 0, 2),), (VersionSpan("v0", 0, 3),)]


# A real engine process.


class Process:
    def __init__(self, *arguments: str):
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "rollout_ft.testing.small_engine", "--model", "hash", "--port", str(port), "--tokens-per-s", "0"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, cwd=ROOT, env=env)
        assert self.process.stdout is not None
        assert b"ready" in self.process.stdout.readline(), "the engine did not start"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module", params=["cumulative", "incremental"])
def server(request: pytest.FixtureRequest) -> Iterator[Process]:
    """Shared by tests: leave it as it was found."""
    process = Process("--stream-interval", "4", *(["--incremental-streaming-output"] if request.param == "incremental" else []))
    yield process
    process.close()


@pytest.fixture
async def engine(server: Process) -> AsyncIterator[SGLang]:
    engine = SGLang("e0", server.url)
    yield engine
    await engine.aclose()


PROMPT = list(range(40, 60))
SAMPLING = {"max_new_tokens": 50, "sampling_seed": 7, "temperature": 1.0, "ignore_eos": True}
PACED = {**SAMPLING, "custom_params": {"tokens_per_s": 400, "from_token": 0}}
SLOW = {**SAMPLING, "custom_params": {"tokens_per_s": 0.1, "from_token": 8}}
"""Eight tokens at once, and no other for as long as a test may take."""


async def reference(url: str, sampling: dict[str, Any] = SAMPLING) -> dict[str, Any]:
    """The same generation, asked for without this adapter and without a stream."""
    body = {"input_ids": PROMPT, "sampling_params": sampling, "return_logprob": True}
    async with aiohttp.ClientSession() as http, http.post(f"{url}/generate", json=body) as response:
        assert response.status == 200
        return orjson.loads(await response.read())


def ask(engine: SGLang, sampling: dict[str, Any] = SAMPLING, prompt: list[int] = PROMPT, rid: str = "") -> AsyncIterator[Chunk]:
    return engine.generate(rid or uuid.uuid4().hex, orjson.dumps(prompt)[1:-1], sampling)


async def until_idle(url: str) -> None:
    async with aiohttp.ClientSession() as http, asyncio.timeout(20):
        while True:
            async with http.get(f"{url}/v1/loads") as response:
                load = orjson.loads(await response.read())["loads"][0]
            if not load["num_running_reqs"]:
                return
            await asyncio.sleep(0.01)


async def test_a_stream_is_the_generation_without_a_stream(server: Process, engine: SGLang):
    whole = await reference(server.url)
    chunks = [c async for c in ask(engine, PACED)]
    assert len(chunks) > 2
    assert [i for c in chunks for i in c.ids] == whole["output_ids"]
    assert [p for c in chunks for p in c.logprobs] == [t[0] for t in whole["meta_info"]["output_token_logprobs"]]
    assert [c.finish for c in chunks] == [""] * (len(chunks) - 1) + ["length"]
    assert chunks[-1].spans == (VersionSpan("v0", 0, 50),)


@pytest.mark.parametrize("start", [0, 7, 20])
async def test_routed_experts_are_those_of_all_tokens_but_the_last_from_where_they_are_wanted(start: int):
    process = await asyncio.to_thread(Process, "--routed-experts", "2,2,64")
    engine = SGLang("e0", process.url)
    try:
        chunks = [c async for c in engine.generate(uuid.uuid4().hex, orjson.dumps(PROMPT)[1:-1], SAMPLING, start)]
        ids = np.array([*PROMPT, *(i for c in chunks for i in c.ids)], np.int32)
        rows = np.frombuffer(base64.b64decode(bytes(chunks[-1].routed)), "<i4").reshape(-1, 2, 2)
        assert np.array_equal(rows, Experts(2, 2, 64).rows(ids)[start:-1])
        assert not any(len(c.routed) for c in chunks[:-1])
        with pytest.raises(EngineRefused, match="routed_experts_start_len"):
            [c async for c in engine.generate(uuid.uuid4().hex, orjson.dumps(PROMPT)[1:-1], SAMPLING, 21)]
    finally:
        await engine.aclose()
        process.close()


async def test_an_engine_that_has_no_routed_experts_sends_none(engine: SGLang):
    chunks = [c async for c in engine.generate(uuid.uuid4().hex, orjson.dumps(PROMPT)[1:-1], SAMPLING, 0)]
    assert not len(chunks[-1].routed)


async def test_a_generation_that_stops_by_itself_says_so(server: Process, engine: SGLang):
    sampling = {**SAMPLING, "ignore_eos": False, "stop_token_ids": [(await reference(server.url))["output_ids"][20]]}
    whole = await reference(server.url, sampling)
    chunks = [c async for c in ask(engine, sampling)]
    assert chunks[-1].finish == "stop"
    assert [i for c in chunks for i in c.ids] == whole["output_ids"]


async def test_an_aborted_generation_ends_with_what_it_had(server: Process, engine: SGLang):
    chunks: list[Chunk] = []
    async for chunk in ask(engine, SLOW, rid="to-abort"):
        chunks.append(chunk)
        if sum(len(c.ids) for c in chunks) == 8:
            await engine.abort("to-abort")
    ids = [i for c in chunks for i in c.ids]
    assert chunks[-1].finish == "abort"
    assert ids == (await reference(server.url))["output_ids"][: len(ids)]
    assert 8 <= len(ids) <= 10
    assert sum(len(c.logprobs) for c in chunks) == len(ids)


async def test_a_stream_that_is_closed_early_ends_the_generation_at_the_engine(server: Process, engine: SGLang):
    stream = ask(engine, SLOW)
    await anext(stream)
    await stream.aclose()  # type: ignore[attr-defined]
    await until_idle(server.url)


@pytest.mark.parametrize(
    ("prompt", "sampling"),
    [
        (PROMPT, {**SAMPLING, "no_such_key": 1}),
        (PROMPT, {**SAMPLING, "temperature": -1}),
        (PROMPT, {**SAMPLING, "max_new_tokens": 10**9}),
        ([40] * 40_000, SAMPLING),
    ],
    ids=["schema", "value", "limit", "context"],
)
async def test_a_request_that_is_wrong_is_refused_with_400(engine: SGLang, prompt: list[int], sampling: dict[str, Any]):
    with pytest.raises(EngineRefused) as e:
        await anext(ask(engine, sampling, prompt))
    assert e.value.status == 400
    assert e.value.message


async def test_a_rid_that_is_in_use_is_refused(engine: SGLang):
    first = ask(engine, SLOW, rid="twice")
    await anext(first)
    with pytest.raises(EngineRefused, match="twice"):
        await anext(ask(engine, rid="twice"))
    await first.aclose()  # type: ignore[attr-defined]


async def test_an_engine_that_serves_is_ready_and_names_its_weights(engine: SGLang):
    assert await engine.ready()
    assert (await engine.info()).weight_version == "v0"


async def test_aborting_what_is_not_there_is_nothing(engine: SGLang):
    await engine.abort("nobody")
    assert await engine.ready()


async def test_an_engine_killed_in_mid_generation_is_lost():
    process = await asyncio.to_thread(Process)
    engine = SGLang("e7", process.url)
    try:
        stream = ask(engine, SLOW)
        await anext(stream)
        process.process.send_signal(signal.SIGKILL)
        with pytest.raises(EngineLost) as e:
            [c async for c in stream]
        assert e.value.engine_id == "e7"
        assert not await engine.ready()
        with pytest.raises(EngineLost):
            await engine.info()
        with pytest.raises(EngineLost):
            await anext(ask(engine))
        await engine.abort("x")
    finally:
        await engine.aclose()
        process.close()


# An engine that says what no engine should.


@contextlib.asynccontextmanager
async def saying(body: bytes, status: int = 200, *, cut: bool = False) -> AsyncIterator[SGLang]:
    async def handle(x: Exchange) -> None:
        if x.method == "POST":
            await x.body(1 << 20)
        if cut:
            await x.send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % (len(body) + 5))]})
            await x.send({"type": "http.response.body", "body": body, "more_body": True})
        else:
            await x.reply(status, body, content=b"text/event-stream")

    sock = socket.create_server(("127.0.0.1", 0))
    server = Server(handle, sock)
    engine = SGLang("e0", f"http://127.0.0.1:{sock.getsockname()[1]}")
    await server.ready()
    try:
        yield engine
    finally:
        await engine.aclose()
        await server.aclose()


@given(data=st.data(), count=st.integers(1, 4))
def test_events_are_the_same_however_their_bytes_come(data: st.DataObject, count: int):
    whole = b"".join(b"data: %d\n\n" % n for n in range(count)) + b"data: [DONE]\n\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    parts = [whole[a:b] for a, b in itertools.pairwise([0, *cuts, len(whole)])]

    class Content:
        async def iter_any(self) -> AsyncIterator[bytes]:
            for part in parts:
                yield part

    async def read() -> list[Any]:
        return [event async for events in _events(cast(Any, Content())) for event in events]

    assert asyncio.run(read()) == list(range(count))


@pytest.mark.parametrize("kind", ["large", "small", "spaced"])
async def test_an_event_of_any_size_is_read_and_its_routed_experts_with_it(kind: str):
    routed = base64.b64encode(bytes(3 * (100 if kind == "small" else 2_000_000)))
    text = '"routed_experts":"' + "\\" + "\n" * 3
    body = orjson.dumps({**event([1, 2], 2, {"type": "stop"}, routed_experts=routed.decode()), "text": text})
    if kind == "spaced":
        body = body.replace(b'"routed_experts":"', b'"routed_experts": "')
    async with saying(b"data: " + body + b"\n\ndata: [DONE]\n\n") as engine:
        (chunk,) = [c async for c in ask(engine)]
    assert (chunk.ids, chunk.finish, bytes(chunk.routed) == routed) == ([1, 2], "stop", True)


GOOD = b"data: " + orjson.dumps(event([1, 2], 2)) + b"\n\n"
ERRORS = (EngineLost, EngineRefused)


@pytest.mark.parametrize("body", [GOOD, GOOD + b"data: [DONE]\n\n", GOOD + GOOD[:30], b""], ids=["end", "done", "half an event", "nothing"])
async def test_a_stream_that_ends_without_a_finish_is_a_lost_engine(body: bytes):
    async with saying(body) as engine:
        with pytest.raises(EngineLost, match="without a finish"):
            [c async for c in ask(engine)]


async def test_a_stream_that_breaks_off_is_a_lost_engine():
    async with saying(GOOD, cut=True) as engine:
        with pytest.raises(EngineLost):
            [c async for c in ask(engine)]


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
async def test_a_refusal_keeps_its_status_and_its_words(status: int):
    async with saying(b"because", status) as engine:
        with pytest.raises(EngineRefused, match="because") as e:
            [c async for c in ask(engine)]
    assert e.value.status == status


@pytest.mark.parametrize("body", [b"not json", b"3", b"{}"])
async def test_an_event_that_makes_no_sense_is_the_engines_fault_and_nobody_elses(body: bytes):
    async with saying(b"data: " + body + b"\n\n") as engine:
        with pytest.raises(ERRORS):
            [c async for c in ask(engine)]


async def test_an_engine_that_answers_nonsense_about_itself_is_lost():
    async with saying(b"<html>") as engine:
        with pytest.raises(EngineLost):
            await engine.info()


@pytest.mark.parametrize(("status", "ready"), [(200, True), (503, False), (404, False)])
async def test_ready_is_what_the_engine_says(status: int, ready: bool):
    async with saying(b"", status) as engine:
        assert await engine.ready() is ready
