"""SkyRL: a generator whose trials survive their faults.

Owns how trials become a `GeneratorOutput`, in the order of the input. Knows of a run what its gateway says. SkyRL has no sample
without a reward: a trial that is lost, or to which nobody gave a reward, takes its whole group out of the step, as SkyRL's own
generator for Harbor does it. Each sample of such a group is one token that is masked, with the stop reason `error` and equal
rewards, so that no baseline moves; the sampling filters of SkyRL drop or replace the group.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import skyrl.train.generators.base as _base  # pyright: ignore[reportMissingImports]
import skyrl.train.generators.utils as _utils  # pyright: ignore[reportMissingImports]

from rollout_ft.clock import monotonic
from rollout_ft.config import TrialConfig
from rollout_ft.errors import ConfigError
from rollout_ft.integrations.rollouts import Rollout, TrialLost, agent_of, client_of, play, trial_name
from rollout_ft.trial.agents import Agent
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON, Outcome

base: Any = _base
utils: Any = _utils
_log = logging.getLogger("rollout_ft")

NOT_SENT = frozenset({"logprobs", "prompt_logprobs", "max_tokens", "skip_special_tokens", "include_stop_str_in_output"})
"""Of SkyRL's sampling parameters: these are about the form of a reply, or the agent's to say."""
METRICS = "rollout_ft/"


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of the output, before SkyRL's own settings are applied to all of them."""

    prompt_ids: list[int]
    response_ids: list[int]
    loss_mask: list[int]
    logprobs: list[float]
    experts: list[Any]
    reward: float
    stop_reason: str
    is_last: bool = True


MASKED = Sample([0], [0], [0], [0.0], [], 0.0, "error")


