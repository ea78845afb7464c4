"""The `Sample` of slime and miles, filled by a trial.

Owns what the two have in common: the settings that stand in their `args`, the fields of a sample and what they say of a trial
that was lost. Imports neither. Their word for such a trial is the status `aborted`: it is not scored, and its group goes back
to the data source or is dropped and another drawn, where the group's filter or buffer sees to it. A reward of None beside any
other status means *compute it*, so it is for trials that ended whole and whose agent gave none, and for nothing else.

The subtle invariant: a sample that comes back to be generated again is as it was before; nothing of the lost trial is in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from rollout_ft.config import TrialConfig
from rollout_ft.errors import BadRequest, ConfigError
from rollout_ft.integrations.rollouts import Rollout, TrialLost, client_of, play, trial_name
from rollout_ft.samples.collect import Unassembled, cut
from rollout_ft.samples.rows import rows_of
from rollout_ft.trial.agents import Agent
from rollout_ft.trial.client import Client, Session
from rollout_ft.trial.policy import AttemptEnd
from rollout_ft.types import JSON, Outcome

_log = logging.getLogger("rollout_ft")
ABORT_POLL_S = 0.5
"""The trainer sets a flag when it wants no more samples, and waits for those that run."""
CANCEL_S = 10.0
ABORTED = "the trainer aborted its rollout"
SAMPLING = frozenset({
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "max_new_tokens",
    "min_new_tokens", "stop", "stop_token_ids", "ignore_eos",
})  # fmt: skip
"""Of a trainer's sampling parameters; the others shape text and no token. `sampling_seed` becomes the trial's seed."""
FORM = ("skip_special_tokens", "no_stop_trim")
"""What shapes only the text of a chat completion: a gateway refuses it."""
_PROVENANCE = (
    "trial_id", "outcome", "attempts", "turns_replayed", "tokens_reused", "path", "continuations", "uncertain_turns", "version_spans",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trainer:
    """A trainer's process: its `args`, its tokenizer's way from ids to text, and whether it wants no more samples.

    `name` begins the names of its trials, `keeper` is the path of the filter that drops groups with a lost trial.
    """

    args: Any
    name: str
    keeper: str
    text: Callable[[list[int]], str]
    aborted: Callable[[], bool]

    def said(self, key: str, otherwise: Any = None) -> Any:
        value = getattr(self.args, key, None)
        return otherwise if value is None else value

    @property
    def client(self) -> Client:
        return client_of(self.said("rollout_ft_gateway_url", ""), self.said("rollout_ft_operator_key", ""))

    def limit(self, evaluation: bool) -> int | None:
        """The tokens that a sample may have."""
        own = self.said("eval_max_context_len") if evaluation else None
        return own or self.said("max_seq_len") or self.said("rollout_max_context_len")

    def check(self, evaluation: bool) -> None:
        """Raises ConfigError where the trainer would score or ship a trial that was lost."""
        if self.said("group_rm"):
            raise ConfigError("group_rm scores the trials of a group that were lost as well: let the agent or a custom_rm_path score")
        if self.said("partial_rollout"):
            raise ConfigError("partial_rollout keeps half samples: unset it; a trial that is cut short by a fault goes on by itself")
        by_itself = "fully_async" in self.said("rollout_function_path", "")
        if not evaluation and not by_itself and not self.said("dynamic_sampling_filter_path"):
            raise ConfigError(
                f"a lost trial has no reward, and its group would be trained on: set dynamic_sampling_filter_path to {self.keeper}"
            )


async def generate(
    trainer: Trainer, agent: Agent, sample: Any, sampling_params: Mapping[str, Any], evaluation: bool, notes: JSON | None = None
) -> Any:
    """The sample, filled; a list of one for each path where a trial has several. `notes` is what the agent leaves for the
    trainer's reward function, in the samples' metadata."""
    trainer.check(evaluation)
    clear(sample)
    task, seen = task_of(sample, sampling_params, evaluation), _Seen(agent)
    config = TrialConfig(**trainer.said("rollout_ft_trial", {}))
    name = trial_name(trainer.said("rollout_ft_prefix", trainer.name), "eval" if evaluation else "train", sample.index)
    playing = asyncio.create_task(play(trainer.client, seen, config, task, name))
    try:
        while not playing.done() and not trainer.aborted():
            await asyncio.wait({playing}, timeout=ABORT_POLL_S)
        if not playing.done():
            raise TrialLost(name, Outcome.CANCELLED.value, ABORTED)
        return fill(trainer, sample, playing.result(), evaluation, notes or {})
    except (TrialLost, Unassembled) as e:
        _log.warning("sample.aborted index=%s: %s", sample.index, e)
        return lost(trainer, sample, evaluation)
    finally:
        if not playing.done():
            playing.cancel()
            await asyncio.wait({playing})
            await seen.cancel(trainer.client)


def clear(sample: Any) -> None:
    """As the data source gave it."""
    sample.tokens, sample.response, sample.response_length, sample.weight_versions = [], "", 0, []
    sample.loss_mask = sample.rollout_log_probs = sample.rollout_routed_experts = sample.reward = None
    sample.remove_sample = False
    sample.status = _status(sample).PENDING


def lost(trainer: Trainer, sample: Any, evaluation: bool) -> Any:
    """Aborted, masked and without a reward. An evaluation cannot draw another, and takes the mean of numbers: its reward is
    not a number, and so is the mean."""
    sample.status, sample.remove_sample = _status(sample).ABORTED, True
    sample.loss_mask, sample.rollout_log_probs = [], []
    if evaluation:
        sample.reward = _reward(trainer, math.nan)
    return sample


def task_of(sample: Any, params: Mapping[str, Any], evaluation: bool) -> JSON:
    """What the agent is given, and what the trial's session is opened with."""
    seed = params.get("sampling_seed")
    return {
        "task_id": str(sample.index), "group_id": str(sample.group_index), "prompt": sample.prompt, "label": sample.label,
        "metadata": dict(sample.metadata or {}), "mode": "eval" if evaluation else "train",
        "sampling": {name: value for name, value in params.items() if name in SAMPLING and value is not None},
        **({"seed": seed} if seed is not None else {}),
    }  # fmt: skip


