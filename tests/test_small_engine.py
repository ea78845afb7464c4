"""The small engines: what a test, a demo or a benchmark may rely on, shown on real server processes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ports import free_port
from safetensors.torch import save_file
from transformers import AutoTokenizer

from rollout_ft.testing.small_engine import MODEL_DIR
from rollout_ft.testing.small_engine.model import Sampling
from rollout_ft.testing.small_engine.prefix_cache import PrefixCache
from rollout_ft.testing.small_engine.prior import Prior
from rollout_ft.testing.small_engine.sampling import choose
from rollout_ft.testing.small_engine.tokenizer import write_model_dir
from rollout_ft.testing.small_engine.transformer import Sequence, Transformer, make_weights
from rollout_ft.testing.small_engine.vocabulary import load_vocabulary

pytestmark = pytest.mark.timeout(60)

JSON = dict[str, Any]
ROOT = Path(__file__).parents[1]
VOCABULARY = load_vocabulary(MODEL_DIR)
MODELS = ["transformer", "hash"]


@dataclass
class Server:
    """A small engine in a process of its own."""

    process: subprocess.Popen[str]
    ports: list[int]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    async def post(self, path: str, body: JSON | None = None, port: int = 0) -> tuple[int, Any]:
        url = f"http://127.0.0.1:{self.ports[port]}{path}"
        async with aiohttp.ClientSession() as session, session.post(url, json=body or {}) as response:
            return response.status, parsed(await response.read())

    async def get(self, path: str, port: int = 0) -> tuple[int, Any]:
        url = f"http://127.0.0.1:{self.ports[port]}{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status, parsed(await response.read())

    async def generate(self, prompt: list[int], port: int = 0, **changes: Any) -> JSON:
        status, reply = await self.post("/generate", generate_body(prompt, **changes), port)
        assert status == 200, reply
        return reply

    async def stream(self, prompt: list[int], **changes: Any) -> AsyncIterator[JSON]:
        """Chunks up to `[DONE]`."""
        async with aiohttp.ClientSession() as session:
            body = generate_body(prompt, stream=True, **changes)
            async with session.post(self.url + "/generate", json=body) as response:
                assert response.status == 200
                async for line in response.content:
                    if line == b"data: [DONE]\n":
                        return
                    if line.startswith(b"data: "):
                        yield json.loads(line.removeprefix(b"data: "))

    async def load(self) -> JSON:
        return (await self.get("/v1/loads"))[1]["loads"][0]


def parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw) if raw else None
    except json.JSONDecodeError:
        return raw.decode()


def generate_body(prompt: list[int], **changes: Any) -> JSON:
    """A request whose top-level fields and sampling parameters `changes` names alike."""
    named = ("rid", "stream", "return_logprob", "return_routed_experts", "routed_experts_start_len")
    top = {key: changes.pop(key) for key in named if key in changes}
    sampling = {"max_new_tokens": 40, "sampling_seed": 7, "temperature": 1.0, "ignore_eos": True} | changes
    return {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True} | top


@contextlib.contextmanager
def start(*arguments: str, model: str = "hash", engines: int = 1, pace: float = 0) -> Iterator[Server]:
    ports = [free_port() for _ in range(engines)]
    command = [sys.executable, "-m", "rollout_ft.testing.small_engine", "--model", model, *arguments]
    command += ["--port", ",".join(map(str, ports)), "--tokens-per-s", str(pace)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert process.stdout is not None
    try:
        assert "ready" in process.stdout.readline(), "the engine did not start"
        yield Server(process, ports)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def transformer_server() -> Iterator[Server]:
    with start(model="transformer") as server:
        yield server


@pytest.fixture(scope="module")
def hash_server() -> Iterator[Server]:
    with start() as server:
        yield server


@pytest.fixture(params=MODELS)
def server(request: pytest.FixtureRequest) -> Server:
    """Either model, as fast as it goes. Shared by tests: leave it as it was found."""
    return request.getfixturevalue(f"{request.param}_server")


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask until it holds; the test's time limit is the limit."""
    while not await condition():
        await asyncio.sleep(0.005)


def logprobs(reply: JSON) -> list[float]:
    return [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]


def ids(text: str) -> list[int]:
    return VOCABULARY.encode(text)


QUESTION = ids("<|im_start|>user\nWho built the bridge?<|im_end|>\n<|im_start|>assistant\n")
AGENT = ids("<|im_start|>system\n<tools>\n{}\n</tools><|im_end|>\n") + QUESTION


# The same tokens, however they are computed.


@cache
def transformer() -> Transformer:
    model = Transformer(VOCABULARY)
    model.load("v0")
    return model


def open_sequence(prompt: list[int], seed: int = 1) -> Sequence:
    return transformer().start(np.array(prompt, dtype=np.int32), Sampling(1.0, 1.0, -1, 0.0, seed, True, frozenset()))


