"""A taskset of verifiers: tasks, the environment that plays them, and a harness of its own that needs no download.

The harness runs `tides_program.py`, a tool loop of the `openai` client, in verifiers' subprocess runtime. In a task, `fail` is
as in `tool_agent.py`: `infra` is the program's way to say that its model's transport failed, `bug` an exit code.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import verifiers.v1 as vf
from verifiers.v1.errors import MODEL_TRANSPORT_ERROR_EXIT_CODE

from rollout_ft.integrations.verifiers import SurvivingEnv

__all__ = ["TidesEnv", "TidesHarness", "TidesTaskset"]
PROGRAM = Path(__file__).parent / "tides_program.py"
EXITS = {"infra": MODEL_TRANSPORT_ERROR_EXIT_CODE, "bug": 3}
launched: Counter[str] = Counter()
"""How often a program was started, by task."""
settings: dict[str, Any] = {"prefix": "vf", "trial": {}}
rows: list[dict[str, Any]] = []


class TidesData(vf.TaskData):
    turns: int = 3
    fail: list[Any] | None = None


class TidesTask(vf.Task[TidesData]):
    @vf.reward
    async def length(self, trace: vf.Trace) -> float:
        """Depends on every reply."""
        said = "".join(str(node.message.content or "") for node in trace.nodes if node.sampled)
        return sum(said.encode()) % 1000 / 1000


class TidesTaskset(vf.Taskset[TidesTask]):
    def load(self) -> list[TidesTask]:
        return [TidesTask(TidesData(**row)) for row in rows]


class TidesHarness(vf.Harness[vf.HarnessConfig]):
    NEEDS_CONTAINER = False

    async def launch(self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any) -> Any:
        name = data.name
        launched[name] += 1
        kind, turn, times = data.fail or ("", 0, 0)
        failing = [turn, EXITS[kind]] if launched[name] <= times else [0, 0]
        asked = {"prompt": data.prompt, "turns": data.turns, "failing": failing, "base_url": endpoint, "api_key": secret}
        return await runtime.run_program([sys.executable, str(PROGRAM), json.dumps(asked)], {})


class TidesEnv(SurvivingEnv, vf.SingleAgentEnv):
    @property
    def trial(self) -> dict[str, Any]:
        return settings["trial"]

    def trial_id(self, task: Any) -> str:
        return f"{settings['prefix']}-{task.data.name}"