def fill(trainer: Trainer, sample: Any, rollout: Rollout, evaluation: bool, notes: JSON) -> Any:
    """Raises TrialLost where nothing is left to train on, Unassembled where routed experts are wanted and missing."""
    trajectory, result = rollout.trajectory, rollout.result
    paths = [path for path in (cut(each, trainer.limit(evaluation)) for each in trajectory["paths"]) if path is not None]
    if not paths:
        raise TrialLost(result.trial_id, result.outcome, "no turn fits into the tokens that a sample may have")
    rows = rows_of({**trajectory, "paths": paths}, result.reward, result.outcome)
    made = [sample, *(copy.deepcopy(sample) for _ in rows[1:])]
    for each, row in zip(made, rows, strict=True):
        _fill(trainer, each, row, notes)
    if len(made) > 1 and hasattr(sample, "rollout_id"):
        for each in made:  # one execution, however many samples
            each.rollout_id = sample.rollout_id if sample.rollout_id is not None else sample.index
    return made if len(made) > 1 else sample


def _fill(trainer: Trainer, sample: Any, row: JSON, notes: JSON) -> None:
    status, routed = _status(sample), row["rollout_routed_experts"]
    prompt, response = row["prompt_ids"].tolist(), row["response_ids"].tolist()
    sample.tokens, sample.response, sample.response_length = prompt + response, trainer.text(response), len(response)
    sample.loss_mask, sample.rollout_log_probs = row["loss_mask"].tolist(), row["rollout_log_probs"].tolist()
    sample.rollout_routed_experts = None if routed is None else np.ascontiguousarray(routed, np.int32)
    sample.weight_versions = row["weight_versions"]
    truncated = Outcome.TRUNCATED.value == row["outcome"] or row["finish_reason"] == "length"
    sample.status = status.TRUNCATED if truncated else status.COMPLETED
    sample.reward = None if row["reward"] is None else _reward(trainer, row["reward"])
    sample.metadata = {**(sample.metadata or {}), **notes, "rollout_ft": {name: row[name] for name in _PROVENANCE}}


def _reward(trainer: Trainer, reward: float) -> Any:
    """A number, or what the trainer looks for one in."""
    keys = [key for key in (trainer.said("reward_key"), trainer.said("eval_reward_key")) if key]
    return dict.fromkeys(keys, reward) if keys else reward


def whole(samples: Sequence[Any]) -> bool:
    """Whether a group has lost none of its trials."""
    return all(each.status.value != "aborted" for each in _each(samples))


def _each(samples: Sequence[Any]) -> Iterator[Any]:
    for one in samples:
        yield from cast("list[Any]", one) if isinstance(one, list) else [one]


def _status(sample: Any) -> Any:
    """The trainer's own words, which are its sample's."""
    return sample.Status


class _Seen:
    """An agent, and the session that it was given last: a trial that is given up has to be ended by its name."""

    def __init__(self, agent: Agent):
        self._agent = agent
        self._session: Session | None = None

    async def run(self, task: JSON, session: Session) -> AttemptEnd:
        self._session = session
        return await self._agent.run(task, session)

    async def cancel(self, client: Client) -> None:
        if self._session is None:
            return
        trial_id, attempt = self._session.trial_id, self._session.attempt
        with contextlib.suppress(BadRequest, TimeoutError):
            async with asyncio.timeout(CANCEL_S):
                await client.outcome(trial_id, Outcome.CANCELLED.value, None, ABORTED, attempt)
                await client.release(trial_id)
