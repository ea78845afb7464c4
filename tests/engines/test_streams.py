"""What a generation is, through the adapter: the same on the small engine and on the real one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from asking import LONG, PROMPT, Told, body, call, greedy, listen, logprobs, whole
from model_server import ModelServer, Start

from rollout_ft.engine.sglang import SGLang
from rollout_ft.errors import EngineRefused

pytestmark = pytest.mark.timeout(240)


@pytest.mark.smoke
async def test_a_stream_is_the_generation_without_a_stream(server: ModelServer, engine: SGLang):
    told = await listen(engine, Told(), 50)
    reply = await whole(server.url, 50)
    assert len(told.chunks) > 2
    assert told.ids == reply["output_ids"]
    assert told.logprobs == pytest.approx(logprobs(reply), abs=1e-5)
    assert [chunk.finish for chunk in told.chunks] == [""] * (len(told.chunks) - 1) + ["length"]
    (span,) = told.chunks[-1].spans
    assert (span.version, span.start, span.end) == (reply["meta_info"]["weight_version"], 0, 50)


async def test_a_server_that_repeats_everything_in_each_chunk_tells_the_same(start: Start):
    server = start(incremental=False)
    cumulative = SGLang("e0", server.url)
    told = await listen(cumulative, Told(), 400)
    await cumulative.aclose()
    assert len(told.chunks) > 2
    assert told.ids == (await whole(server.url, 400))["output_ids"]


@pytest.mark.smoke
async def test_logprobs_are_those_of_a_scoring_pass(server: ModelServer):
    reply = await whole(server.url, 60)
    status, scored = await call(server.url, "/generate", {**body(0, [*PROMPT, *reply["output_ids"]]), "logprob_start_len": 0})
    assert status == 200
    assert scored["output_ids"] == []
    first, *rest = scored["meta_info"]["input_token_logprobs"]
    assert first[0] is None
    assert [triple[1] for triple in rest] == [*PROMPT[1:], *reply["output_ids"]]
    assert [triple[0] for triple in rest[-60:]] == pytest.approx(logprobs(reply), abs=1e-4)


async def test_a_cut_anywhere_and_a_new_prompt_is_the_same_generation(server: ModelServer):
    reply = await whole(server.url, 60)
    for cut in (1, 2, 31, 59):
        done = reply["output_ids"][:cut]
        rest = await whole(server.url, 60 - cut, PROMPT + done)
        assert done + rest["output_ids"] == reply["output_ids"]
        assert logprobs(rest) == pytest.approx(logprobs(reply)[cut:], abs=1e-4)


async def test_no_tokens_and_one_token(server: ModelServer, engine: SGLang):
    none, one = await listen(engine, Told(), 0), await listen(engine, Told(), 1)
    assert (none.ids, none.finish) == ([], "length")
    assert (one.ids, one.finish) == ((await whole(server.url, 5))["output_ids"][:1], "length")
    assert (await whole(server.url, 0))["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


async def test_a_stop_id_ends_a_generation_and_is_among_its_ids(server: ModelServer, engine: SGLang):
    ids = (await whole(server.url, 60, ignore_eos=False))["output_ids"]
    stop = next(token for at, token in enumerate(ids) if at and token not in ids[:at])
    told = await listen(engine, Told(), 60, stop_token_ids=[stop], ignore_eos=False)
    reply = await whole(server.url, 60, stop_token_ids=[stop], ignore_eos=False)
    assert told.ids == reply["output_ids"] == ids[: ids.index(stop) + 1]
    assert told.finish == "stop"
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


async def test_who_ignores_the_models_end_ignores_stop_ids_as_well(server: ModelServer):
    ids = (await whole(server.url, 60))["output_ids"]
    assert (await whole(server.url, 60, stop_token_ids=[ids[10]]))["output_ids"] == ids


async def test_a_stop_string_ends_a_generation_and_is_cut_from_the_text_alone(server: ModelServer, engine: SGLang):
    """The real model's text is bytes at random: one that is ASCII stops it."""
    reply = await whole(server.url, 200)
    stop = next(char for char in reply["text"][20:] if char.isascii() and char.isprintable())
    cut = await whole(server.url, 200, stop=[stop])
    told = await listen(engine, Told(), 200, stop=[stop])
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert cut["text"] == reply["text"][: reply["text"].index(stop)]
    assert told.ids == cut["output_ids"] == reply["output_ids"][: len(told.ids)]
    assert told.finish == "stop"


async def test_nothing_stops_a_generation_before_its_least_number_of_tokens(server: ModelServer):
    stop = (await whole(server.url, 5))["output_ids"][0]
    reply = await whole(server.url, 40, stop_token_ids=[stop], min_new_tokens=15, ignore_eos=False)
    assert len(reply["output_ids"]) >= 15
    assert stop not in reply["output_ids"][:15]