def some_ids(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(VOCABULARY.printable, k=count)


def rows_of(sequence: Sequence) -> bytes:
    rows = sequence._rows
    return b"".join(array[: rows.computed].tobytes() for _, array in rows.layers)


def distribution(sequence: Sequence) -> bytes:
    """The bits of the distribution after the prompt."""
    assert sequence.prefill(1 << 30)
    with torch.inference_mode():
        x = sequence._compute()
        return transformer().logprobs(x, sequence._state, 1.0, frozenset()).tobytes()


def test_a_position_has_the_same_bits_in_prefill_and_in_decode() -> None:
    transformer().forget()
    decoded = open_sequence(some_ids(5))
    decoded.prefill(1 << 30)
    tokens = some_ids(5) + decoded.sample(700, frozenset())[0]
    transformer().forget()
    prefilled = open_sequence(tokens)
    prefilled.prefill(1 << 30)
    assert rows_of(prefilled) == rows_of(decoded)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 64, 513])
def test_a_position_has_the_same_bits_whatever_the_chunks_of_its_prefill_and_whatever_runs_beside(length: int) -> None:
    transformer().forget()
    alone = distribution(open_sequence(some_ids(length)))
    transformer().forget()
    chunked, other = open_sequence(some_ids(length)), open_sequence(some_ids(300, seed=1))
    other.prefill(100)
    while not chunked.prefill(3):
        other.prefill(7)
    assert distribution(chunked) == alone


@pytest.mark.parametrize("shared", [1, 16, 63, 64, 299])
def test_a_position_has_the_same_bits_when_its_prefix_came_from_the_cache(shared: int) -> None:
    prompt = some_ids(300)
    transformer().forget()
    alone = distribution(open_sequence(prompt))
    transformer().forget()
    first = open_sequence(prompt[:shared] + some_ids(50, seed=2))
    first.prefill(1 << 30)
    first.close()
    second = open_sequence(prompt)
    assert second.cached_tokens >= shared
    assert distribution(second) == alone


def test_the_prefix_cache_keeps_to_its_limit_and_drops_what_was_used_least_recently() -> None:
    cache = PrefixCache(max_tokens=1024)
    sequences = [open_sequence(some_ids(100, seed=seed))._rows for seed in (11, 12, 13)]
    for rows in sequences:
        rows.computed = 100
        cache.finish(rows, keep=True)
    found = [cache.fill(open_sequence(some_ids(100, seed=seed))._rows, 99) for seed in (11, 12, 13)]
    assert found[0] < 99
    assert found[1:] == [99, 99]


async def test_a_generation_is_the_same_beside_many_others(server: Server) -> None:
    alone = await server.generate(QUESTION)
    others = [server.generate(some_ids(30, seed=seed), sampling_seed=seed) for seed in range(12)]
    among, *_ = await asyncio.gather(server.generate(QUESTION), *others)
    assert (among["output_ids"], logprobs(among)) == (alone["output_ids"], logprobs(alone))


@pytest.mark.parametrize("cut", [1, 2, 17, 59])
async def test_a_continuation_is_the_uninterrupted_generation_token_for_token(server: Server, cut: int) -> None:
    whole = await server.generate(AGENT, max_new_tokens=60)
    await server.post("/flush_cache")
    done = whole["output_ids"][:cut]
    rest = await server.generate(AGENT + done, max_new_tokens=60 - cut)
    assert done + rest["output_ids"] == whole["output_ids"]
    assert logprobs(whole)[:cut] + logprobs(rest) == logprobs(whole)


@pytest.mark.parametrize("model", MODELS)
async def test_equal_weight_versions_are_equal_weights_in_every_process(
    model: str,
    request: pytest.FixtureRequest,
) -> None:
    shared: Server = request.getfixturevalue(f"{model}_server")
    with start("--weight-version", "v0", model=model) as other:
        first, second = await shared.generate(QUESTION), await other.generate(QUESTION)
    assert (first["output_ids"], logprobs(first)) == (second["output_ids"], logprobs(second))


async def test_seeds_make_different_generations_and_temperature_0_needs_none(server: Server) -> None:
    sampled = [await server.generate(QUESTION, sampling_seed=seed) for seed in (1, 2)]
    greedy = [await server.generate(QUESTION, sampling_seed=seed, temperature=0) for seed in (1, 2)]
    assert sampled[0]["output_ids"] != sampled[1]["output_ids"]
    assert greedy[0]["output_ids"] == greedy[1]["output_ids"]


