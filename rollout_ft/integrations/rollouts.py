"""A trainer's trials: played at a gateway from whatever process the trainer has, and what became of each.

Owns what the adapters of trainers have in common: the client of a process, the names of trials, the way from a task to
its rows. Knows no trainer. A trial that is lost is an exception, never a row with a reward of 0.

The subtle invariant: a trial that still runs is gone on with by whoever asks for it by its name, as when the worker that
played it died; one that has ended is not given out again, so that a trainer that repeats a step samples anew.
"""

from __future__ import annotations

import asyncio
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, cast
from weakref import WeakKeyDictionary

from rollout_ft.config import TrialConfig
from rollout_ft.errors import BadRequest, ConfigError, RolloutFTError
from rollout_ft.samples.rows import rows_of
from rollout_ft.trial.agents import Agent, InlineAgent, resolve
from rollout_ft.trial.attempt import workshop
from rollout_ft.trial.client import Client, Session
from rollout_ft.trial.policy import AttemptEnd
from rollout_ft.trial.runner import TrialResult, TrialRunner
from rollout_ft.types import JSON, TRIAL_ID, Outcome

GATEWAY_URL, OPERATOR_KEY = "ROLLOUT_FT_GATEWAY_URL", "ROLLOUT_FT_OPERATOR_KEY"
TRAINABLE = (Outcome.COMPLETED, Outcome.TRUNCATED)
_NAME_CHARS = 100
_FAULTS_OF_A_RUN = (404, 409)
_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], Client]] = WeakKeyDictionary()


class TrialLost(RolloutFTError):
    """A trial that gave nothing to train on; the trainer's own way with failed samples decides about its group."""

    def __init__(self, trial_id: str, outcome: str, cause: str):
        super().__init__(trial_id, outcome, cause)
        self.trial_id, self.outcome, self.cause = trial_id, outcome, cause

    def __str__(self) -> str:
        return f"trial {self.trial_id} was lost ({self.outcome}): {self.cause}"


@dataclass(frozen=True, slots=True)
class Rollout:
    """A trial that can be trained on: it has at least one path."""

    result: TrialResult
    trajectory: JSON

    @property
    def rows(self) -> list[JSON]:
        """`samples.rows`: one of each path. A reward of None means that no verifier spoke."""
        return rows_of(self.trajectory, self.result.reward, self.result.outcome)


def client_of(gateway_url: str = "", operator_key: str = "") -> Client:
    """The client of the running loop, to which its connections belong. What is not given comes from the environment."""
    where = (gateway_url or os.environ.get(GATEWAY_URL, ""), operator_key or os.environ.get(OPERATOR_KEY, ""))
    if not all(where):
        raise ConfigError(f"set {GATEWAY_URL} and {OPERATOR_KEY} in this process to what `rollout-ft serve` prints")
    mine = _clients.setdefault(asyncio.get_running_loop(), {})
    if where not in mine:
        mine[where] = Client(*where)
    return mine[where]


def agent_of(agent: str | Agent | Callable[..., Any]) -> Agent:
    """An async function of (task, session) that returns the reward or None, an agent of `trial.agents`, or `module:name` of
    one of them."""
    found: Any = resolve(agent)[1] if isinstance(agent, str) else agent
    return cast(Agent, found) if hasattr(found, "run") else InlineAgent(found)


def trial_name(*parts: object) -> str:
    """The name of the trial of these parts, the same whoever asks. What no trial may be called is told apart by a digest."""
    name = "-".join(str(part) for part in parts)
    if TRIAL_ID.fullmatch(name):
        return name
    plain = re.sub(r"[^A-Za-z0-9._:-]+", "_", name)[:_NAME_CHARS].lstrip("._:-")
    return f"{plain or 'trial'}-{blake2b(name.encode(), digest_size=8).hexdigest()}"


def seed_of(*parts: object) -> int:
    """For trainers that want the same samples from the same prompts in every run."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little", signed=True)


async def play(client: Client, agent: Agent, config: TrialConfig, task: JSON, trial_id: str) -> Rollout:
    """A trial to its outcome, attempt by attempt; the run forgets it then. Raises TrialLost."""
    keyed = _Keyed(agent)
    try:
        name = await _unused(client, trial_id)
        async with workshop(config, None, None) as shop:
            result, trajectory = await TrialRunner(client, keyed, config, keyed.key_of, resume=True, workshop=shop).trial(task, name)
        await client.release(name)
    except BadRequest as e:
        if e.status < 500 and e.status not in _FAULTS_OF_A_RUN:
            raise  # a wrong key or a parameter that cannot be would lose every trial, one by one
        raise TrialLost(trial_id, Outcome.INFRA_EXHAUSTED.value, str(e)) from e
    if result.outcome not in TRAINABLE:
        raise TrialLost(name, result.outcome, result.cause)
    if not trajectory["paths"]:
        raise TrialLost(name, result.outcome, "the agent made no request that was answered")
    return Rollout(result, trajectory)


async def _unused(client: Client, trial_id: str) -> str:
    """The name itself, or another like it when a trial of this name has ended."""
    try:
        state = (await client.trial(trial_id))["state"]
    except BadRequest as e:
        if e.status != 404:
            raise
        return trial_id
    return trial_id if state == "running" else f"{trial_id[:_NAME_CHARS]}-{uuid.uuid4().hex[:8]}"


class _Keyed:
    """An agent, and the keys of the sessions that it was given: the trajectory is read with the last one's."""

    def __init__(self, agent: Agent):
        self._agent = agent
        self._keys: dict[str, str] = {}

    async def run(self, task: JSON, session: Session) -> AttemptEnd:
        self._keys[session.session_id] = session.api_key
        return await self._agent.run(task, session)

    def key_of(self, session_id: str) -> str:
        if session_id not in self._keys:
            raise BadRequest(f"session {session_id} was opened by somebody else, who ended its trial", 409, "trial_ended")
        return self._keys[session_id]
