"""Harbor: an agent whose trial goes on where it was when Harbor retries it.

Owns the agent that Harbor is told to run: it opens the trial's session before another of Harbor's agents, which does the
work, is made and pointed at it. Harbor's retry makes everything anew but the trial's name: the session that is opened under that
name again has the next attempt, and replays. The agents, environments and verifiers are Harbor's own, unchanged.

The subtle invariant: nothing of the operator's ever enters the sandbox. Harbor gives an agent's `env` to everything that runs
there, so the operator's key is read from the environment of Harbor's own process.
"""

# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUntypedBaseClass=false
# Harbor needs Python 3.12, and is in an environment of its own.

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from harbor.agents.base import BaseAgent  # pyright: ignore[reportMissingImports]
from harbor.agents.factory import AgentFactory  # pyright: ignore[reportMissingImports]
from harbor.models.model_api_format import ModelApiFormat  # pyright: ignore[reportMissingImports]
from harbor.models.trial.config import AgentConfig  # pyright: ignore[reportMissingImports]

from rollout_ft.errors import BadRequest
from rollout_ft.trial.agents import variables
from rollout_ft.trial.client import Client, Session
from rollout_ft.types import JSON, Outcome

OPERATOR_KEY = "ROLLOUT_FT_OPERATOR_KEY"
GATEWAY_URL = "ROLLOUT_FT_GATEWAY_URL"


class ServiceUnavailableError(Exception):
    """The infrastructure failed the attempt, whatever its agent made of it. Harbor goes by this name: it retries, and has no
    reward of such an attempt."""


class ResumableAgent(BaseAgent):
    """`agent`: which of Harbor's agents does the work, as Harbor's config has it (`name` or `import_path`, `model_name`, `kwargs`).
    `trial_id`: the trial's name unless Harbor's own will do, which another job has other ones of. `session`: further fields of
    `POST /sessions`."""

    def __init__(
        self, logs_dir: Path, model_name: str | None = None, *, agent: JSON, gateway_url: str = "", trial_id: str = "",
        session: JSON | None = None, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(logs_dir, model_name, **kwargs)
        self._config = AgentConfig.model_validate({"model_name": model_name or "openai/default", **agent})
        self._gateway_url = gateway_url or os.environ[GATEWAY_URL]
        self._trial_id, self._fields = trial_id, session or {}
        self._given = {k: v for k, v in kwargs.items() if k in ("logger", "mcp_servers", "skills_dir")}
        self._agent: Any = None
        self._session: Session | None = None

    @staticmethod
    def name() -> str:
        return "rollout-ft"

    def version(self) -> str | None:
        return self._agent.version() if self._agent else None

    @property
    def extra_env(self) -> dict[str, str]:
        return self._agent.extra_env if self._agent else {}

    async def setup(self, environment: Any) -> None:
        """Opens the session, which fences the attempts before this one, and makes the agent that uses it."""
        client = Client(self._gateway_url, os.environ[OPERATOR_KEY])
        try:
            self._session = await client.open_session(trial_id=self.trial_id, resume=True, **self._fields)
        finally:
            await client.aclose()
        self._agent = made(self._config, self._session, logs_dir=self.logs_dir, **self._given)
        self._agent.session_id, self._agent.context_id = self.session_id, self.context_id
        await self._agent.setup(environment)

    async def run(self, instruction: str, environment: Any, context: Any) -> None:
        assert self._session is not None
        try:
            await self._agent.run(instruction, environment, context)
        except Exception as e:
            await self._judge(e)
            raise
        await self._judge(None)
        told = {"trial_id": self.trial_id, "session_id": self._session.session_id, "attempt": self._session.attempt}
        context.metadata = {**(context.metadata or {}), "rollout_ft": told}

    @property
    def trial_id(self) -> str:
        return self._trial_id or trial_id_of((self.session_id or "").removesuffix("__agent"))

    async def _judge(self, error: Exception | None) -> None:
        """Raises ServiceUnavailableError where the agent's end says nothing: a request of it was never answered."""
        client = Client(self._gateway_url, os.environ[OPERATOR_KEY])
        try:
            trial = await client.trial(self.trial_id)
        finally:
            await client.aclose()
        if trial["tainted"] or trial["fault"]:
            raise ServiceUnavailableError(trial["fault"] or "a request was never answered") from error


def made(config: Any, session: Session, **kwargs: Any) -> Any:
    """The agent that does the work, pointed at its session: by its settings where Harbor has any for it, and by what the
    clients read from their environment."""
    ours = variables(session)
    update: JSON = {"env": {**config.env, **ours}}
    connection = AgentFactory.get_agent_class_from_config(config).MODEL_CONNECTION
    if connection is not None:
        spoken = {config.model_api_format} if config.model_api_format else {*connection.supported_api_formats}
        update["base_url"] = ours["ANTHROPIC_BASE_URL" if spoken == {ModelApiFormat.ANTHROPIC_MESSAGES} else "OPENAI_BASE_URL"]
    return AgentFactory.create_agent_from_config(config.model_copy(update=update), **kwargs)


def trial_id_of(trial_name: str) -> str:
    """Harbor's name of a trial, in letters that ours may have."""
    return re.sub(r"[^A-Za-z0-9._:-]", "-", trial_name)[:128]


class Outcomes:
    """A plugin of a job: `harbor run --plugin rollout_ft.integrations.harbor:Outcomes`. Tells the run how each trial ended."""

    def __init__(self, gateway_url: str = ""):
        self._gateway_url = gateway_url or os.environ[GATEWAY_URL]

    async def on_job_start(self, job: Any) -> None:
        job.on_trial_ended(self.report)

    async def on_job_end(self, job_result: Any) -> None:
        """All is told already."""

    async def report(self, event: Any) -> None:
        """The outcome of a trial that has one. An attempt that Harbor may retry has none, and a trial whose retries are spent is
        left as it is: it can be gone on with under its name."""
        ended = outcome_of(event.result)
        if ended is None:
            return
        trial_id = event.config.agent.kwargs.get("trial_id") or trial_id_of(event.trial_name)
        client = Client(self._gateway_url, os.environ[OPERATOR_KEY])
        try:
            trial = await client.trial(trial_id)
            await client.outcome(trial_id, *ended, trial["attempt"])
        except BadRequest as e:
            if e.code != "trial_ended":
                raise
        finally:
            await client.aclose()


def outcome_of(result: Any) -> tuple[str, float | None, str] | None:
    """`(outcome, reward, cause)` of Harbor's result; None where it says nothing of the trial."""
    errors: list[Any] = result.recorded_exceptions()
    if any(error.policy.should_retry for error in errors):
        return None
    reward = result.verifier_result.rewards.get("reward") if result.reward_valid else None
    if not errors:
        return Outcome.COMPLETED, reward, ""
    kind = errors[0].exception_type
    if reward is not None:
        return Outcome.TRUNCATED, reward, kind
    return (Outcome.ENV_FAILED if kind.startswith(("Verifier", "Reward")) else Outcome.AGENT_FAILED), None, kind