def test_the_noise_of_positions_follows_the_distribution() -> None:
    probabilities = np.array([0.5, 0.0, 0.3, 0.2], dtype=np.float32)
    sampling = Sampling(1.0, 1.0, -1, 0.0, 3, False, frozenset())
    counts = np.bincount([choose(probabilities, sampling, position) for position in range(20_000)], minlength=4)
    assert counts[1] == 0
    assert np.abs(counts / 20_000 - probabilities).max() < 0.015


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [({"top_k": 2}, {0, 2}), ({"top_p": 0.5}, {0}), ({"top_p": 0.51}, {0, 2}), ({"min_p": 0.5}, {0, 2})],
)
def test_filters_keep_the_likely_tokens(changes: JSON, allowed: set[int]) -> None:
    probabilities = np.array([0.5, 0.0, 0.3, 0.2], dtype=np.float32)
    fields = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "seed": 3} | changes
    sampling = Sampling(**fields, ignore_eos=False, stops=frozenset())
    assert {choose(probabilities, sampling, position) for position in range(500)} == allowed


async def test_logprobs_are_those_of_a_distribution(transformer_server: Server) -> None:
    greedy = await transformer_server.generate(QUESTION, temperature=0)
    cold = await transformer_server.generate(QUESTION, temperature=0.2, max_new_tokens=1)
    assert all(logprob <= 0 for logprob in logprobs(greedy))
    assert logprobs(cold) != logprobs(greedy)[:1]


# An agent's turns.


async def test_a_turn_ends_by_itself_and_calls_a_tool_only_where_tools_are_offered(transformer_server: Server) -> None:
    async def turn(prompt: list[int], seed: int) -> str:
        reply = await transformer_server.generate(prompt, sampling_seed=seed, ignore_eos=False, max_new_tokens=200)
        assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": VOCABULARY.eos_id}
        assert 20 <= len(reply["output_ids"]) <= 110
        return reply["text"]

    with_tools = [await turn(AGENT, seed) for seed in range(20)]
    without = [await turn(QUESTION, seed) for seed in range(20)]
    calls = [text.split("<tool_call>")[1].removesuffix("</tool_call>") for text in with_tools if "<tool_call>" in text]
    assert len(calls) >= 5
    assert not any("<tool_call>" in text for text in without)
    for call in calls:
        assert call.startswith("\n")
        assert call.endswith("\n")
        parsed = json.loads(call)
        assert parsed["name"] == "look_up"
        assert parsed["arguments"]["query"]


# What means something to the prior, and one token that does not: random ids would hardly leave its first state.
SHAPED = st.sampled_from([*VOCABULARY.special, *VOCABULARY.markup, *ids('"\n}}{a')])


@settings(max_examples=300, deadline=None)
@given(st.lists(SHAPED, max_size=8), st.integers(0, 8))
def test_the_prior_is_a_function_of_the_tokens_alone(tokens: list[int], cut: int) -> None:
    prior = Prior(VOCABULARY)
    state = prior.start(tokens[:cut])
    for token in tokens[cut:]:
        state = prior.advance(state, token)
    whole = prior.start(tokens)
    assert (prior.forced(state), prior.forced(whole) is None and prior.bias(state)) == (
        prior.forced(whole),
        prior.forced(whole) is None and prior.bias(whole),
    )


# The protocol.


async def test_cumulative_chunks_grow_to_the_reply_without_streaming(server: Server) -> None:
    whole = await server.generate(AGENT)
    chunks = [chunk async for chunk in server.stream(AGENT, custom_params={"tokens_per_s": 100})]
    assert len(chunks) > 2
    for earlier, later in itertools.pairwise(chunks):
        assert later["output_ids"][: len(earlier["output_ids"])] == earlier["output_ids"]
        assert later["text"].startswith(earlier["text"])
        assert earlier["meta_info"]["finish_reason"] is None
    assert chunks[-1]["output_ids"] == whole["output_ids"]
    assert chunks[-1]["text"] == whole["text"]
    assert logprobs(chunks[-1]) == logprobs(whole)
    assert chunks[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 40}


@pytest.mark.parametrize("model", MODELS)
async def test_incremental_chunks_join_to_the_reply_without_streaming(model: str) -> None:
    with start("--incremental-streaming-output", "--stream-interval", "3", model=model) as server:
        whole = await server.generate(AGENT)
        paced = {"stream_interval": 7, "custom_params": {"tokens_per_s": 100}}
        chunks = [chunk async for chunk in server.stream(AGENT, **paced)]
    sizes = [len(chunk["output_ids"]) for chunk in chunks]
    assert len(chunks) > 2
    # The first token goes at once, and the request's interval wins over the server's; a late chunk goes with the next.
    assert sizes[0] % 7 == 1
    assert all(size % 7 == 0 for size in sizes[1:-1])
    assert [chunk["meta_info"]["completion_tokens"] for chunk in chunks] == list(itertools.accumulate(sizes))
    assert [token for chunk in chunks for token in chunk["output_ids"]] == whole["output_ids"]
    assert [logprob for chunk in chunks for logprob in logprobs(chunk)] == logprobs(whole)
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]


