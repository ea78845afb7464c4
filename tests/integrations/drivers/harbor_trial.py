"""Harbor's own queue, trial, retry, chat, model class and verifier; of ours the sandbox (a directory) and a short agent.

Owns these two, and the points at which an attempt may be killed or fail. Asked `{"task", "trial_name", "trials_dir", "seed",
"max_retries"}` it says how the trial ended; asked `{"made": …}`, where one of Harbor's agents was pointed at.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import kill_points
from harbor.agents.base import BaseAgent
from harbor.environments.base import BaseEnvironment, ExecResult
from harbor.llms.base import OutputLengthExceededError
from harbor.llms.chat import Chat
from harbor.llms.lite_llm import LiteLLM
from harbor.models.job.config import RetryConfig
from harbor.models.trial.config import AgentConfig, EnvironmentConfig, TaskConfig, TrialConfig
from harbor.trial.queue import TrialQueue

from rollout_ft.integrations import harbor
from rollout_ft.trial.client import Session

TURNS = 4


class Directory(BaseEnvironment):
    """A sandbox that is a directory: what tasks know as /app, /logs and /tests is in there. Made anew by every start."""

    @staticmethod
    def type() -> str:
        return "directory"

    def _validate_definition(self) -> None:
        pass

    @property
    def root(self) -> Path:
        return Path(os.environ["FAULT_DIR"]) / "sandboxes" / self.session_id

    def inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    async def start(self, force_build: bool) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        for name in ("app", "tests", "logs/agent", "logs/verifier", "logs/artifacts"):
            (self.root / name).mkdir(parents=True)

    async def stop(self, delete: bool) -> None:
        shutil.rmtree(self.root)

    async def upload_file(self, source_path: Path | str, target_path: str) -> None:
        shutil.copy(source_path, self.inside(target_path))

    async def upload_dir(self, source_dir: Path | str, target_dir: str) -> None:
        shutil.copytree(source_dir, self.inside(target_dir), dirs_exist_ok=True)

    async def download_file(self, source_path: str, target_path: Path | str) -> None:
        shutil.copy(self.inside(source_path), target_path)

    async def download_dir(self, source_dir: str, target_dir: Path | str) -> None:
        shutil.copytree(self.inside(source_dir), target_dir, dirs_exist_ok=True)

    async def exec(
        self, command: str, cwd: str | None = None, env: dict[str, str] | None = None, timeout_sec: int | None = None,
        user: str | int | None = None,
    ) -> ExecResult:  # fmt: skip
        for name in ("/app", "/tests", "/logs"):
            command = command.replace(name, f"{self.root}{name}")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_shell(
            command, cwd=self.inside(cwd or "/app"), env={**os.environ, **(env or {})}, stdout=pipe, stderr=pipe
        )
        out, err = await process.communicate()
        return ExecResult(stdout=out.decode(), stderr=err.decode(), return_code=process.returncode or 0)


class Loop(BaseAgent):
    """Each reply of the model becomes a command that depends on it; what the command prints is the next prompt."""

    @staticmethod
    def name() -> str:
        return "loop"

    def version(self) -> str | None:
        return "1"

    async def setup(self, environment: BaseEnvironment) -> None:
        pass

    async def run(self, instruction: str, environment: BaseEnvironment, context: Any) -> None:
        env = self.extra_env
        model = LiteLLM(self.model_name, api_base=env["OPENAI_BASE_URL"], api_key=env["OPENAI_API_KEY"], max_tokens=48)
        chat, prompt = Chat(model), instruction
        for turn in range(1, TURNS + 1):
            kill_points.reach("before", turn)
            reply = await answer(chat, prompt)
            kill_points.reach("reply", turn)
            line = hashlib.sha256(reply.encode()).hexdigest()[:12]
            half = "exit; " if kill_points.armed("tool", turn).exists() else ""
            kill_points.ran(turn)
            ran = await environment.exec(f"echo {line} >> notes; {half}ls; sha256sum < notes; wc -l < notes")
            kill_points.reach("tool", turn)
            prompt = ran.stdout or ""
            kill_points.reach("after", turn)


async def answer(chat: Chat, prompt: str) -> str:
    """A model that writes nonsense goes on until it is stopped, and Harbor has an error for that; as its Terminus does, the agent
    keeps what there is."""
    try:
        return (await chat.chat(prompt)).content
    except OutputLengthExceededError as e:
        chat.messages.extend([{"role": "user", "content": prompt}, {"role": "assistant", "content": e.truncated_response}])
        return e.truncated_response or ""


async def play(asked: dict[str, Any]) -> dict[str, Any]:
    agent = {
        "agent": {"import_path": "harbor_trial:Loop", "model_name": "openai/default"},
        "session": {"seed": asked["seed"]},
    }
    config = TrialConfig(
        task=TaskConfig(path=Path(asked["task"])),
        trial_name=asked["trial_name"],
        trials_dir=Path(asked["trials_dir"]),
        agent=AgentConfig(import_path="rollout_ft.integrations.harbor:ResumableAgent", kwargs=agent),
        environment=EnvironmentConfig(import_path="harbor_trial:Directory"),
    )
    starts: list[str] = []

    async def started(event: Any) -> None:
        starts.append(event.trial_name)

    queue = TrialQueue(1, RetryConfig(max_retries=asked["max_retries"], min_wait_sec=0.0))
    queue.on_trial_started(started).on_trial_ended(harbor.Outcomes().report)
    result = await queue.submit(config)
    return {
        "rewards": result.verifier_result.rewards if result.verifier_result else None,
        "errors": [error.exception_type for error in result.recorded_exceptions()],
        "starts": len(starts),
        "metadata": result.agent_result.metadata if result.agent_result else None,
    }


def made(asked: dict[str, Any]) -> dict[str, Any]:
    """Where one of Harbor's agents asks, and with which key."""
    session = Session("t~1", "t", 1, asked["base_url"], asked["api_key"], 0, None)  # type: ignore[arg-type]
    agent = harbor.made(AgentConfig(**asked["made"]), session, logs_dir=Path(asked["logs_dir"]))
    llm = getattr(agent, "_llm", None)
    return {"api_base": getattr(llm, "_api_base", None), "env": agent.extra_env, "name": agent.name()}


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(made(asked) if "made" in asked else asyncio.run(play(asked))), flush=True)


if __name__ == "__main__":
    sys.modules["harbor_trial"] = sys.modules["__main__"]
    main()
