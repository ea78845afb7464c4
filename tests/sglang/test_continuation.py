"""A generation that is cut off on a real SGLang and continued on another one is the generation that nothing cut off."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from model_server import ModelServer, Start, launch_sglang

from rollout_ft.config import EngineConfig, RetryConfig
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.generation import Generation, Order
from rollout_ft.engine.sglang import SGLang
from rollout_ft.errors import EngineLost, EngineRefused
from rollout_ft.types import JSON, VersionSpan

PROMPT = list(range(40, 60))
TOKENS = 200
EOS = 258
VOCAB_SIZE = 263
CONFIG = EngineConfig(kind="sglang", first_token_timeout_s=150, token_timeout_s=60)


@pytest.fixture(scope="session")
def other_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    server = launch_sglang(tiny_model, tmp_path_factory.mktemp("other"), "--incremental-streaming-output")
    yield server
    server.kill()


def made(tokens: int = TOKENS, **sampling: Any) -> Generation:
    asked = {"temperature": 0, "ignore_eos": True, **sampling}
    prompt = ",".join(map(str, PROMPT)).encode()
    stops = frozenset({EOS, *asked.get("stop_token_ids", ())})
    return Generation(Order("key", "request", "", prompt, asked, tokens, 7, stops, VOCAB_SIZE))


async def nothing(generation: Generation) -> JSON | None:
    return None


def at(tokens: int, act: Callable[[], None]) -> Callable[[Generation], Any]:
    """Acts once when a generation has so many tokens."""
    done = False

    async def progress(generation: Generation) -> JSON | None:
        nonlocal done
        if len(generation.ids) >= tokens and not done:
            done = True
            act()
        return None

    return progress


async def run(server: ModelServer, generation: Generation, progress: Callable[[Generation], Any] = nothing) -> Generation:
    engine = SGLang("e", server.url)
    try:
        await Driver(engine, CONFIG).run(generation, progress, time.time())
    finally:
        await engine.aclose()
    return generation


def lose() -> None:
    raise EngineLost("e", "the test says so")


async def cut_and_continued(
    first: ModelServer, second: ModelServer, cut: int, lose: Callable[[], None] = lose, **sampling: Any
) -> Generation:
    """A turn whose first engine is lost after `cut` tokens, as the second one makes it of the partial that was saved."""
    while True:  # on a busy machine all that is left may come at once, and there is nothing to cut
        begun = made(**sampling)
        try:
            await run(first, begun, at(cut, lose))
        except EngineLost:
            break
    assert cut <= len(begun.ids) < TOKENS
    continued = made(**sampling)
    continued.adopt(begun.partial())
    return await run(second, continued)


def same(one: Generation, other: Generation) -> None:
    assert one.ids == other.ids
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert one.finish == other.finish


@pytest.mark.parametrize("cut", [1, pytest.param(60, marks=pytest.mark.smoke), 150])
async def test_an_engine_that_is_killed_in_the_middle_costs_no_token(start_sglang: Start, sglang_server: ModelServer, cut: int):
    uninterrupted = await run(sglang_server, made())
    version = uninterrupted.spans[0].version
    victim = start_sglang("--weight-version", version)
    continued = await cut_and_continued(victim, sglang_server, cut, victim.kill)
    same(continued, uninterrupted)
    assert len(continued.ids) == TOKENS
    assert continued.spans == (VersionSpan(version, 0, TOKENS),)
    assert (continued.calls, continued.wasted, continued.regenerated) == (2, 0, False)
    assert cut <= continued.reused < TOKENS


def ascii_pair(model: Path, ids: list[int]) -> tuple[int, str]:
    """Where two printable characters follow each other for the first time, and which."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    printable = {token: char for char, token in vocabulary.items() if char.isascii() and char.isprintable()}
    for i in range(20, len(ids) - 1):
        pair = printable.get(ids[i], "") + printable.get(ids[i + 1], "")
        if len(pair) == 2 and ids.index(ids[i]) >= 10:
            return i, pair
    raise AssertionError("the model wrote no two printable characters")


async def test_a_stop_string_that_the_break_cut_in_two_still_stops(sglang_server: ModelServer, other_server: ModelServer, tiny_model: Path):
    ids = (await run(sglang_server, made())).ids
    at_token, stop = ascii_pair(tiny_model, ids)
    uninterrupted = await run(sglang_server, made(stop=[stop]))
    assert uninterrupted.finish == "stop"
    begun = made(stop=[stop])
    begun.ids, begun.logprobs = ids[: at_token + 1], uninterrupted.logprobs[: at_token + 1]
    begun.spans, begun.calls = (VersionSpan("default", 0, at_token + 1),), 1
    continued = made(stop=[stop])
    continued.adopt(begun.partial())
    await run(other_server, continued)
    same(continued, uninterrupted)
    assert continued.wasted == 2


@pytest.mark.parametrize(
    ("sampling", "goes_on"),
    [
        ({"regex": "[ab]{120}"}, False),
        ({"json_schema": '{"type": "array", "items": {"type": "integer"}, "minItems": 60}'}, False),
        ({"frequency_penalty": 0.5}, False),
        ({"presence_penalty": -0.5}, False),
        ({"repetition_penalty": 1.2}, False),
        ({"stop_regex": "no such text at all"}, False),
        ({"min_new_tokens": 150, "ignore_eos": False}, True),
        ({"stop": ["no such text at all"]}, True),
        ({"top_k": 5, "top_p": 0.9, "min_p": 0.05}, True),
        ({"logit_bias": {"100": 5.0, "101": -5.0}}, True),
        ({"stop_token_ids": [262], "ignore_eos": False}, True),
    ],
    ids=str,
)
async def test_every_kind_of_request_is_continued_or_made_again_into_the_same(
    sglang_server: ModelServer, other_server: ModelServer, sampling: dict[str, Any], goes_on: bool
):
    uninterrupted = await run(sglang_server, made(**sampling))
    if len(uninterrupted.ids) <= 40:
        pytest.fail(f"too short to be cut: {uninterrupted.finish} after {len(uninterrupted.ids)}")
    continued = await cut_and_continued(sglang_server, other_server, 40, **sampling)
    same(continued, uninterrupted)
    assert (continued.reused > 0) == goes_on
    assert continued.calls == 2


async def test_a_generation_goes_on_after_an_abort_and_after_new_weights(
    sglang_server: ModelServer, other_server: ModelServer, tiny_model: Path
):
    """The abort's own last chunk counts, and each version its own tokens."""
    uninterrupted = await run(other_server, made())
    begun = made()
    engine = SGLang("e", sglang_server.url)
    once = EngineConfig(kind="sglang", retry=RetryConfig(max_refusals_per_turn=1))
    task = asyncio.create_task(Driver(engine, once).run(begun, nothing, time.time()))
    while len(begun.ids) < 40:
        await asyncio.sleep(0.01)
    await engine.abort(begun.rid)
    with pytest.raises(EngineRefused, match="abort"):
        await task
    await engine.aclose()
    had = len(begun.ids)
    async with aiohttp.ClientSession(other_server.url) as http:
        update = {"model_path": str(tiny_model), "weight_version": "next"}
        assert (await http.post("/update_weights_from_disk", json=update)).status == 200
    continued = made()
    continued.adopt(begun.partial())
    await run(other_server, continued)
    same(continued, uninterrupted)
    assert continued.spans == (VersionSpan(begun.spans[0].version, 0, had), VersionSpan("next", had, TOKENS))
