"""verifiers: an environment whose episodes survive their faults.

Owns how an episode becomes a trial: one session for all its agents that play the policy, attempt by attempt, and the tokens
of the trajectory put where verifiers looks for them, in the nodes of its traces. Knows of a run what its gateway says. A lost
trial is an episode that is not `ok`, which is verifiers' own way with a failed one: whoever trains on it drops it or its group.

The subtle invariant: verifiers retries nothing below a whole rollout, and each retry of its own would be a new trial; leave
`retries` at its default and let the trial restart, which samples nothing again.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import verifiers.v1.clients as _clients  # pyright: ignore[reportMissingImports]
import verifiers.v1.env as _env  # pyright: ignore[reportMissingImports]

from rollout_ft.config import TrialConfig
from rollout_ft.integrations.rollouts import Rollout, TrialLost, client_of, play, trial_name
from rollout_ft.trial.agents import ended_by
from rollout_ft.trial.client import Session
from rollout_ft.trial.policy import AttemptEnd, Blame, End
from rollout_ft.types import JSON

clients: Any = _clients
envs: Any = _env
_log = logging.getLogger("rollout_ft")

BLAMED = {
    "ProviderError": Blame.INFRA, "InterceptionError": Blame.INFRA, "TunnelError": Blame.INFRA, "SandboxError": Blame.ENVIRONMENT,
}  # fmt: skip
"""The boundaries of verifiers behind which an error is nobody's fault who plays."""
FINAL = frozenset({400, 401, 403, 404, 413, 422})
"""What a provider says for good: the request itself is wrong, or too long."""


class SurvivingEnv(envs.Env):
    """Put it before an environment of verifiers: `class Mine(SurvivingEnv, vf.SingleAgentEnv)`, exported by the taskset.

    `trial`: values of `rollout_ft.config.TrialConfig`. The gateway comes from the environment's variables.
    """

    trial: Mapping[str, Any] = {}

    def trial_id(self, task: Any) -> str:
        """The name of the trial of an episode; no two episodes may have the same."""
        return trial_name(self.config.env_id, str(task.key)[:16], uuid.uuid4().hex[:12])

    async def run_episode(
        self, task: Any, ctx: Any, *, on_trace: Callable[[Any], None] | None = None, on_discard: Callable[[Any], None] | None = None
    ) -> Any:
        """The episode of the last attempt. Its traces have the tokens of the trajectory where no fault is left in it."""
        once: Any = super()
        played = _Attempts(once.run_episode, task, ctx, on_trace, on_discard)
        asked: JSON = {"task_id": str(task.key)[:256], "group_id": str(task.key)[:256]}
        try:
            rollout = await play(client_of(), played, TrialConfig(**self.trial), asked, self.trial_id(task))
            fill(played.episode.traces, rollout)
        except TrialLost as e:
            _log.warning("trial.lost %s", e)
            return self._lost(played.episode, task, e)
        return played.episode

    def _lost(self, episode: Any, task: Any, lost: TrialLost) -> Any:
        error = envs.Error(type=type(lost).__name__, message=str(lost))
        if episode is None:
            of = envs.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
            episode = envs.Episode(env=envs.EnvInfo(id=self.config.env_id), task=of)
        episode.ok = False
        episode.errors.append(error)
        return episode


class _Attempts:
    """The agent of a trial: each attempt is an episode on a session of its own."""

    def __init__(self, run: Callable[..., Any], task: Any, ctx: Any, on_trace: Any, on_discard: Any):
        self._run, self._task, self._ctx, self._on_trace, self._on_discard = run, task, ctx, on_trace, on_discard
        self.episode: Any = None

    async def run(self, task: JSON, session: Session) -> AttemptEnd:
        if self.episode is not None and self._on_discard is not None:
            for trace in self.episode.traces:
                self._on_discard(trace)
        variable = f"ROLLOUT_FT_API_KEY_{uuid.uuid4().hex}"  # verifiers reads keys from variables; those are not handed on to programs
        os.environ[variable] = session.api_key
        try:
            told = {name: getattr(self._ctx.client, name) for name in ("headers", "headers_from_env", "timeout")}
            client = clients.EvalClientConfig(base_url=session.base_url, api_key_var=variable, **told)
            ctx = dataclasses.replace(self._ctx, client=client)
            self.episode = await self._run(self._task, ctx, on_trace=self._on_trace, on_discard=self._on_discard)
        finally:
            del os.environ[variable]
        return end_of(self.episode)


def end_of(episode: Any) -> AttemptEnd:
    """The end of an attempt, from what verifiers wrote down of it. The rewards stay where they are: on the traces."""
    if episode.ok:
        alone = episode.traces[0] if len(episode.traces) == 1 else None
        return AttemptEnd(End.RETURNED, reward=alone.reward if alone is not None and alone.rewards else None)
    errors = [*episode.errors, *(error for trace in episode.traces if not trace.ok for error in trace.errors)]
    nobodys = [error for error in errors if error.type in BLAMED and error.status_code not in FINAL]
    error = next(iter([*nobodys, *reversed(errors)]), None)
    if error is None:
        return AttemptEnd(End.RAISED, cause="the episode is not ok, and nothing says why")
    words = f"{error.type}: {error.message}"
    ended = ended_by({error.type}, words, words[:500])
    return dataclasses.replace(ended, blame=BLAMED[error.type]) if nobodys else ended


def fill(traces: Sequence[Any], rollout: Rollout) -> None:
    """Puts the tokens of each path into the branch that made it, and into the metrics where they come from. Raises TrialLost
    for a branch that no path is of."""
    paths, result = list(rollout.trajectory["paths"]), rollout.result
    about = {name: getattr(result, name) for name in ("attempts", "faults_survived", "tokens_reused", "tokens_wasted")}
    for trace in traces:
        trace.record_metrics({f"rollout_ft/{name}": value for name, value in about.items()})
        for branch in trace.branches:
            if not branch.calls:
                continue  # of an agent with a model of its own, or without any
            path = next((each for each in paths if _made(branch, each)), None)
            if path is None:
                raise TrialLost(result.trial_id, result.outcome, "a branch of the trace is in no path of the trajectory")
            paths.remove(path)
            _fill(branch, path)


def _made(branch: Any, path: JSON) -> bool:
    """Whether these calls are those turns: each had a prompt of that many tokens."""
    calls = [call for call in branch.calls if call.error is None]
    asked = [call.usage.prompt_tokens if call.usage is not None else -1 for call in calls]
    return asked == [turn["start"] for turn in path["turns"]]


def _fill(branch: Any, path: JSON) -> None:
    """A node of a message that was sampled gets its own tokens, and before them those that were not sampled."""
    ids, logprobs, at = path["token_ids"], path["logprobs"], 0
    for node, turn in zip((node for node in branch.nodes if node.sampled), path["turns"], strict=True):
        start, end = turn["start"], turn["end"]
        if not node.token_ids:  # a node that branches share is of the first
            node.token_ids = list(ids[at:end])
            node.mask = [False] * (start - at) + [True] * (end - start)
            node.logprobs = list(logprobs[start:end])
        at = end
