"""Whether an engine of somebody else can be used: every refusal and warning names what to change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rollout_ft.engine.fit import Facts, Wanted, facts_of, judge, router_facts, started_of

SERVER: dict[str, Any] = {
    "version": "0.5.23", "context_length": None, "dp_size": 1, "attn_dp_size": 1, "disaggregation_mode": "null",
    "incremental_streaming_output": True, "enable_memory_saver": False, "enable_return_routed_experts": False,
    "startup_time": {"load_weight": 0.0296, "tokenizer_e2e": 1.8306}, "internal_states": [{}],
}  # fmt: skip
MODEL: dict[str, Any] = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tokenizer_path": "/models/q", "weight_version": "default",
}  # fmt: skip
MODELS: dict[str, Any] = {"data": [{"id": "q", "max_model_len": 32768}]}
WANTED = Wanted(32768, "qwen3", ("Qwen3ForCausalLM",), "/models/q")


def facts(**server: Any) -> Facts:
    return facts_of({**SERVER, **server}, MODEL, MODELS)


def test_an_engine_of_the_same_model_fits():
    assert judge(facts(), WANTED) == judge(facts(), WANTED, ([1, 2], [1, 2]))
    assert not judge(facts(), WANTED).refused
    assert not judge(facts(), WANTED).warnings


def test_what_an_engine_leaves_out_is_taken_to_be_fine():
    fit = judge(facts_of({}, {}, {}), WANTED)
    assert not fit.refused
    assert not fit.warnings


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_half_a_pair_is_no_engine(mode: str):
    assert "attach their router" in judge(facts(disaggregation_mode=mode), WANTED).refused


@pytest.mark.parametrize(
    ("version", "fits"), [("0.5.19", False), ("0.5.20", True), ("0.6.0", True), ("0.5.20.post1", True), ("small", True)]
)
def test_sglang_must_not_be_older_than_what_is_relied_on(version: str, fits: bool):
    assert ("0.5.20 or later" not in judge(facts(version=version), WANTED).refused) == fits


def test_a_smaller_context_is_refused_with_the_key_and_the_option():
    refused = judge(replace(facts(), context_tokens=4096), WANTED).refused
    assert "set model.context_tokens to 4096" in refused
    assert "--context-length 32768" in refused
    assert not judge(replace(facts(), context_tokens=65536), WANTED).refused


@pytest.mark.parametrize("model", [{"model_type": "llama"}, {"architectures": ["LlamaForCausalLM"]}])
def test_another_model_is_refused(model: dict[str, Any]):
    assert "set model.path" in judge(facts_of(SERVER, {**MODEL, **model}, MODELS), WANTED).refused


def test_another_tokenizer_is_refused():
    assert "tokenizer" in judge(facts(), WANTED, ([1, 2], [1, 3])).refused


def test_routed_experts_that_an_engine_does_not_return_are_refused():
    wanted = replace(WANTED, routed_experts=True)
    assert "--enable-return-routed-experts" in judge(facts(), wanted).refused
    assert not judge(facts(enable_return_routed_experts=True), wanted).refused


def test_cumulative_streams_are_warned_of_with_their_cost():
    (warning,) = judge(facts(incremental_streaming_output=False), WANTED).warnings
    assert "--incremental-streaming-output" in warning
    assert "72 MiB for a turn of 8192 tokens instead of 0.3" in warning


def test_an_engine_whose_memory_can_be_taken_is_warned_of_with_the_remedy():
    fit = facts(enable_memory_saver=True)
    assert fit.memory_saver
    assert "engine.attach.memory_settle_s" in judge(fit, WANTED).warnings[0]


def test_a_router_is_warned_of_with_what_does_not_work():
    fit = router_facts(MODEL)
    assert fit.router
    assert "no /abort_request" in judge(fit, WANTED).warnings[0]


@pytest.mark.parametrize("told", [{"dp_size": 4}, {"attn_dp_size": 4}, {"internal_states": [{}] * 4}])
def test_ranks_are_counted_however_they_are_made(told: dict[str, Any]):
    assert facts(**told).ranks == 4


def test_another_start_has_another_mark():
    again = {"load_weight": 0.0297, "tokenizer_e2e": 1.8306}
    assert started_of(SERVER) == started_of({**SERVER})
    assert started_of(SERVER) != started_of({"startup_time": again})
    assert started_of({}) == ""
