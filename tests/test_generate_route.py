"""SGLang's dialect in tokens: ids that no vocabulary has stay out, and what clients read is there."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import orjson
import pytest
from conftest import ask, begin, make_session, turn_of, user
from door import door
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gateway import SID

from rollout_ft.errors import BadRequest
from rollout_ft.gateway.dialects import Evidence, Rules
from rollout_ft.gateway.dialects.openai_request import parse_chat
from rollout_ft.gateway.dialects.tokens import TokensRequest, parse_generate
from rollout_ft.session.tree import Node, ids_of
from rollout_ft.testing.plain import PlainTemplate
from rollout_ft.types import VersionSpan

RENDERER = PlainTemplate()
RULES = Rules("t1~1", max_output_tokens=100, vocab_size=258)
SLIME: dict[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 50, "stop": None, "stop_token_ids": None,
    "skip_special_tokens": False, "no_stop_trim": True, "spaces_between_special_tokens": False,
}  # fmt: skip
"""What slime's default generate function sends as sampling parameters."""


def parse(rules: Rules = RULES, **fields: Any) -> TokensRequest:
    return parse_generate(orjson.dumps({"input_ids": [1, 2, 3], **fields}), Evidence("r1"), rules)


def refused(**fields: Any) -> BadRequest:
    with pytest.raises(BadRequest) as e:
        parse(**fields)
    assert e.value.status == 400
    assert len(str(e.value).splitlines()) == 1
    return e.value


# Requests.


def test_the_ids_are_the_request():
    turn = parse().turn
    assert turn.input_ids == b"\1\0\0\0\2\0\0\0\3\0\0\0"
    assert (turn.messages, turn.digests, turn.tools, turn.tool_list) == ([], [], b"", None)


@pytest.mark.parametrize(
    "ids", [None, [], "abc", 3, [-1], [258], [1, 2**40], [2**70], [1.0], ["1"], [True], [None], [[1, 2]], [[1], [2]], {"0": 1}]
)
def test_ids_that_the_model_does_not_have_never_reach_an_engine(ids: Any):
    with pytest.raises(BadRequest) as e:
        parse_generate(json.dumps({"input_ids": ids}).encode(), Evidence("r"), RULES)
    assert e.value.param == "input_ids"


@pytest.mark.parametrize("ids", [[0], [257], [0, 257] * 1000])
def test_every_id_of_the_vocabulary_is_accepted(ids: list[int]):
    assert ids_of(parse(input_ids=ids).turn.input_ids or b"") == ids


