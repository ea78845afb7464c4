"""A pause in every mode, and new weights, with a generation in its middle."""

from __future__ import annotations

import asyncio

import pytest
from asking import LONG, Told, call, in_flight, listen, version, whole
from model_server import ModelServer, Start

from rollout_ft.engine.sglang import SGLang

pytestmark = pytest.mark.timeout(240)

TOKENS = 600
SETTLED_S = 0.5


async def pause(server: ModelServer, mode: str) -> None:
    assert (await call(server.url, "/pause_generation", {"mode": mode}))[0] == 200


async def go_on(server: ModelServer) -> None:
    assert (await call(server.url, "/continue_generation", {}))[0] == 200


async def update(server: ModelServer, name: str, **more: object) -> tuple[int, dict[str, object]]:
    return await call(server.url, "/update_weights_from_disk", {"model_path": str(server.model), "weight_version": name, **more})


async def settled(told: Told) -> int:
    """How many tokens there are once no more come: some are on their way when the engine stands still."""
    while True:
        before = len(told.ids)
        await asyncio.sleep(SETTLED_S)
        if len(told.ids) == before:
            return before


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_a_pause_holds_a_generation_and_changes_nothing_of_it(server: ModelServer, engine: SGLang, mode: str):
    reply = await whole(server.url, TOKENS)
    async with in_flight(engine, TOKENS) as (told, task):
        await pause(server, mode)
        assert not await engine.ready()
        assert await engine.alive()
        held = await settled(told)
        await asyncio.sleep(SETTLED_S)
        assert held == len(told.ids) < TOKENS
        await go_on(server)
        assert await engine.ready()
        await task
    assert told.finish == "length"
    assert told.ids == reply["output_ids"]
    assert told.chunks[-1].recaptured == (mode == "retract")


async def test_a_pause_that_aborts_ends_what_runs_with_its_tokens(server: ModelServer, engine: SGLang):
    async with in_flight(engine) as (told, task):
        await pause(server, "abort")
        assert not await engine.ready()
        await task
    assert told.finish == "abort"
    assert told.ids == (await whole_after(server, len(told.ids)))["output_ids"]


async def whole_after(server: ModelServer, tokens: int) -> dict[str, list[int]]:
    await go_on(server)
    return await whole(server.url, tokens)


@pytest.mark.parametrize("mode", ["in_place", "retract", "abort"])
async def test_what_comes_during_a_pause_waits_and_no_abort_reaches_it(server: ModelServer, engine: SGLang, mode: str):
    await pause(server, mode)
    told = Told()
    task = asyncio.create_task(listen(engine, told, 5))
    await asyncio.sleep(SETTLED_S)
    await engine.abort(told.rid)
    await call(server.url, "/abort_request", {"abort_all": True})
    await asyncio.sleep(SETTLED_S)
    assert not task.done()
    await go_on(server)
    await task
    assert (told.finish, len(told.ids)) == ("length", 5)


async def test_a_client_that_leaves_during_a_pause_leaves_nothing_behind(server: ModelServer, engine: SGLang):
    await pause(server, "in_place")
    task = asyncio.create_task(listen(engine, Told(), LONG))
    await asyncio.sleep(SETTLED_S)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(SETTLED_S)
    await go_on(server)
    assert len((await whole(server.url, 3))["output_ids"]) == 3


async def test_an_abort_of_what_is_frozen_comes_with_the_end_of_the_pause(server: ModelServer, engine: SGLang):
    async with in_flight(engine) as (told, task):
        await pause(server, "in_place")
        await engine.abort(told.rid)
        await asyncio.sleep(SETTLED_S)
        assert not task.done()
        await go_on(server)
        await task
    assert told.finish == "abort"


async def test_an_abort_of_what_was_retracted_ends_it_at_once_and_repeats_no_token(server: ModelServer, engine: SGLang):
    async with in_flight(engine) as (told, task):
        await pause(server, "retract")
        await engine.abort(told.rid)
        await task
        await go_on(server)
    assert told.finish == "abort"
    assert len(told.ids) == len(told.logprobs) >= 20
    assert told.ids == (await whole(server.url, len(told.ids)))["output_ids"]


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_new_weights_in_the_middle_give_two_spans(server: ModelServer, engine: SGLang, mode: str):
    old, new = await version(server.url), f"after {mode}"
    reply = await whole(server.url, TOKENS)
    async with in_flight(engine, TOKENS) as (told, task):
        await pause(server, mode)
        status, answer = await update(server, new, flush_cache=mode == "retract")
        assert (status, answer["success"]) == (200, True)
        await go_on(server)
        await task
    first, second = told.chunks[-1].spans
    assert (first.version, first.start, second.version, second.end) == (old, 0, new, TOKENS)
    assert 20 <= first.end == second.start < TOKENS
    assert told.ids[: first.end] == reply["output_ids"][: first.end]
    assert await version(server.url) == new


async def test_an_update_that_cannot_flush_the_cache_fails_and_took_the_weights(server: ModelServer, engine: SGLang):
    """Its new name marks the tokens from then on, and /model_info goes on telling the old one."""
    old = await version(server.url)
    async with in_flight(engine, TOKENS) as (told, task):
        await pause(server, "in_place")
        status, answer = await update(server, "half")
        assert (status, answer["success"]) == (400, False)
        assert "cache was not flushed" in str(answer["message"])
        assert await version(server.url) == old
        await go_on(server)
        await task
    assert [span.version for span in told.chunks[-1].spans] == [old, "half"]
    await call(server.url, "/update_weight_version", {"new_version": "whole", "abort_all_requests": False})


async def test_an_update_without_a_pause_waits_for_what_runs(server: ModelServer, engine: SGLang):
    old = await version(server.url)
    async with in_flight(engine, TOKENS) as (told, task):
        assert (await update(server, "waited"))[0] == 200
        await task
    (span,) = told.chunks[-1].spans
    assert (span.version, span.end) == (old, TOKENS)
    assert await version(server.url) == "waited"


async def test_a_new_name_aborts_everything_unless_told_not_to(server: ModelServer, engine: SGLang):
    async with in_flight(engine) as (aborted, task):
        assert (await call(server.url, "/update_weight_version", {"new_version": "n1"}))[0] == 200
        await task
    async with in_flight(engine, TOKENS) as (kept, task):
        assert (await call(server.url, "/update_weight_version", {"new_version": "n2", "abort_all_requests": False}))[0] == 200
        await task
    assert (aborted.finish, kept.finish) == ("abort", "length")
    assert [span.version for span in kept.chunks[-1].spans] == ["n1", "n2"]


async def test_a_cache_is_flushed_only_when_nothing_runs(server: ModelServer, engine: SGLang):
    async with in_flight(engine):
        assert (await call(server.url, "/flush_cache"))[0] == 400
        await pause(server, "in_place")
        assert (await call(server.url, "/flush_cache"))[0] == 400
        await pause(server, "retract")
        assert (await call(server.url, "/flush_cache"))[0] == 200
        await go_on(server)


async def test_the_leases_of_an_engine_run_on_in_a_pause(start: Start):
    """Ours stand still in one; SGLang's do not."""
    server = start(env={"SGLANG_REQ_RUNNING_TIMEOUT": "2"})
    engine = SGLang("e0", server.url)
    async with in_flight(engine) as (_, task):
        await pause(server, "in_place")
        await asyncio.sleep(2.5)
        await go_on(server)
        with pytest.raises(Exception, match="running timeout"):
            await task
    await engine.aclose()
