"""The training loop of examples/grpo: faults change neither what is learned nor from what."""

from __future__ import annotations

import asyncio
import math
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray_run import MARK, nothing_left
from safetensors.torch import save_file

from examples.grpo import train
from examples.grpo.policy import Policy
from rollout_ft.testing.faults import Kind
from rollout_ft.testing.small_engine import MODEL_DIR
from rollout_ft.testing.small_engine.model import Sampling
from rollout_ft.testing.small_engine.transformer import Transformer
from rollout_ft.testing.small_engine.vocabulary import load_vocabulary

VOCABULARY = load_vocabulary(MODEL_DIR)
GREEDY = Sampling(1.0, 1.0, 0, 0.0, 0, False, frozenset())
rewards = st.floats(0, 1, width=32)


@given(known=st.lists(rewards, min_size=1, max_size=8), lost=st.lists(st.integers(0, 8), max_size=8))
def test_a_lost_trial_moves_nobodys_advantage_and_has_none(known: list[float], lost: list[int]):
    whole: dict[str, float | None] = {f"kept-{i}": reward for i, reward in enumerate(known)}
    members = list(whole.items())
    for i, at in enumerate(lost):
        members.insert(min(at, len(members)), (f"lost-{i}", None))
    assert train.advantages(dict(members)) == train.advantages(whole)
    assert train.advantages(whole).keys() == whole.keys()


@given(known=st.lists(rewards, min_size=2, max_size=8))
def test_the_advantages_of_a_group_cancel_out_and_rank_as_the_rewards_do(known: list[float]):
    found = train.advantages({str(i): reward for i, reward in enumerate(known)})
    assert math.isclose(sum(found.values()), 0, abs_tol=1e-6)
    assert all((found[str(i)] < found[str(j)]) <= (known[i] < known[j]) for i in range(len(known)) for j in range(len(known)))


def test_a_group_of_which_every_trial_was_lost_teaches_nothing():
    assert train.advantages({"a": None, "b": None}) == {}


def row(trial: str, reward: float | None, prompt: list[int], response: list[int], mask: list[int]) -> dict[str, Any]:
    logprobs = -np.arange(1, len(response) + 1, dtype=np.float32) * np.array(mask, np.float32)
    return {
        "trial_id": trial, "group_id": trial[0], "reward": reward, "prompt_ids": np.array(prompt, np.int32),
        "response_ids": np.array(response, np.int32), "loss_mask": np.array(mask, np.int8), "rollout_log_probs": logprobs,
    }  # fmt: skip


def test_a_batch_has_what_belongs_to_each_token_at_its_place_and_no_lost_trial():
    rows = [row("a1", 1.0, [5, 6], [7, 8, 9], [1, 0, 1]), row("a2", 0.0, [5], [7], [1]), row("a3", None, [5], [7], [1])]
    ids, mask, sampled, advantage = train.batch(rows)
    assert ids.tolist() == [[5, 6, 7, 8, 9], [5, 7, 0, 0, 0]]
    assert mask.tolist() == [[0, 1, 0, 1], [1, 0, 0, 0]]
    assert sampled.tolist() == [[0, -1, 0, -3], [-1, 0, 0, 0]]
    assert advantage[0].item() == pytest.approx(-advantage[1].item())


@settings(max_examples=15, deadline=None)
@given(ids=st.lists(st.lists(st.sampled_from(VOCABULARY.printable), min_size=2, max_size=80), min_size=1, max_size=3))
def test_the_policys_logprobs_are_the_engines_up_to_rounding(ids: list[list[int]]):
    engine, policy = Transformer(VOCABULARY), Policy("some name")
    engine.load("some name")
    lengths = [len(sequence) for sequence in ids]
    padded = torch.zeros(len(ids), max(lengths), dtype=torch.long)
    for i, sequence in enumerate(ids):
        padded[i, : len(sequence)] = torch.tensor(sequence)
    with torch.no_grad():
        found = policy.logprobs(padded)
    for i, sequence in enumerate(ids):
        scores = engine.score(np.array(sequence, np.int32), GREEDY)
        np.testing.assert_allclose(found[i, : len(sequence) - 1], np.array(scores[1:], np.float32), rtol=0, atol=5e-5)


def test_an_engine_that_loads_a_policys_file_computes_with_its_weights(tmp_path: Path):
    policy, prompt = Policy("other"), np.array(VOCABULARY.encode("Now only words that begin with c"), np.int32)
    save_file(policy.state_dict(), tmp_path / "model.safetensors")
    loaded, named = Transformer(VOCABULARY), Transformer(VOCABULARY)
    loaded.load("its digest", (tmp_path / "model.safetensors").read_bytes())
    named.load("other")
    assert loaded.score(prompt, GREEDY) == named.score(prompt, GREEDY)


@pytest.mark.parametrize("damage", ["truncated", "missing", "shape", "dtype"])
def test_a_file_that_does_not_fit_is_refused_by_name_and_leaves_the_weights_as_they_were(tmp_path: Path, damage: str):
    state, engine = Policy("other").state_dict(), Transformer(VOCABULARY)
    before = engine.weights
    if damage == "missing":
        del state["into.1"]
    elif damage != "truncated":
        state["into.1"] = state["into.1"][:, :10].contiguous() if damage == "shape" else state["into.1"].double()
    save_file(state, tmp_path / "model.safetensors")
    file = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="cannot be read" if damage == "truncated" else r"into\.1 .* float32 of \(64, 224\)"):
        engine.load("its digest", file[:100] if damage == "truncated" else file)
    assert engine.weights is before


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_the_losses_with_faults_in_every_step_are_those_without_to_the_bit():
    few = train.Settings(steps=2, groups=2, siblings=3, max_tokens=12, epochs=2)
    mark = os.environ[MARK] = uuid.uuid4().hex
    broken, clean = asyncio.run(train.plays(few, [True, False], ["engine.count=2"]))
    asyncio.run(nothing_left(mark))
    assert [(step.loss, step.reward) for step in broken] == [(step.loss, step.reward) for step in clean]
    assert all(step.met for step in broken)
    assert {fault.kind for step in broken for fault in step.met} >= {Kind.ENGINE_KILL, Kind.CUT}
    assert not any(step.met or step.restarts for step in clean)
    assert not any(step.lost for step in (*broken, *clean))
    assert max(step.drift for step in (*broken, *clean)) < 1e-4
    assert broken[0].loss != 0