async def test_without_a_pace_a_stream_is_one_event_however_many_others_run(hash_server: Server) -> None:
    async def events() -> int:
        return len([chunk async for chunk in hash_server.stream(AGENT, max_new_tokens=300, stream_interval=1)])

    assert await asyncio.gather(*(events() for _ in range(8))) == [1] * 8


async def test_a_stop_token_ends_a_generation_and_is_not_in_its_text(server: Server) -> None:
    whole = await server.generate(QUESTION, ignore_eos=False)
    stop = whole["output_ids"][10]
    first = whole["output_ids"].index(stop)
    reply = await server.generate(QUESTION, stop_token_ids=[stop], ignore_eos=False)
    assert reply["output_ids"] == whole["output_ids"][: first + 1]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert reply["text"] == b"".join(VOCABULARY.tokens[i] for i in reply["output_ids"][:-1]).decode()


async def test_a_stop_string_ends_a_generation_and_is_cut_from_its_text(server: Server) -> None:
    whole = await server.generate(QUESTION)
    stop = whole["text"][30:33]
    reply = await server.generate(QUESTION, stop=[stop])
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert reply["text"] == whole["text"][: whole["text"].index(stop)]
    assert reply["output_ids"] == whole["output_ids"][: len(reply["output_ids"])]


async def test_nothing_stops_a_generation_before_its_least_number_of_tokens(server: Server) -> None:
    stop = (await server.generate(QUESTION))["output_ids"][0]
    reply = await server.generate(QUESTION, stop_token_ids=[stop], min_new_tokens=15, ignore_eos=False)
    assert stop not in reply["output_ids"][:15]
    assert len(reply["output_ids"]) >= 15


async def test_a_prompt_seen_before_is_reported_as_cached(transformer_server: Server) -> None:
    await transformer_server.post("/flush_cache")
    first = await transformer_server.generate(AGENT)
    second = await transformer_server.generate(AGENT + first["output_ids"])
    assert first["meta_info"]["cached_tokens"] == 0
    assert second["meta_info"]["cached_tokens"] >= len(AGENT)


async def test_a_generation_takes_the_time_that_its_pace_says() -> None:
    with start(pace=200) as server:
        plain = await server.generate(QUESTION, max_new_tokens=40)
        slow = await server.generate(QUESTION, max_new_tokens=40, custom_params={"tokens_per_s": 50, "from_token": 30})
    assert 0.19 <= plain["meta_info"]["e2e_latency"] < 5
    assert 0.34 <= slow["meta_info"]["e2e_latency"] < 5
    assert plain["output_ids"] == slow["output_ids"]


async def test_a_request_that_is_slowed_down_streams_at_once_up_to_there(hash_server: Server) -> None:
    slowed = {"tokens_per_s": 0.001, "from_token": 9}
    async with contextlib.aclosing(hash_server.stream(QUESTION, custom_params=slowed)) as chunks:
        async for chunk in chunks:
            if chunk["meta_info"]["completion_tokens"] == 9:
                break


