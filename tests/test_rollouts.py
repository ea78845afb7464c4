"""A trainer's trials, against a gateway in memory: their names, what becomes of one that was there before, and what is lost."""

from __future__ import annotations

import pickle
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.config import TrialConfig
from rollout_ft.errors import BadRequest, ConfigError
from rollout_ft.integrations.rollouts import Rollout, TrialLost, agent_of, client_of, play, seed_of, trial_name
from rollout_ft.trial.agents import InlineAgent, ProcessAgent
from rollout_ft.trial.client import Client, Session
from rollout_ft.types import TRIAL_ID

META = {
    "generations": 1, "version_restarts": 0, "turns_committed": 1, "turns_in_trajectory": 1, "tokens_generated": 9, "tokens_reused": 0,
    "tokens_wasted": 0,
}  # fmt: skip


class Gateway:
    """The trials of a run, by name."""

    def __init__(self, paths: int = 1, refuse: BadRequest | None = None, **trials: str):
        self.paths, self.refuse, self.trials = paths, refuse, {name: self._trial(name, state) for name, state in trials.items()}
        self.released: list[str] = []

    def _trial(self, name: str, state: str) -> dict[str, Any]:
        return {
            "trial_id": name, "task_id": "t", "session_id": f"{name}~1", "attempt": 1, "state": state, "outcome": None, "reward": None,
            "cause": "", "recovery": "resume", "seconds": 1.0, "tainted": False, "fault": "", "metadata": META,
        }  # fmt: skip

    def _session(self, name: str) -> Session:
        trial = self.trials[name]
        return Session(trial["session_id"], name, trial["attempt"], "", f"key of {trial['session_id']}", 0, cast(Client, self))

    async def trial(self, name: str) -> dict[str, Any]:
        if name not in self.trials:
            raise BadRequest("no such trial", 404, "unknown_trial")
        return self.trials[name]

    async def open_session(self, *, trial_id: str, **request: Any) -> Session:
        if self.refuse is not None:
            raise self.refuse
        if trial_id in self.trials:
            raise BadRequest("there is one", 409, "trial_exists")
        self.trials[trial_id] = self._trial(trial_id, "running")
        return self._session(trial_id)

    async def restart(self, name: str, from_attempt: int, checkpoint: bool, reason: str, cause: str) -> Session:
        self.trials[name] |= {"attempt": from_attempt + 1, "session_id": f"{name}~{from_attempt + 1}"}
        return self._session(name)

    async def outcome(self, name: str, outcome: str, reward: float | None, cause: str, attempt: int) -> dict[str, Any]:
        self.trials[name] |= {"state": "ended", "outcome": outcome, "reward": reward, "cause": cause}
        return self.trials[name]

    async def trajectory(self, session_id: str, session_key: str) -> dict[str, Any]:
        assert session_key == f"key of {session_id}"
        return {"session_id": session_id, "paths": [{}] * self.paths}

    async def release(self, name: str) -> None:
        self.released.append(name)

    async def still_s(self) -> float:
        return 0.0


async def played(gateway: Gateway, agent: Any = None, name: str = "a") -> Rollout:
    async def scored(task: Any, session: Session) -> float:
        return 0.5

    config = TrialConfig(max_agent_restarts=0)
    return await play(cast(Client, gateway), InlineAgent(agent or scored), config, {"task_id": "t"}, name)


@given(st.lists(st.text(max_size=80) | st.integers(), min_size=1, max_size=4))
def test_whatever_a_trainer_calls_its_samples_is_a_trial_and_always_the_same(parts: list[Any]):
    assert TRIAL_ID.fullmatch(trial_name(*parts))
    assert trial_name(*parts) == trial_name(*parts)


@given(st.text(max_size=200), st.text(max_size=200))
def test_two_samples_are_two_trials(one: str, other: str):
    assert (trial_name(one) == trial_name(other)) == (one == other)


def test_a_name_that_can_be_a_trials_is_left_as_it_is():
    assert trial_name("verl", "3f2a", 7) == "verl-3f2a-7"


@given(st.integers(), st.integers())
def test_seeds_are_what_a_session_takes(one: int, other: int):
    assert -(2**63) <= seed_of(one, other) < 2**63
    assert seed_of(one, other) == seed_of(one, other)


async def test_a_trial_is_played_read_with_its_own_key_and_forgotten():
    gateway = Gateway()
    rollout = await played(gateway)
    assert (rollout.result.reward, rollout.trajectory["session_id"], gateway.released) == (0.5, "a~1", ["a"])


async def test_a_trial_that_still_runs_is_gone_on_with():
    rollout = await played(Gateway(a="running"))
    assert (rollout.result.attempts, rollout.trajectory["session_id"]) == (2, "a~2")


@pytest.mark.parametrize("state", ["ended", "released"])
async def test_a_trial_that_has_ended_is_played_anew_under_another_name(state: str):
    rollout = await played(Gateway(a=state))
    assert rollout.result.trial_id.startswith("a-")
    assert rollout.result.attempts == 1


async def test_a_trial_without_a_turn_is_lost():
    with pytest.raises(TrialLost, match="made no request"):
        await played(Gateway(paths=0))


async def test_a_trial_whose_agent_failed_is_lost_and_has_no_reward():
    async def failing(task: Any, session: Session) -> float:
        raise ValueError("of its own")

    gateway = Gateway()
    with pytest.raises(TrialLost, match=r"agent_failed.*of its own"):
        await played(gateway, failing)
    assert gateway.trials["a"]["reward"] is None


async def test_a_run_that_does_not_answer_loses_the_trial_and_a_wrong_key_is_the_trainers_to_see():
    with pytest.raises(TrialLost, match="infra_exhausted"):
        await played(Gateway(refuse=BadRequest("the gateway does not answer", 503, "unreachable")))
    with pytest.raises(BadRequest, match="key"):
        await played(Gateway(refuse=BadRequest("this route needs the operator's key", 401, "invalid_api_key")))


def test_what_is_lost_says_so_in_another_process():
    lost = TrialLost("a", "infra_exhausted", "engines")
    copy = pickle.loads(pickle.dumps(lost))
    assert (type(copy), str(copy), copy.outcome) == (TrialLost, str(lost), "infra_exhausted")


async def test_an_agent_is_a_function_an_agent_or_the_name_of_one():
    async def function(task: Any, session: Session) -> None: ...

    assert isinstance(agent_of(function), InlineAgent)
    assert isinstance(agent_of(f"{__name__}:played"), InlineAgent)
    assert agent_of(agent := ProcessAgent("rollout_ft.testing.quickstart_agent:run")) is agent


async def test_without_a_gateway_the_variables_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ROLLOUT_FT_GATEWAY_URL", raising=False)
    with pytest.raises(ConfigError, match="ROLLOUT_FT_GATEWAY_URL"):
        client_of(operator_key="k")


async def test_all_samples_of_a_loop_share_one_client():
    client = client_of("http://127.0.0.1:1", "k")
    assert client_of("http://127.0.0.1:1", "k") is client
    assert client_of("http://127.0.0.1:1", "other") is not client
    await client.aclose()
    await client_of("http://127.0.0.1:1", "other").aclose()
