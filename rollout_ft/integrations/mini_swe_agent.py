"""mini-swe-agent as the program of an attempt: `python -m rollout_ft.integrations.mini_swe_agent [CONFIG…]`.

Owns where its parts come from: mini-swe-agent's own config files (names, paths, `key=value`, as `mini -c` takes them), the
attempt's task, its session. The agent, the model and the environment are mini-swe-agent's own, unchanged, and so are its
retries. A task is `{"task_id", "prompt"}` and may have

    environment    what its environment takes, such as {"image": "…"}, over what the config says
    setup          a command that is run in the sandbox before the agent
    verify         a command that is run in the sandbox after the agent; the number on its last line is the reward
    timeout_s      of each of the two

A sandbox on this machine is the attempt's own directory, which is empty when an attempt begins.
"""

# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# mini-swe-agent is in an environment of its own.

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from minisweagent.agents import get_agent  # pyright: ignore[reportMissingImports]
from minisweagent.config import get_config_from_spec  # pyright: ignore[reportMissingImports]
from minisweagent.environments import get_environment  # pyright: ignore[reportMissingImports]
from minisweagent.models import get_model  # pyright: ignore[reportMissingImports]
from minisweagent.utils.serialize import recursive_merge  # pyright: ignore[reportMissingImports]

from rollout_ft.errors import BadTask
from rollout_ft.trial.environment import EnvironmentLost

TIMEOUT_S = 600
DEFAULTS: dict[str, Any] = {
    "agent": {"agent_class": "default"},
    "model": {"model_name": "openai/default", "cost_tracking": "ignore_errors"},
    "environment": {"environment_class": "local"},
}
"""Our model has no price, and litellm finds it where OPENAI_BASE_URL says."""


def main(configs: list[str]) -> None:
    task = json.loads(Path(os.environ["ROLLOUT_FT_TASK"]).read_text())
    result = attempt(task, configs or ["mini"], os.environ["ROLLOUT_FT_DIR"])
    Path(os.environ["ROLLOUT_FT_RESULT"]).write_text(json.dumps(result))


def attempt(task: dict[str, Any], configs: list[str], directory: str) -> dict[str, Any]:
    """One attempt, from an empty directory to its reward. What the agent's own parts raise goes through."""
    config: Any = recursive_merge(DEFAULTS, *map(get_config_from_spec, configs), {"environment": task.get("environment", {})})
    if config["environment"]["environment_class"] == "local":
        config["environment"].setdefault("cwd", directory)
    environment: Any = get_environment(config["environment"])
    limit_s = task.get("timeout_s", TIMEOUT_S)
    if "setup" in task:
        prepared = environment.execute({"command": task["setup"]}, timeout=limit_s)
        if prepared["returncode"] != 0:
            raise EnvironmentLost(f"setup: {said(prepared)}")
    agent: Any = get_agent(get_model(config=config["model"]), environment, config["agent"])
    ended: dict[str, Any] = agent.run(task["prompt"])
    reward = number(environment.execute({"command": task["verify"]}, timeout=limit_s)) if "verify" in task else None
    return {"reward": reward, "exit_status": ended.get("exit_status", "")}


def number(verified: dict[str, Any]) -> float:
    """The reward. Raises BadTask where the command gave none: an agent that breaks what it needs must not get another attempt."""
    lines = [line for line in verified["output"].splitlines() if line.strip()]
    try:
        return float(lines[-1])
    except (IndexError, ValueError):
        raise BadTask(f"verify has to print the reward on its last line: {said(verified)}") from None


def said(output: dict[str, Any]) -> str:
    return f"exit code {output['returncode']}, {output['exception_info']} {output['output'][-400:]}".strip()


if __name__ == "__main__":
    main(sys.argv[1:])