async def test_an_abort_ends_a_request_with_the_tokens_it_has() -> None:
    with start(pace=20) as server:
        whole = (await server.generate(QUESTION, custom_params={"tokens_per_s": 1e6}))["output_ids"]
        received: list[int] = []
        final: JSON = {}
        async for chunk in server.stream(QUESTION, rid="a"):
            if not received:
                assert (await server.post("/abort_request", {"rid": "a"}))[0] == 200
            received, final = chunk["output_ids"], chunk
    assert final["meta_info"]["finish_reason"] == {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    assert 0 < len(received) < 40
    assert received == whole[: len(received)]
    assert len(logprobs(final)) == len(received)


async def test_an_abort_of_nothing_is_200_and_an_abort_of_all_ends_all() -> None:
    with start(pace=1) as server:
        assert (await server.post("/abort_request", {"rid": "nobody"}))[0] == 200
        requests = [asyncio.create_task(server.generate(QUESTION)) for _ in range(3)]
        await until(lambda: has_load(server, num_running_reqs=3))
        await server.post("/abort_request", {"abort_all": True})
        replies = await asyncio.gather(*requests)
    assert {reply["meta_info"]["finish_reason"]["type"] for reply in replies} == {"abort"}


async def has_load(server: Server, **expected: int) -> bool:
    load = await server.load()
    return all(load[key] == value for key, value in expected.items())


async def test_a_duplicate_rid_is_refused_and_the_first_request_goes_on() -> None:
    with start(pace=40) as server:
        first = asyncio.create_task(server.generate(QUESTION, rid="dup"))
        await until(lambda: has_load(server, num_running_reqs=1))
        refused = await server.post("/generate", generate_body(QUESTION, rid="dup"))
        reply = await first
        again = await server.generate(QUESTION, rid="dup")
    assert refused == (400, {"error": {"message": "Duplicate request ID detected: dup"}})
    assert reply["meta_info"]["finish_reason"]["type"] == "length"
    assert again["output_ids"] == reply["output_ids"]


async def test_a_full_queue_is_503() -> None:
    with start("--max-running-requests", "1", "--max-queued-requests", "1", pace=20) as server:
        first = asyncio.create_task(server.generate(QUESTION))
        await until(lambda: has_load(server, num_running_reqs=1))
        second = asyncio.create_task(server.generate(QUESTION))
        await until(lambda: has_load(server, num_waiting_reqs=1))
        status, _ = await server.post("/generate", generate_body(QUESTION))
        await server.post("/abort_request", {"abort_all": True})
        await asyncio.gather(first, second)
    assert status == 503


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mode", ["in_place", "retract"])
async def test_a_pause_does_not_change_what_is_generated(model: str, mode: str) -> None:
    with start(model=model, pace=40) as server:
        whole = await server.generate(QUESTION, custom_params={"tokens_per_s": 1e6})
        last: JSON = {}
        async for chunk in server.stream(QUESTION):
            if not last:
                await server.post("/pause_generation", {"mode": mode})
                assert (await server.get("/ready"))[0] == 503
                late = asyncio.create_task(server.generate(QUESTION))
                await until(lambda: has_load(server, num_held_reqs=1))
                await server.post("/continue_generation")
                assert (await server.get("/ready"))[0] == 200
            last = chunk
        reply = await late
    assert last["output_ids"] == reply["output_ids"] == whole["output_ids"]
    assert logprobs(last) == logprobs(reply) == logprobs(whole)
    assert last["meta_info"]["num_retractions"] == (1 if mode == "retract" else 0)


async def test_a_pause_that_aborts_ends_what_runs_and_holds_what_comes() -> None:
    with start(pace=50) as server:
        running = asyncio.create_task(server.generate(QUESTION))
        await until(lambda: has_load(server, num_running_reqs=1))
        await server.post("/pause_generation")
        aborted = await running
        held = asyncio.create_task(server.generate(QUESTION))
        await until(lambda: has_load(server, num_held_reqs=1))
        await server.post("/continue_generation", {"torch_empty_cache": True})
        reply = await held
    assert aborted["meta_info"]["finish_reason"]["type"] == "abort"
    assert reply["meta_info"]["finish_reason"]["type"] == "length"


@pytest.mark.parametrize("model", MODELS)
async def test_new_weights_in_the_middle_of_a_generation_give_two_spans(model: str) -> None:
    with start(model=model, pace=40) as server:
        old = (await server.generate(QUESTION, custom_params={"tokens_per_s": 1e6}))["output_ids"]
        final: JSON = {}
        async for chunk in server.stream(QUESTION):
            if not final:
                await server.post("/pause_generation", {"mode": "in_place"})
                update = {"model_path": str(MODEL_DIR), "weight_version": "v1"}
                status, answer = await server.post("/update_weights_from_disk", update | {"flush_cache": False})
                assert (status, answer["success"]) == (200, True)
                await server.post("/continue_generation")
            final = chunk
        assert (await server.get("/model_info"))[1]["weight_version"] == "v1"
        after = await server.generate(QUESTION)
    first, second = final["meta_info"]["weight_versions"]
    assert (first["version"], first["start"], second["version"], second["end"]) == ("v0", 0, "v1", 40)
    assert 0 < first["end"] == second["start"] < 40
    assert final["output_ids"][: first["end"]] == old[: first["end"]]
    assert final["output_ids"] != old
    assert after["output_ids"] != old
    assert after["meta_info"]["weight_versions"] == [{"version": "v1", "start": 0, "end": 40}]


async def test_an_update_without_a_pause_waits_for_what_runs() -> None:
    with start(pace=40) as server:
        running = asyncio.create_task(server.generate(QUESTION))
        await until(lambda: has_load(server, num_running_reqs=1))
        update = {"model_path": str(MODEL_DIR), "weight_version": "v1"}
        assert (await server.post("/update_weights_from_disk", update))[0] == 200
        reply = await running
    assert reply["meta_info"]["weight_versions"] == [{"version": "v0", "start": 0, "end": 40}]


async def test_a_new_version_name_aborts_everything_unless_told_not_to() -> None:
    with start(pace=40) as server:
        running = asyncio.create_task(server.generate(QUESTION))
        await until(lambda: has_load(server, num_running_reqs=1))
        await server.post("/update_weight_version", {"new_version": "v1"})
        aborted = await running
        kept: JSON = {}
        async for chunk in server.stream(QUESTION):
            if not kept:
                await server.post("/update_weight_version", {"new_version": "v2", "abort_all_requests": False})
            kept = chunk
    assert aborted["meta_info"]["finish_reason"]["type"] == "abort"
    assert [span["version"] for span in kept["meta_info"]["weight_versions"]] == ["v1", "v2"]


async def test_a_seed_file_names_the_weights(hash_server: Server, tmp_path: Path) -> None:
    (tmp_path / "seed").write_text("v0\n")
    with start("--weight-version", "other") as server:
        await server.post("/update_weights_from_disk", {"model_path": str(tmp_path), "weight_version": "v9"})
        reply = await server.generate(QUESTION)
    assert reply["output_ids"] == (await hash_server.generate(QUESTION))["output_ids"]
    assert reply["meta_info"]["weight_version"] == "v9"


async def test_a_file_of_weights_is_loaded_and_one_that_does_not_fit_changes_nothing(transformer_server: Server, tmp_path: Path) -> None:
    file, update = tmp_path / "model.safetensors", {"model_path": str(tmp_path), "weight_version": "v9"}
    weights = make_weights("v0", VOCABULARY.size)
    layers = {f"{part}.{i}": tensor for part in ("into", "out") for i, tensor in enumerate(getattr(weights, part))}
    save_file({"embedding": weights.embedding, "unembedding": weights.unembedding, **layers}, file)
    with start("--weight-version", "other", model="transformer") as server:
        assert (await server.post("/update_weights_from_disk", update))[0] == 200
        file.write_bytes(file.read_bytes()[:1000])
        status, refused = await server.post("/update_weights_from_disk", {**update, "weight_version": "v10"})
        reply = await server.generate(QUESTION)
    expected = await transformer_server.generate(QUESTION)
    assert (reply["output_ids"], logprobs(reply)) == (expected["output_ids"], logprobs(expected))
    assert (status, reply["meta_info"]["weight_version"]) == (400, "v9")
    assert "model.safetensors cannot be read" in refused["message"]


async def test_to_the_hash_model_another_file_is_other_weights(tmp_path: Path) -> None:
    replies: list[list[int]] = []
    with start() as server:
        for content in (b"one", b"another", b"one"):
            (tmp_path / "model.safetensors").write_bytes(content)
            await server.post("/update_weights_from_disk", {"model_path": str(tmp_path), "weight_version": "v9"})
            replies.append((await server.generate(QUESTION))["output_ids"])
    assert replies[0] == replies[2] != replies[1]


async def test_a_client_that_leaves_a_stream_ends_its_request() -> None:
    with start(pace=20) as server:
        chunks = server.stream(QUESTION, max_new_tokens=10_000)
        await anext(chunks)
        await chunks.aclose()
        await until(lambda: has_load(server, num_running_reqs=0))
        sampled = (await server.load())["tokens_sampled"]
    assert sampled < 100


@pytest.mark.parametrize(
    ("prompt", "changes"),
    [
        ([], {}),
        ([1] * 200, {}),
        ([1] * 70, {"max_new_tokens": 31}),
        ([1], {"max_new_tokens": -1}),
        ([1], {"temperature": -0.5}),
        ([1], {"top_p": 0.0}),
        ([1], {"n": 2}),
        ([1], {"json_schema": "{}"}),
        ([1], {"custom_params": {"tokens_per_s": 0}}),
        ([1], {"min_new_tokens": 41}),
        ([1], {"frequency_penalty": 3}),
        ([[1], [2]], {}),
    ],
)
async def test_bad_input_is_400_or_an_error_in_the_stream(
    small_server: Server,
    prompt: list[Any],
    changes: JSON,
) -> None:
    status, reply = await small_server.post("/generate", generate_body(prompt, **changes))
    assert status == 400
    assert reply["error"]["message"]
    chunks = [chunk async for chunk in small_server.stream(prompt, **changes)]
    assert [chunk["error"]["code"] for chunk in chunks] == [400]


@pytest.mark.parametrize(
    "changes", [{"stop_token_ids": ["a"]}, {"max_new_tokens": "x"}, {"temperature": "hot"}, {"sampling_seed": 1 << 64}]
)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_sampling_parameter_of_the_wrong_type_is_400_whatever_was_asked_for(
    hash_server: Server, changes: JSON, stream: bool
) -> None:
    status, reply = await hash_server.post("/generate", generate_body([1], stream=stream, **changes))
    assert status == 400
    assert reply["error"].startswith("invalid type")


@pytest.fixture(scope="module")
def small_server() -> Iterator[Server]:
    with start("--context-length", "100") as server:
        yield server


@pytest.mark.parametrize("stream", [True, False])
async def test_an_unknown_sampling_parameter_is_400_and_an_unknown_field_is_ignored(
    hash_server: Server,
    stream: bool,
) -> None:
    body = generate_body([1], stream=stream)
    unknown = body | {"sampling_params": {"max_tokens": 3}}
    assert (await hash_server.post("/generate", unknown))[0] == 400
    url = hash_server.url + "/generate"
    async with aiohttp.ClientSession() as session, session.post(url, json=body | {"whatever": 1}) as response:
        assert response.status == 200
        await response.read()


async def test_a_generation_of_no_tokens_ends_by_length(server: Server) -> None:
    reply = await server.generate(QUESTION, max_new_tokens=0)
    assert (reply["output_ids"], reply["meta_info"]["finish_reason"]) == ([], {"type": "length", "length": 0})


@pytest.mark.parametrize("token", [99999, -1, VOCABULARY.size, 1 << 40])
async def test_a_token_id_outside_the_vocabulary_kills_the_engine(token: int) -> None:
    with start() as server:
        with pytest.raises(aiohttp.ClientError):
            await server.post("/generate", generate_body([1, token]))
        assert server.process.wait(10) == 1


async def test_text_prompts_are_encoded(hash_server: Server) -> None:
    text = "<|im_start|>user\nWho built the bridge?<|im_end|>\n<|im_start|>assistant\n"
    body = generate_body([])
    del body["input_ids"]
    status, reply = await hash_server.post("/generate", body | {"text": text})
    assert status == 200
    assert reply["meta_info"]["prompt_tokens"] == len(QUESTION)


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/health_generate",
        "/ready",
        "/model_info",
        "/get_model_info",
        "/server_info",
        "/get_server_info",
        "/v1/loads",
        "/v1/models",
    ],
)
async def test_what_sglang_tells_of_itself_is_there(hash_server: Server, path: str) -> None:
    assert (await hash_server.get(path))[0] == 200


