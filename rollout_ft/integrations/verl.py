"""verl: an agent loop whose trials survive their faults, and a client for verl's own loops that survives its servers.

Owns how a trajectory becomes an `AgentLoopOutput`, and a `/generate` reply a `TokenOutput`. Knows of a run what its gateway
says. A lost trial is an exception out of `run`, which is verl's own way with a failed sample: its V1 trainer marks the prompt
`failure` and evicts or refills the group, its V0 trainer ends the step. A `reward_score` of None means *compute it*, so it is
for trials that ended whole and whose agent gave no reward, and for nothing else.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import verl.experimental.agent_loop.agent_loop as _loops  # pyright: ignore[reportMissingImports]
import verl.workers.rollout.llm_server as _servers  # pyright: ignore[reportMissingImports]
import verl.workers.rollout.replica as _replica  # pyright: ignore[reportMissingImports]

from rollout_ft.config import TrialConfig
from rollout_ft.errors import BadRequest
from rollout_ft.integrations.rollouts import Rollout, TrialLost, agent_of, client_of, play, seed_of, trial_name
from rollout_ft.trial.agents import Agent
from rollout_ft.trial.client import Client, Session
from rollout_ft.types import JSON

loops: Any = _loops
servers: Any = _servers
replica: Any = _replica
_log = logging.getLogger("rollout_ft")
NOT_SENT = frozenset({"logprobs", "n", "max_tokens"})
"""Of verl's sampling parameters: these are said in another way."""
MAX_SESSIONS = 1024
"""Conversations of verl's own loops that one process keeps open; the one that was used least recently is closed for another."""
ANSWER_S = 600.0


@loops.register("rollout_ft")
class TrialAgentLoop(loops.AgentLoopBase):
    """Each sample is a trial: `agent` talks to the base URL of its session, and is restarted from its checkpoint by faults.

    `agent`: see `rollouts.agent_of`; its task has the sample's `messages` and all columns of its row as `fields`.
    `trial`: values of `rollout_ft.config.TrialConfig`. `prefix`: what the names of this job's trials begin with.
    """

    agent: str | Agent | Callable[..., Any] | None = None

    def __init__(
        self, *args: Any, agent: str | None = None, gateway_url: str = "", operator_key: str = "", prefix: str = "verl",
        trial: Mapping[str, Any] | None = None, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)  # pyright: ignore[reportUnknownMemberType]
        chosen = agent or type(self).agent
        if chosen is None:
            raise ValueError("agent is missing: give the agent loop's config `agent: module:function`, or its class an `agent`")
        self._agent = agent_of(chosen)
        self._where, self._prefix, self._trial = (gateway_url, operator_key), prefix, TrialConfig(**(trial or {}))

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        """An `AgentLoopOutput`, or a list of one a path where the V1 trainer asks. Raises TrialLost."""
        several = "session_id" in kwargs  # only the V1 trainer numbers a prompt's samples, and takes more than one output
        sample = kwargs.get("session_id", kwargs.get("priority", uuid.uuid4().hex))
        uid = str(kwargs.get("uid", uuid.uuid4().hex))
        task: JSON = {
            "task_id": uid[:256], "group_id": uid[:256], "messages": list(kwargs["raw_prompt"]), "fields": kwargs,
            "sampling": sampling_of(sampling_params),
        }  # fmt: skip
        if self.rollout_config.get("full_determinism", False):
            task["seed"] = seed_of(_plain(kwargs.get("index", uid)), _plain(sample), _plain(kwargs.get("global_steps")))
        rollout = await play(client_of(*self._where), self._agent, self._trial, task, trial_name(self._prefix, uid, sample))
        logprobs = bool(sampling_params.get("logprobs"))
        outputs = [
            self._output(rollout, row, path, logprobs, kwargs)
            for row, path in zip(rollout.rows, rollout.trajectory["paths"], strict=True)
        ]  # fmt: skip
        return outputs if several else outputs[-1]

    def _output(self, rollout: Rollout, row: JSON, path: JSON, logprobs: bool, fields: JSON) -> Any:
        if path.get("routed_experts_missing"):
            ranges = path["routed_experts_missing"]
            raise TrialLost(row["trial_id"], row["outcome"], f"nobody knows the experts of {len(ranges)} ranges of its tokens")
        before = max(0, len(row["prompt_ids"]) - self.rollout_config.prompt_length)  # verl's loops cut a prompt on its left as well
        limit, routed = self.rollout_config.response_length, row["rollout_routed_experts"]
        prompt, response = row["prompt_ids"][before:].tolist(), row["response_ids"][:limit].tolist()
        first, last = _steps(row["weight_versions"], fields.get("global_steps"))
        return loops.AgentLoopOutput(
            prompt_ids=prompt, response_ids=response, response_mask=row["loss_mask"][:limit].tolist(),
            response_logprobs=row["rollout_log_probs"][:limit].tolist() if logprobs else None,
            routed_experts=None if routed is None else routed[before : before + len(prompt) + len(response)],
            reward_score=row["reward"], num_turns=2 * len(row["turns"]),
            metrics={"generate_sequences": rollout.result.seconds},
            extra_fields={
                "turn_scores": [], "tool_rewards": [], "min_global_steps": first, "max_global_steps": last, "reward_extra_info": {},
                "rollout_ft": _provenance(rollout, row, before, limit),
            },
        )  # fmt: skip