def test_what_slime_sends_is_understood():
    turn = parse(sampling_params=SLIME, return_logprob=True).turn
    assert turn.sampling == {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": 50}


def test_what_verl_sends_is_understood():
    request = parse(
        rid="a-request",
        sampling_params={"temperature": 1.0, "repetition_penalty": 1.0, "max_new_tokens": 20},
        image_data=None,
        video_data=None,
        return_logprob=True,
    )
    assert (request.rid, request.return_logprob) == ("a-request", True)


def test_the_same_parameters_are_the_same_in_both_dialects():
    params = {"temperature": 0.5, "stop": "x", "max_new_tokens": 7, "min_new_tokens": 2, "sampling_seed": 3, "ignore_eos": True}
    body = {"messages": [user("a")], "temperature": 0.5, "stop": ["x"], "max_tokens": 7, "min_tokens": 2, "seed": 3, "ignore_eos": True}
    assert parse(sampling_params=params).turn.sampling == parse_chat(orjson.dumps(body), Evidence("r"), RULES).turn.sampling


def test_the_sessions_parameters_win():
    assert parse(replace(RULES, sampling={"temperature": 1.0}), sampling_params={"temperature": 0.1}).turn.sampling["temperature"] == 1.0


def test_without_a_limit_the_configs_holds():
    assert parse().turn.sampling == {"max_new_tokens": 100}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("text", ["a"]), ("image_data", ["x"]), ("logprob_start_len", [0]), ("top_logprobs_num", [1]), ("stream", ["yes"]),
        ("return_logprob", [1]), ("return_routed_experts", [True]), ("rid", [3, ["a"]]), ("session_id", ["t1~2"]),
        ("lora_path", [None, "l"]), ("session_params", [{}]), ("custom_logit_processor", ["p"]), ("bootstrap_room", [1]),
        ("sampling_params", [3, [], "x"]),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_honoured_is_named(field: str, values: list[Any]):
    for value in values:
        assert refused(**{field: value}).param == field


@pytest.mark.parametrize(
    "params",
    [{"max_tokens": 3}, {"n": 2}, {"json_schema": "{}"}, {"regex": "a"}, {"logit_bias": {}}, {"custom_params": {}}, {"temperature": "1"},
     {"max_new_tokens": 0}, {"stop_token_ids": [-1]}, {"stop": 3}, {"min_new_tokens": 60, "max_new_tokens": 50}],
)  # fmt: skip
def test_a_parameter_that_cannot_be_honoured_is_named(params: dict[str, Any]):
    assert next(iter(params)).partition("_new")[0] in (refused(sampling_params=params).param or "")


# Replies.


def replied(sampled: str, *, finish: str = "stop", **sampling: Any) -> Node:
    session = make_session()
    flight = begin(session, ask(user("question"), sampling={"max_new_tokens": 8, **sampling}))
    turn = turn_of(flight, sampled, session)
    ids = turn.output_ids if finish == "stop" else turn.output_ids[:-4]
    spans = (VersionSpan("v1", 0, 1), VersionSpan("v2", 1, len(ids) // 4))
    return session.committed(replace(turn, output_ids=ids, logprobs=turn.logprobs[: len(ids)], finish_reason=finish, version_spans=spans))


def reply(node: Node, **fields: Any) -> Any:
    return orjson.loads(parse(**fields).reply(node, RENDERER))


def test_a_reply_has_ids_text_and_logprobs_as_sglang_writes_them():
    node = replied("abc")
    body = reply(node, return_logprob=True)
    assert (body["text"], body["output_ids"]) == ("abc", [97, 98, 99, 257])
    meta = body["meta_info"]
    assert meta["output_token_logprobs"] == [[0.0, i, None] for i in (97, 98, 99, 257)]
    assert (meta["prompt_tokens"] + 4, meta["completion_tokens"]) == (node.tokens, 4)
    assert meta["finish_reason"] == {"type": "stop", "matched": 257}
    assert (meta["weight_version"], meta["weight_versions"][0]) == ("v2", {"version": "v1", "start": 0, "end": 1})
    assert "output_token_logprobs" not in reply(node)["meta_info"]


def test_a_reply_that_was_cut_off_says_its_length():
    assert reply(replied("abc", finish="length"))["meta_info"]["finish_reason"] == {"type": "length", "length": 3}


def test_a_stop_string_is_said_and_cut_unless_it_is_wanted():
    node = replied("one</a>", stop=["</a>"])
    assert reply(node)["meta_info"]["finish_reason"] == {"type": "stop", "matched": "</a>"}
    assert reply(node)["text"] == "one"
    assert reply(node, sampling_params={"no_stop_trim": True})["text"] == "one</a>"


def test_a_reply_is_labelled_by_the_clients_rid_or_by_the_turn():
    node = replied("a")
    assert reply(node, rid="mine")["meta_info"]["id"] == "mine"
    assert reply(node)["meta_info"]["id"] == node.turn.key


def test_a_stream_is_one_chunk_and_its_end():
    node = replied("a")
    chunk, done, rest = parse(stream=True).reply(node, RENDERER).split(b"\n\n")
    assert (orjson.loads(chunk.removeprefix(b"data: ")), done, rest) == (reply(node), b"data: [DONE]", b"")


# The whole way.


async def test_a_bad_id_is_refused_at_the_door_and_the_engine_lives():
    async with door() as d:
        answer = await d.ask(f"/sessions/{SID}/generate", {"input_ids": [1, 258], "sampling_params": SLIME})
        assert (answer.status, answer.error["param"], d.engine.asked) == (400, "input_ids", [])


# Anything at all.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(["input_ids", "sampling_params", "stream", "rid", "return_logprob", "session_id"])
PARAMS = st.dictionaries(st.sampled_from(sorted(SLIME)), VALUES, max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(FIELDS, VALUES, max_size=3), st.lists(st.integers(-5, 300), max_size=5), PARAMS)
def test_any_json_is_a_request_with_ids_of_the_vocabulary_or_a_bad_request(fields: Any, ids: list[int], params: Any):
    with contextlib.suppress(BadRequest):
        turn = parse(**{"input_ids": ids, "sampling_params": params, **fields}).turn
        assert all(0 <= i < 258 for i in ids_of(turn.input_ids or b""))