async def test_there_are_no_metrics(hash_server: Server) -> None:
    assert (await hash_server.get("/metrics"))[0] == 404


async def test_a_cache_is_flushed_only_when_nothing_runs() -> None:
    with start(pace=20) as server:
        running = asyncio.create_task(server.generate(QUESTION))
        await until(lambda: has_load(server, num_running_reqs=1))
        busy = await server.post("/flush_cache")
        await server.post("/abort_request", {"abort_all": True})
        await running
        idle = await server.post("/flush_cache")
    assert (busy[0], idle[0]) == (400, 200)


async def test_health_answers_while_the_model_computes(transformer_server: Server) -> None:
    prompts = [some_ids(1500, seed=seed) for seed in range(20, 24)]
    work = [asyncio.create_task(transformer_server.generate(prompt, max_new_tokens=400)) for prompt in prompts]
    await until(lambda: has_load(transformer_server, num_running_reqs=4))
    for _ in range(3):
        assert (await transformer_server.get("/health"))[0] == 200
    assert not any(task.done() for task in work)
    await transformer_server.post("/abort_request", {"abort_all": True})
    await asyncio.gather(*work)


async def test_ports_of_one_process_are_engines_of_their_own() -> None:
    with start(engines=3, pace=20) as server:
        running = asyncio.create_task(server.generate(QUESTION, port=0, rid="same"))
        await until(lambda: has_load(server, num_running_reqs=1))
        await server.post("/update_weight_version", {"new_version": "v1"}, port=1)
        versions = [(await server.get("/model_info", port=port))[1]["weight_version"] for port in range(3)]
        reply = await server.generate(QUESTION, port=2, rid="same", custom_params={"tokens_per_s": 1e6})
        await server.post("/abort_request", {"abort_all": True}, port=1)
        assert (await server.load())["num_running_reqs"] == 1
        await server.post("/abort_request", {"abort_all": True}, port=0)
        await running
    assert versions == ["v0", "v1", "v0"]
    assert len(reply["output_ids"]) == 40


