"""A session as the samples that miles' driver collects: their fields, what a limit cuts, and what is nobody's to overwrite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import ask, assistant, begin, play, user
from hypothesis import given
from hypothesis import strategies as st
from samples_wire import Reply, read
from test_trajectory import conversation, tree

from rollout_ft.samples.collect import Unassembled, Wanted, samples_body
from rollout_ft.samples.trajectory import max_trim, records, trajectory, trajectory_of
from rollout_ft.session.session import Session
from rollout_ft.testing.plain import PlainTemplate
from rollout_ft.types import JSON


def text(ids: list[int]) -> str:
    return PlainTemplate().text(ids, keep_special=True)


def collected(made: JSON, max_seq_len: int | None = None, metadata: JSON | None = None, *, tainted: bool = False) -> Reply:
    return read(samples_body(made, Wanted(max_seq_len, metadata or {}), text, tainted=tainted, max_trim_tokens=0))


def fake_path(*spans: tuple[int, int], **fields: Any) -> JSON:
    """A path whose turns have these spans; ids are their own positions."""
    length = spans[-1][1]
    mask = np.zeros(length, np.int8)
    for start, end in spans:
        mask[start:end] = 1
    turns = [{"turn": f"t{i}", "start": a, "end": b, "evidence": "acknowledged", "finish_reason": "stop", "sampling": {}, "generations": 1}
             for i, (a, b) in enumerate(spans)]  # fmt: skip
    return {
        "token_ids": np.arange(length, dtype=np.int32), "loss_mask": mask, "logprobs": -np.arange(length, dtype=np.float32), "turns": turns,
        "version_spans": [{"version": str(i), "start": a, "end": b} for i, (a, b) in enumerate(spans)], "finish_reason": "stop",
        "evidence": "acknowledged", "resampled": False, **fields,
    }  # fmt: skip


def fake(*paths: JSON) -> JSON:
    about = {"session_id": "t~1", "trial_id": "t", "task_id": "", "group_id": "", "attempt": 1}
    return {**about, "paths": list(paths), "metadata": {"replayed": 0, "tokens_reused": 0}}


def test_a_sample_is_a_path_from_its_first_sampled_token_on(session: Session):
    conversation(session, 3)
    made = trajectory(session)
    (path,) = made["paths"]
    (sample,) = collected(made).samples
    start = path["turns"][0]["start"]
    assert sample["tokens"].tolist() == path["token_ids"].tolist()
    assert sample["loss_mask"].tolist() == path["loss_mask"][start:].tolist()
    assert sample["rollout_log_probs"].tolist() == path["logprobs"][start:].tolist()
    assert sample["response"] == text(path["token_ids"][start:].tolist())
    assert (sample["status"], sample["weight_versions"], sample["reward"]) == ("completed", ["v0"], None)
    assert collected(made).session["accumulated_token_ids"] == path["token_ids"].tolist()


def test_a_session_without_turns_says_so(session: Session):
    assert (collected(trajectory(session)).samples, collected(trajectory(session)).empty_reason) == ([], "no_records")


def test_every_path_is_a_sample_and_every_sampled_token_is_trained_in_one(session: Session):
    tree(session)
    made = trajectory(session)
    samples = collected(made).samples
    assert [s["tokens"].tolist() for s in samples] == [p["token_ids"].tolist() for p in made["paths"]]
    assert sum(int(s["loss_mask"].sum()) for s in samples) == sum(int(p["loss_mask"].sum()) for p in made["paths"])


def test_a_driver_that_takes_one_sample_gets_the_path_to_the_turn_asked_for_last_with_all_of_its_own_tokens(session: Session):
    messages, nodes = conversation(session, 2)
    play(session, ask(*messages[:2], user("other way")), "o")
    last = play(session, ask(*messages, user("on")), "r2")
    (sample,) = collected(trajectory_of(session, linear=True)()).samples
    assert int(sample["loss_mask"].sum()) == sum(len(n.turn.output_ids) // 4 for n in [*nodes, last])


def test_an_attempt_that_met_a_fault_has_masked_aborted_samples_and_no_reward(session: Session):
    conversation(session, 2)
    (sample,) = collected(trajectory(session), metadata={"reward": 1.0}, tainted=True).samples
    assert (sample["status"], sample["reward"], int(sample["loss_mask"].sum())) == ("aborted", None, 0)


def test_what_the_agent_notes_is_with_every_sample_and_overwrites_nothing_of_ours(session: Session):
    tree(session)
    told = {"reward": 0.5, "note": "x", "rollout_ft": "no", "accumulated_token_ids": [], "leaf": 1, "tito_session_mismatch": []}
    reply = collected(trajectory(session), metadata=told)
    for sample in reply.samples:
        assert (sample["reward"], sample["metadata"]["note"]) == (0.5, "x")
        assert sample["metadata"]["rollout_ft"]["trial_id"] == "t1"
        assert not {"accumulated_token_ids", "leaf", "tito_session_mismatch"} & sample["metadata"].keys()
    assert reply.session["accumulated_token_ids"] != []


def test_a_turn_over_the_limit_is_cut_and_what_follows_is_left_out():
    made = fake(fake_path((2, 4), (6, 9), (11, 14)))
    (sample,) = collected(made, 8).samples
    assert (len(sample["tokens"]), sample["status"], sample["loss_mask"].tolist()) == (8, "truncated", [1, 1, 0, 0, 1, 1])
    assert sample["weight_versions"] == ["0", "1"]


@pytest.mark.parametrize("limit", [4, 5, 6])
def test_a_turn_of_which_no_token_fits_is_left_out_with_its_prompt(limit: int):
    (sample,) = collected(fake(fake_path((2, 4), (6, 9))), limit).samples
    assert (len(sample["tokens"]), sample["status"]) == (4, "completed")


@pytest.mark.parametrize("limit", [1, 2])
def test_where_not_even_the_first_turn_fits_the_answer_is_empty_and_says_why(limit: int):
    reply = collected(fake(fake_path((2, 4), (6, 9))), limit)
    assert (reply.samples, reply.empty_reason) == ([], "all_truncated")


def test_a_path_whose_own_tokens_are_all_cut_away_is_no_second_sample():
    shared, other = fake_path((2, 4), (6, 9)), fake_path((2, 4), (7, 12))
    other["loss_mask"][2:4] = 0
    assert len(collected(fake(shared, other), 7).samples) == 1
    assert len(collected(fake(shared, other), 8).samples) == 2


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6), st.integers(1, 60))
def test_no_sample_is_longer_than_the_limit_and_every_one_ends_with_a_sampled_token(parts: list[tuple[int, int]], limit: int):
    spans: list[tuple[int, int]] = []
    at = 0
    for asked, said in parts:
        spans.append((at + asked, at + asked + said))
        at += asked + said
    path = fake_path(*spans)
    for sample in collected(fake(path), limit).samples:
        size = len(sample["tokens"])
        assert size <= limit
        assert sample["loss_mask"][-1] == 1
        assert size == limit or size in [end for _, end in spans]
        assert sample["tokens"].tolist() == path["token_ids"][:size].tolist()


def with_experts(*missing: tuple[int, int]) -> JSON:
    rows = np.arange(8 * 2 * 2, dtype=np.uint8).reshape(8, 2, 2)
    return fake_path((2, 4), (6, 9), routed_experts=rows, routed_experts_missing=[list(m) for m in missing])


def test_routed_experts_have_a_row_less_than_the_sample_has_tokens():
    made = fake(with_experts())
    (whole,), (cut,) = collected(made).samples, collected(made, 7).samples
    assert np.array_equal(whole["rollout_routed_experts"], made["paths"][0]["routed_experts"])
    assert np.array_equal(cut["rollout_routed_experts"], made["paths"][0]["routed_experts"][:6])


def test_a_path_ends_before_the_turn_whose_routed_experts_are_missing():
    (sample,) = collected(fake(with_experts((5, 6)))).samples
    assert (len(sample["tokens"]), len(sample["rollout_routed_experts"]), sample["status"]) == (4, 3, "completed")


def test_routed_experts_that_are_missing_from_the_first_turn_on_make_no_sample():
    with pytest.raises(Unassembled, match="routed experts are missing from row 1"):
        collected(fake(with_experts((1, 8))))


def test_the_records_of_a_session_align_with_all_its_tokens(session: Session):
    """As miles' older driver does it: each reply is found behind its own prompt, and nothing is left over."""
    messages, _ = conversation(session, 3)
    play(session, ask(*messages, user("more")), "last")
    begin(session, ask(user("in flight")))
    told = records(session)
    accumulated, cursor = told["metadata"]["accumulated_token_ids"].tolist(), 0
    for record in told["records"]:
        (choice,) = record["response"]["choices"]
        output = [token for _, token, _ in choice["meta_info"]["output_token_logprobs"]]
        assert choice["meta_info"]["completion_tokens"] == len(output)
        cursor = len(record["request"]["input_ids"])
        assert accumulated[cursor : cursor + len(output)] == output
        cursor += len(output)
        assert (record["method"], record["path"], record["status_code"]) == ("POST", "/v1/chat/completions", 200)
        assert choice["message"] == record["response"]["message"]
    assert cursor == len(accumulated)
    assert told["metadata"]["max_trim_tokens"] == max_trim(session)


def test_a_reply_that_a_client_altered_is_another_path_of_the_same_samples(session: Session):
    play(session, ask(user("a")), "one")
    play(session, ask(user("a"), assistant("two"), user("b")), "three")
    assert len(collected(trajectory(session)).samples) == 2