_OF_ROW = (
    "trial_id", "outcome", "attempts", "turns_replayed", "tokens_reused", "path", "continuations", "uncertain_turns", "version_spans",
)  # fmt: skip


def _provenance(rollout: Rollout, row: JSON, before: int, limit: int) -> JSON:
    """Where a sample comes from, and what of it verl's limits have cut away."""
    return {name: row[name] for name in _OF_ROW} | {
        "paths": len(rollout.trajectory["paths"]), "faults_survived": rollout.result.faults_survived,
        "prompt_tokens_cut": before, "response_tokens_cut": max(0, len(row["response_ids"]) - limit),
    }  # fmt: skip


def _steps(versions: list[str], otherwise: Any = None) -> tuple[Any, Any]:
    """The first and the last version where they are numbers, as verl counts its steps."""
    steps = [int(version) for version in versions if version.isdigit()]
    return (min(steps), max(steps)) if steps and len(steps) == len(versions) else (otherwise, otherwise)


def sampling_of(params: Mapping[str, Any]) -> JSON:
    """verl's parameters as a session's. How many tokens a turn may have is the agent's to say."""
    return {name: _plain(value) for name, value in params.items() if name not in NOT_SENT and value is not None}


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


class SurvivingLLMClient(servers.LLMServerClient):
    """For verl's own agent loops: what they ask of a server they ask of a session, one for each `request_id`.

    An engine that dies, hangs or is replaced in the middle is not seen: the reply comes whole, with the tokens that were
    sampled before. `prefix` names the trials; by default another one in each process, so that no two are the same.
    """

    def __init__(
        self, config: Any, load_balancer_handle: Any = None, *, gateway_url: str = "", operator_key: str = "", prefix: str = "",
        max_sessions: int = MAX_SESSIONS, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(config, load_balancer_handle, **kwargs)  # pyright: ignore[reportUnknownMemberType]
        self._where, self._prefix, self._max_sessions = (gateway_url, operator_key), prefix, max_sessions
        self._sessions: _Sessions | None = None

    async def generate(self, request_id: Any, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any) -> Any:
        """A `TokenOutput`. Raises BadRequest: 4xx for what cannot be asked, 500 when the turn's budget is spent."""
        given = sorted(name for name in ("image_data", "video_data", "audio_data") if kwargs.get(name) is not None)
        if given:
            raise ValueError(f"{given[0]}: sessions are of tokens alone; leave these samples to verl's own client")
        if self._sessions is None:  # not before: the client is copied into every worker, and connections belong to a loop
            self._sessions = _Sessions(client_of(*self._where), self._prefix or uuid.uuid4().hex[:12], self._max_sessions)
        allowed = self._allowed(len(prompt_ids), sampling_params)
        body = {
            "input_ids": list(prompt_ids), "return_logprob": bool(sampling_params.get("logprobs")),
            "sampling_params": sampling_of(sampling_params) | {"max_new_tokens": allowed},
        }  # fmt: skip
        async with self._sessions.of(str(request_id)) as session:
            return _token_output(await _answer(session, body))

    def _allowed(self, prompt_tokens: int, sampling_params: dict[str, Any]) -> int:
        """As many tokens as verl's own servers would give."""
        rollout = self.config.actor_rollout_ref.rollout
        said = sampling_params.get("max_new_tokens", sampling_params.get("max_tokens"))
        return max(1, int(said or min(rollout.response_length, rollout.prompt_length + rollout.response_length - prompt_tokens)))


@dataclass(slots=True)
class _Conversation:
    session: Session | None = None
    waiting: int = 0


class _Sessions:
    """One for each conversation. verl says of none that it has ended: when there are too many, the one unused for longest goes."""

    def __init__(self, client: Client, prefix: str, limit: int):
        self._client, self._prefix, self._limit = client, prefix, limit
        self._all: dict[str, _Conversation] = {}

    @contextlib.asynccontextmanager
    async def of(self, request_id: str) -> AsyncGenerator[Session]:
        conversation = self._all.pop(request_id, None) or _Conversation()
        self._all[request_id] = conversation  # the last of them is the one used last
        conversation.waiting += 1
        try:
            if conversation.session is None:
                conversation.session = await self._client.open_session(
                    trial_id=trial_name(self._prefix, request_id), task_id=request_id[:256], seed=seed_of(request_id)
                )
            yield conversation.session
        finally:
            conversation.waiting -= 1
        await self._close_some()

    async def _close_some(self) -> None:
        idle = [name for name, each in self._all.items() if not each.waiting]
        for name in idle[: max(0, len(self._all) - self._limit)]:
            session = self._all.pop(name).session
            if session is None:
                continue
            try:
                await self._client.outcome(session.trial_id, "completed", None, "", session.attempt)
                await self._client.release(session.trial_id)
            except BadRequest as e:
                _log.warning("session.not_closed session=%s: %s", session.session_id, e)


async def _answer(session: Session, body: JSON) -> JSON:
    """One turn. However often the request has to come again, one key says that it is the same."""
    path, key = f"/sessions/{session.session_id}/generate", uuid.uuid4().hex
    while True:
        try:
            return await session.client.request("POST", path, body, key=session.api_key, idempotency_key=key, answer_s=ANSWER_S)
        except BadRequest as e:
            if e.code != "still_generating":  # the run itself bounds how long a turn goes on
                raise


def _token_output(reply: JSON) -> Any:
    meta = reply["meta_info"]
    first, last = _steps([span["version"] for span in meta["weight_versions"]] or [meta["weight_version"]])
    logprobs = meta.get("output_token_logprobs")
    return replica.TokenOutput(
        token_ids=reply["output_ids"], log_probs=None if logprobs is None else [logprob for logprob, _, _ in logprobs],
        stop_reason=meta["finish_reason"]["type"],
        extra_fields={"global_steps": last, "min_global_steps": first, "max_global_steps": last},
    )  # fmt: skip


def surviving(manager: type[Any]) -> type[Any]:
    """`manager`, one of verl's AgentLoopManagers, with workers whose client is a `SurvivingLLMClient`."""
    base: Any = manager

    class Surviving(base):
        def __init__(self, config: Any, llm_client: Any, *args: Any, **kwargs: Any):
            client = SurvivingLLMClient(config, llm_client._load_balancer)
            super().__init__(config, client, *args, **kwargs)  # pyright: ignore[reportUnknownMemberType]

    return Surviving


SurvivingAgentLoopManager = surviving(loops.AgentLoopManager)
"""For `actor_rollout_ref.rollout.agent.agent_loop_manager_class` of the V0 trainer."""


def __getattr__(name: str) -> Any:
    """`SurvivingAgentLoopManagerTQ` is for the V1 trainers: its module needs packages that V0 does without."""
    if name != "SurvivingAgentLoopManagerTQ":
        raise AttributeError(name)
    from verl.trainer.ppo.v1 import AgentLoopManagerTQ  # pyright: ignore

    return surviving(AgentLoopManagerTQ)  # pyright: ignore[reportUnknownArgumentType]
