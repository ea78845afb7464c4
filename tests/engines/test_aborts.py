"""How a generation ends before its end: aborted, left by its client, out of time, or never begun."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from asking import JSON, LONG, Told, body, call, in_flight, listen, load, logprobs, until, until_idle, whole
from model_server import ModelServer, Start

from rollout_ft.engine.sglang import SGLang
from rollout_ft.errors import EngineRefused

pytestmark = pytest.mark.timeout(240)


@pytest.mark.smoke
async def test_an_abort_ends_a_stream_with_the_tokens_it_has(server: ModelServer, engine: SGLang):
    async with in_flight(engine) as (told, task):
        await engine.abort(told.rid)
        await task
    assert told.finish == "abort"
    assert 20 <= len(told.ids) < LONG
    reply = await whole(server.url, len(told.ids))
    assert told.ids == reply["output_ids"]
    assert told.logprobs == pytest.approx(logprobs(reply), abs=1e-4)
    assert told.chunks[-1].spans[-1].end == len(told.ids)


async def test_an_abort_ends_a_plain_call_with_the_tokens_it_has(server: ModelServer, engine: SGLang):
    task = asyncio.create_task(call(server.url, "/generate", body(LONG, rid="plain")))
    await until(lambda: running(server, 1))
    await engine.abort("plain")
    status, reply = await task
    finish = reply["meta_info"]["finish_reason"]
    assert (status, finish["type"], finish.get("status_code")) == (200, "abort", None)
    assert len(reply["output_ids"]) == reply["meta_info"]["completion_tokens"] == len(logprobs(reply)) < LONG


async def test_an_abort_of_nobody_changes_nothing(engine: SGLang, server: ModelServer):
    async with in_flight(engine) as (told, task):
        await engine.abort("nobody")
        await engine.abort(told.rid[:8])
        await engine.abort("")
        seen = len(told.ids)
        await told.has(seen + 20)
        assert not task.done()


async def test_an_abort_of_all_ends_all(server: ModelServer, engine: SGLang):
    async with in_flight(engine) as (one, first), in_flight(engine) as (other, second):
        assert (await call(server.url, "/abort_request", {"abort_all": True}))[0] == 200
        await asyncio.gather(first, second)
    assert (one.finish, other.finish) == ("abort", "abort")


@pytest.mark.parametrize("sent", [{"rid": 5}, None], ids=str)
async def test_an_abort_that_is_none_is_400(server: ModelServer, sent: JSON | None):
    assert (await call(server.url, "/abort_request", sent))[0] == 400


@pytest.fixture
async def narrow_engine(narrow: ModelServer):
    adapter = SGLang("e1", narrow.url)
    yield adapter
    await adapter.aclose()


async def test_an_abort_in_the_queue_ends_a_generation_that_never_began(narrow: ModelServer, narrow_engine: SGLang):
    async with in_flight(narrow_engine) as (_, runs):
        queued = Told()
        task = asyncio.create_task(listen(narrow_engine, queued, LONG))
        await until(lambda: waiting(narrow, 1))
        await narrow_engine.abort(queued.rid)
        await task
        assert not runs.done()
    assert (queued.finish, queued.ids) == ("abort", [])


async def test_a_full_queue_is_503_as_a_status_and_inside_a_stream(narrow: ModelServer, narrow_engine: SGLang):
    async with in_flight(narrow_engine):
        queued = asyncio.create_task(listen(narrow_engine, Told(), LONG))
        await until(lambda: waiting(narrow, 1))
        status, reply = await call(narrow.url, "/generate", body(3))
        with pytest.raises(EngineRefused, match="queue is full") as e:
            await listen(narrow_engine, Told(), 3)
        queued.cancel()
        await asyncio.gather(queued, return_exceptions=True)
    assert e.value.status == 503
    assert (status, reply["message"], reply["code"]) == (503, "The request queue is full.", 503)


async def test_a_duplicate_rid_is_refused_and_ends_the_first_two_seconds_later(server: ModelServer, engine: SGLang):
    async with in_flight(engine) as (told, task):
        status, reply = await call(server.url, "/generate", body(3, rid=told.rid))
        assert (status, reply["error"]["message"]) == (400, f"Duplicate request ID detected: {told.rid}")
        seen = len(told.ids)
        await told.has(seen + 20)
        with pytest.raises(EngineRefused, match="Duplicate") as e:
            await listen(engine, Told(told.rid), 3)
        assert e.value.status == 400
        await task
    assert told.finish == "abort"


async def test_a_stream_that_is_left_ends_at_the_engine(server: ModelServer, engine: SGLang):
    async with in_flight(engine):
        pass
    async with asyncio.timeout(3):
        await until_idle(server.url)


async def test_a_plain_call_that_is_left_ends_at_the_engine_some_seconds_later(server: ModelServer):
    async with aiohttp.ClientSession() as http:
        task = asyncio.create_task(http.post(server.url + "/generate", json=body(LONG)))
        await until(lambda: running(server, 1))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    async with asyncio.timeout(8):
        await until_idle(server.url)


async def test_the_engines_own_leases_end_what_waits_or_runs_for_too_long(start: Start):
    leases = {"SGLANG_REQ_WAITING_TIMEOUT": "1", "SGLANG_REQ_RUNNING_TIMEOUT": "3"}
    server = start("--max-running-requests", "1", env=leases)
    engine = SGLang("e0", server.url)
    runs = asyncio.create_task(listen(engine, told := Told(), LONG))
    await told.has(1)
    with pytest.raises(EngineRefused, match="waiting timeout") as waited:
        await listen(engine, Told(), 3)
    with pytest.raises(EngineRefused, match="running timeout") as ran:
        await runs
    await engine.aclose()
    assert (waited.value.status, ran.value.status) == (503, 503)
    assert told.ids


async def running(server: ModelServer, count: int) -> bool:
    return (await load(server.url))["num_running_reqs"] == count


async def waiting(server: ModelServer, count: int) -> bool:
    return (await load(server.url))["num_waiting_reqs"] == count