# The count of tokens.


def counted(path: Path) -> int:
    return struct.unpack("<Q", path.read_bytes())[0]


@pytest.mark.parametrize("model", MODELS)
async def test_the_count_of_tokens_is_exact_after_sigkill(model: str, tmp_path: Path) -> None:
    path = tmp_path / "count"
    with start("--count-file", str(path), model=model, pace=40) as server:
        await server.generate(QUESTION, max_new_tokens=23, custom_params={"tokens_per_s": 1e6})
        chunks = server.stream(QUESTION, rid="a")
        await anext(chunks)
        await anext(chunks)
        # Nothing is sampled from here on, so that what was sampled and what was counted can be compared.
        await server.post("/pause_generation", {"mode": "in_place"})
        sampled = (await server.load())["tokens_sampled"]
        server.process.kill()
        server.process.wait()
        with contextlib.suppress(aiohttp.ClientError):
            received = [len(chunk["output_ids"]) async for chunk in chunks]
            assert not received or received[-1] <= sampled - 23
    assert counted(path) == sampled
    assert 23 + 1 + 4 <= sampled < 23 + 40


async def test_a_restarted_engine_goes_on_counting(tmp_path: Path) -> None:
    path = tmp_path / "count"
    for _ in range(2):
        with start("--count-file", str(path)) as server:
            await server.generate(QUESTION, max_new_tokens=5)
    assert counted(path) == 10


# The model directory.