class TrialGenerator(base.GeneratorInterface):
    """Each trajectory is a trial: `agent` talks to the base URL of its session, and is restarted from its checkpoint by faults.

    `generator_cfg` is SkyRL's `cfg.generator`. `agent`: see `rollouts.agent_of`; its task has the prompt's `messages`, the
    `sampling_params` and `env_class` of SkyRL, and the dataset's other columns as `fields`. `prefix` is what the names of
    this job's trials begin with: the same after a restart of the trainer, another in every other job. `truncated_reward` is for
    trials that reached a limit, of the context or of the time, before anybody gave a reward; None masks their groups.
    """

    def __init__(
        self, generator_cfg: Any, agent: str | Agent | Callable[..., Any], *, gateway_url: str = "", operator_key: str = "",
        prefix: str = "skyrl", trial: Mapping[str, Any] | None = None, truncated_reward: float | None = None,
    ):  # fmt: skip
        self._cfg, self._agent, self._where, self._prefix = generator_cfg, agent_of(agent), (gateway_url, operator_key), prefix
        self._trial = TrialConfig(**(trial or {}))
        self._truncated_reward = truncated_reward
        self._slots = asyncio.Semaphore(self._trial.concurrency)

    async def generate(self, input_batch: Any, disable_tqdm: bool = False) -> Any:
        """A `GeneratorOutput`. Raises what is wrong with the run or the config; a trial that is lost is a group that is masked."""
        tasks, instances = self._tasks(input_batch)
        try:
            async with asyncio.TaskGroup() as group:
                playing = [group.create_task(self._play(task)) for task in tasks]
        except ExceptionGroup as e:
            raise e.exceptions[0] from e  # what is wrong with the run is so for all of them
        rollouts, seconds = [played.result()[0] for played in playing], [played.result()[1] for played in playing]
        masked = {instance for instance, rollout in zip(instances, rollouts, strict=True) if rollout is None}
        rows = [
            [MASKED] if rollout is None or instance in masked else self._samples(rollout)
            for instance, rollout in zip(instances, rollouts, strict=True)
        ]
        metrics = _metrics(rollouts, len(masked))
        metrics[METRICS + "paths_left_out"] -= sum(len(each) - 1 for each in rows)
        return self._output(input_batch, rows, seconds, metrics)

    def _tasks(self, batch: Any) -> tuple[list[JSON], list[str]]:
        """What each agent is given, and the prompt that it is a sample of."""
        ids = batch.get("trajectory_ids") or [base.TrajectoryID(uuid.uuid4().hex, 0) for _ in batch["prompts"]]
        about: Any = batch.get("batch_metadata")
        extras: list[JSON] = batch.get("env_extras") or [{} for _ in ids]
        step = (about.training_phase, about.global_step) if about is not None else ("train", uuid.uuid4().hex[:8])
        params: JSON = dict(batch.get("sampling_params") or {})
        tasks = [
            {
                "task_id": each.instance_id[:256], "group_id": f"{step[1]}-{each.instance_id}"[:256],
                "trial_id": trial_name(self._prefix, *step, each.instance_id, each.repetition_id), "mode": step[0],
                "messages": prompt, "fields": fields, "env_class": env_class, "sampling_params": params,
                "sampling": {name: value for name, value in params.items() if name not in NOT_SENT and value is not None},
            }
            for each, prompt, env_class, fields in zip(ids, batch["prompts"], batch["env_classes"], extras, strict=True)
        ]  # fmt: skip
        return tasks, [each.instance_id for each in ids]

    async def _play(self, task: JSON) -> tuple[Rollout | None, float]:
        async with self._slots:
            began = monotonic()
            try:
                rollout = await play(client_of(*self._where), self._agent, self._trial, task, task["trial_id"])
                if self._reward(rollout.result) is None:
                    raise TrialLost(rollout.result.trial_id, rollout.result.outcome, "nobody gave it a reward")
                if any(path.get("routed_experts_missing") for path in rollout.trajectory["paths"]):
                    raise TrialLost(rollout.result.trial_id, rollout.result.outcome, "nobody knows the experts of some of its tokens")
            except TrialLost as e:
                _log.warning("trial.lost %s", e)
                return None, monotonic() - began
            return rollout, monotonic() - began

    def _samples(self, rollout: Rollout) -> list[Sample]:
        """One of each path where SkyRL trains step by step, else the last of them alone. The last has the reward."""
        rows = rollout.rows if self._cfg.step_wise_trajectories else rollout.rows[-1:]
        reward = self._reward(rollout.result) or 0.0
        return [self._sample(row, reward if row is rows[-1] else 0.0, row is rows[-1]) for row in rows]

    def _reward(self, result: TrialResult) -> float | None:
        return self._truncated_reward if result.reward is None and result.outcome == Outcome.TRUNCATED else result.reward

    def _sample(self, row: JSON, reward: float, is_last: bool) -> Sample:
        prompt, experts = row["prompt_ids"].tolist(), row["rollout_routed_experts"]
        if experts is None and self._cfg.inference_engine.enable_return_routed_experts:
            raise ConfigError("SkyRL replays the experts of tokens, and the run does not keep them: set samples.routed_experts=true")
        limit = _limit(self._cfg, len(prompt))
        cut = len(row["response_ids"]) > limit
        return Sample(
            prompt, row["response_ids"][:limit].tolist(), row["loss_mask"][:limit].tolist(), row["rollout_log_probs"][:limit].tolist(),
            [] if experts is None else experts[: len(prompt) + limit].tolist(), reward,
            "length" if cut or row["finish_reason"] == "length" else "stop", is_last,
        )  # fmt: skip

    def _output(self, batch: Any, rows: Sequence[list[Sample]], seconds: list[float], metrics: JSON) -> Any:
        samples = [sample for each in rows for sample in each]
        rewards, masks, reasons = [s.reward for s in samples], [s.loss_mask for s in samples], [s.stop_reason for s in samples]
        live = [s for s in samples if s is not MASKED]
        if live:  # what was masked tells nothing about the policy
            metrics |= utils.get_rollout_metrics(
                [s.response_ids for s in live], [s.reward for s in live], loss_masks=[s.loss_mask for s in live]
            )
        if self._cfg.zero_reward_on_non_stop:
            rewards = [reward if reason == "stop" else 0.0 for reward, reason in zip(rewards, reasons, strict=True)]
        if self._cfg.apply_overlong_filtering:
            masks = utils.apply_overlong_filtering(masks, reasons)
        params: JSON | None = batch.get("sampling_params")
        logprobs = self._cfg.sampling_params.logprobs if params is None else params.get("logprobs")
        ids = batch.get("trajectory_ids")
        return {
            "prompt_token_ids": [s.prompt_ids for s in samples], "response_ids": [s.response_ids for s in samples], "rewards": rewards,
            "loss_masks": masks, "stop_reasons": reasons, "rollout_metrics": metrics,
            "rollout_logprobs": [s.logprobs for s in samples] if logprobs is not None else None,
            "trajectory_ids": [each for each, row in zip(ids, rows, strict=True) for _ in row] if ids else None,
            "trajectory_generation_times": [s for s, row in zip(seconds, rows, strict=True) for _ in row],
            "rollout_expert_indices": [s.experts for s in samples] if self._cfg.inference_engine.enable_return_routed_experts else None,
            "is_last_step": [s.is_last for s in samples] if self._cfg.step_wise_trajectories else None, "env_metrics": None,
        }  # fmt: skip


def _limit(cfg: Any, prompt_tokens: int) -> int:
    """How many tokens SkyRL trains on after a prompt."""
    return max(1, cfg.sampling_params.max_generate_length + (cfg.max_input_length or prompt_tokens) - prompt_tokens)


def _metrics(rollouts: Sequence[Rollout | None], masked: int) -> JSON:
    """Names that SkyRL adds up over the groups of a step."""
    played = [rollout for rollout in rollouts if rollout is not None]
    return {
        METRICS + "trials_lost": len(rollouts) - len(played), METRICS + "groups_masked": masked,
        METRICS + "faults_survived": sum(r.result.faults_survived for r in played),
        METRICS + "restarts": sum(r.result.attempts - 1 for r in played),
        METRICS + "tokens_reused": sum(r.result.tokens_reused for r in played),
        METRICS + "paths_left_out": sum(len(r.trajectory["paths"]) - 1 for r in played),
    }  # fmt: skip