async def test_an_interval_of_the_request_says_how_many_tokens_a_chunk_has(engine: SGLang):
    told = await listen(engine, Told(), 60, stream_interval=16)
    starts = list(itertools.accumulate(len(chunk.ids) for chunk in told.chunks))
    assert len(told.chunks) <= 6
    assert starts[-1] == 60


BAD_VALUES: list[dict[str, Any]] = [
    {"max_new_tokens": -1}, {"temperature": -0.5}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 2}, {"min_new_tokens": 41},
    {"min_new_tokens": -1}, {"frequency_penalty": 3}, {"presence_penalty": -3}, {"repetition_penalty": 0},
]  # fmt: skip
BAD_TYPES: list[dict[str, Any]] = [
    {"max_new_tokens": "x"}, {"max_new_tokens": 2.5}, {"temperature": "hot"}, {"stop_token_ids": ["a"]}, {"stop": 5}, {"stop": [5]},
    {"sampling_seed": "a"}, {"nonsense": 1},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_VALUES, ids=str)
async def test_a_bad_value_is_400_and_in_a_stream_an_error_under_200(server: ModelServer, engine: SGLang, bad: dict[str, Any]):
    name = next(iter(bad))
    status, reply = await call(server.url, "/generate", body(**{"tokens": 40}) | {"sampling_params": greedy(40) | bad})
    assert status == 400
    assert name in reply["error"]["message"]
    with pytest.raises(EngineRefused, match=name) as e:
        [chunk async for chunk in engine.generate("bad", b"40,41", greedy(40) | bad)]
    assert e.value.status == 400


@pytest.mark.parametrize("bad", BAD_TYPES, ids=str)
async def test_a_bad_type_or_name_is_400_whatever_was_asked_for(server: ModelServer, engine: SGLang, bad: dict[str, Any]):
    status, reply = await call(server.url, "/generate", body(40) | {"sampling_params": greedy(40) | bad})
    assert status == 400
    assert isinstance(reply["error"], str)
    with pytest.raises(EngineRefused) as e:
        [chunk async for chunk in engine.generate("bad", b"40,41", greedy(40) | bad)]
    assert e.value.status == 400


@pytest.mark.parametrize(
    "fine", [{"max_new_tokens": 3, "top_k": 0}, {"max_new_tokens": 3, "n": 0}, {"max_new_tokens": 3, "stream_interval": 0}], ids=str
)
async def test_what_sglang_takes_for_nothing_special_is_taken(server: ModelServer, fine: dict[str, Any]):
    status, reply = await call(server.url, "/generate", body(3) | {"sampling_params": greedy(3) | fine})
    assert (status, len(reply["output_ids"])) == (200, 3)


async def test_a_field_that_nobody_knows_is_ignored(server: ModelServer):
    status, reply = await call(server.url, "/generate", body(3) | {"whatever": {"a": 1}, "session_id": "s"})
    assert (status, len(reply["output_ids"])) == (200, 3)


@pytest.mark.parametrize("ids", [[], ["a"], [1.5], 5, None], ids=str)
async def test_a_prompt_that_is_none_is_400(server: ModelServer, ids: Any):
    assert (await call(server.url, "/generate", body(3) | {"input_ids": ids}))[0] == 400


async def test_what_is_longer_than_the_context_is_400_in_sglangs_words(start: Start):
    server = start("--context-length", "100")
    status, reply = await call(server.url, "/generate", body(3, [40] * 100))
    assert (status, reply["error"]["message"]) == (
        400, "The input (100 tokens) is longer than the model's context length (100 tokens).",
    )  # fmt: skip
    status, reply = await call(server.url, "/generate", body(31, [40] * 70))
    assert status == 400
    assert "maximum context length of 100 tokens" in reply["error"]["message"]
    assert len((await whole(server.url, 30, [40] * 70))["output_ids"]) == 28, "the end of the context comes two tokens early"
    status, reply = await call(server.url, "/generate", body(1, [40] * 94))
    assert (status, reply.get("error", reply)["message"].split(" Use ")[0]) == (
        400, "Input length (94 tokens) exceeds the maximum allowed length (94 tokens).",
    )  # fmt: skip
    assert len((await whole(server.url, 5, [40] * 93))["output_ids"]) == 5


@pytest.mark.parametrize("ids", [[40, 99999], [40, -1]], ids=str)
async def test_an_id_outside_the_vocabulary_is_the_end_of_a_server(start: Start, ids: list[int]):
    """Why they are stopped in front of it."""
    server = start()
    engine = SGLang("e0", server.url)
    with pytest.raises((EngineRefused, Exception)):
        [chunk async for chunk in engine.generate("out", ",".join(map(str, ids)).encode(), greedy(LONG))]
    await engine.aclose()
    server.wait_until_gone(30)