def test_the_model_directory_is_what_its_script_makes(tmp_path: Path) -> None:
    write_model_dir(tmp_path)
    made = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert made == {file.name: file.read_bytes() for file in MODEL_DIR.iterdir()}


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(MODEL_DIR))


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_every_text_goes_through_the_tokenizer_and_comes_back(text: str) -> None:
    encoded = tokenizer().encode(text)
    assert encoded == VOCABULARY.encode(text)
    assert b"".join(VOCABULARY.tokens[token] for token in encoded).decode() == text


def test_english_costs_about_three_characters_a_token() -> None:
    text = "The committee was asked to explain why the report had not been sent to all of its members before."
    assert 2.3 < len(text) / len(ids(text)) < 4


TEXT = st.text(max_size=20)
CALL = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    st.sampled_from(["look_up", "search"]),
    st.one_of(st.dictionaries(st.sampled_from("ab"), TEXT, max_size=2), st.just('{"query":"as it stands"}')),
)
MESSAGE = st.one_of(
    st.builds(lambda content: {"role": "user", "content": content}, TEXT),
    st.builds(lambda content: {"role": "tool", "content": content}, TEXT),
    st.builds(
        lambda content, calls: {"role": "assistant", "content": content, "tool_calls": calls},
        st.one_of(st.none(), TEXT),
        st.lists(CALL, max_size=2),
    ),
)
SYSTEM = st.lists(st.builds(lambda content: {"role": "system", "content": content}, TEXT), max_size=1)
TOOLS = st.sampled_from([None, [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]])


def render(messages: list[JSON], tools: list[JSON] | None, prompt: bool = False) -> str:
    return tokenizer().apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)


@settings(max_examples=60, deadline=None)
@given(SYSTEM, st.lists(MESSAGE, min_size=1, max_size=5), TOOLS)
def test_the_chat_template_only_ever_appends(
    system: list[JSON],
    messages: list[JSON],
    tools: list[JSON] | None,
) -> None:
    conversation = system + messages
    for count in range(1, len(conversation)):
        longer = render(conversation[: count + 1], tools)
        prompt = conversation[count]["role"] == "assistant"
        assert longer.startswith(render(conversation[:count], tools, prompt=prompt))


def test_arguments_that_are_a_string_are_printed_as_they_stand() -> None:
    call = {"function": {"name": "look_up", "arguments": '{"query":  "x"}'}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    text = render([{"role": "user", "content": "a"}, answer], None)
    assert '<tool_call>\n{"name": "look_up", "arguments": {"query":  "x"}}\n</tool_call>' in text


def routed(reply: JSON) -> list[list[list[int]]]:
    return np.frombuffer(base64.b64decode(reply["meta_info"]["routed_experts"]), "<i4").reshape(-1, 2, 3).tolist()


@pytest.mark.parametrize("model", MODELS)
async def test_routed_experts_are_the_same_whoever_captures_them(model: str):
    prompt = [40, 41, 42, 43, 44]
    with start("--routed-experts", "2,3,16", model=model) as server:
        whole = await server.generate(prompt, return_routed_experts=True)
        ids = [*prompt, *whole["output_ids"]]
        assert len(routed(whole)) == len(ids) - 1
        first = await server.generate(prompt, return_routed_experts=True, max_new_tokens=10)
        start_len = len(prompt) + 9
        rest = await server.generate(ids[:15], return_routed_experts=True, routed_experts_start_len=start_len, max_new_tokens=30)
        assert [*routed(first), *routed(rest)] == routed(whole)
        assert all(len(set(layer)) == 3 and max(layer) < 16 for row in routed(whole) for layer in row)
        assert "routed_experts" not in (await server.generate(prompt))["meta_info"]


async def test_routed_experts_come_with_the_last_chunk_and_after_an_abort():
    with start("--routed-experts", "2,3,16", pace=200) as server:
        chunks = [c async for c in server.stream([40, 41], return_routed_experts=True)]
        assert ["routed_experts" in c["meta_info"] for c in chunks] == [False] * (len(chunks) - 1) + [True]
        stream = server.stream([40, 41], return_routed_experts=True, rid="gone", max_new_tokens=5000)
        await anext(stream)
        await server.post("/abort_request", {"rid": "gone"})
        *_, last = [c async for c in stream]
        assert last["meta_info"]["finish_reason"]["type"] == "abort"
        assert len(routed(last)) == 1 + last["meta_info"]["completion_tokens"]


@pytest.mark.parametrize(("start_len", "status"), [(0, 200), (2, 200), (3, 400), (-1, 400)])
async def test_routed_experts_begin_in_the_prompt(start_len: int, status: int):
    with start("--routed-experts", "2,3,16") as server:
        body = generate_body([40, 41], return_routed_experts=True, routed_experts_start_len=start_len)
        assert (await server.post("/generate", body))[0] == status
