"""A trial whose tools act on a sandbox of SWE-ReX: asked for one, with what is to be killed where, it says what became of it.

`kill` is `agent`, `sandbox` or both, `when` in the step `at` or behind it. A sandbox is killed by its container's processes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rollout_ft.config import TrialConfig
from rollout_ft.gateway.keys import Keys
from rollout_ft.integrations.swe_rex import SweRex, sandbox
from rollout_ft.trial.agents import ProcessAgent
from rollout_ft.trial.attempt import workshop
from rollout_ft.trial.client import Client
from rollout_ft.trial.runner import TrialRunner

STATE, TESTS = Path(os.environ["STAND_IN_STATE"]), str(Path(__file__).parents[2])
sys.path.insert(0, TESTS)  # its `tool_agent`, not the one beside this file


class Watched:
    """One sandbox: has each command write down that it runs, outside of it, and kills what is to be killed, once."""

    def __init__(self, real: SweRex, asked: dict[str, Any], agent: ProcessAgent, trial_id: str):
        self._real, self._asked, self._agent, self._trial_id = real, asked, agent, trial_id
        self._ledger = ledger(asked, trial_id)
        self.ability = real.ability

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def step(self, action: Any, key: str) -> Any:
        number, asked = action["number"], self._asked
        action = {**action, "command": f"echo {number} >> {self._ledger}; {action['command']}"}
        if number != asked.get("at") or not asked["kill"]:
            return await self._real.step(action, key)
        kill, asked["kill"] = asked["kill"], ""
        if asked["when"] == "behind":
            said = await self._real.step(action, key)
            self._do(kill)
            return said
        wait = "sleep 60" if "sandbox" in kill else "sleep 0.3"
        wrote, _, rest = action["command"].partition("; ")
        before = runs(self._ledger)[number]
        stepping = asyncio.create_task(self._real.step({**action, "command": f"{wrote}; {wait}; {rest}"}, key))
        while runs(self._ledger)[number] == before and not stepping.done():
            await asyncio.sleep(0.01)
        self._do(kill)
        return await stepping

    def _do(self, kill: str) -> None:
        if "agent" in kill:
            assert self._agent.kill(self._trial_id)
        if "sandbox" in kill:
            (pid,) = STATE.glob("*.pid")
            os.kill(int(pid.read_text()), signal.SIGKILL)


def ledger(asked: dict[str, Any], trial_id: str) -> Path:
    return Path(asked["marks"]) / f"{trial_id}.ran"


def runs(path: Path) -> Counter[int]:
    """How often each step's command has begun."""
    return Counter(map(int, path.read_text().split())) if path.exists() else Counter()


async def played(asked: dict[str, Any], agent: ProcessAgent) -> dict[str, Any]:
    config = TrialConfig(sandbox_dir=asked["directory"], **asked.get("config", {}))
    client, prefix, kept = Client(asked["url"], asked["operator_key"]), asked["prefix"], []

    def make(task: Any, trial_id: str, directory: Path) -> Watched:
        return Watched(sandbox(task, trial_id, directory), asked, agent, trial_id)

    async with workshop(config, make, Path(asked["directory"])) as made:
        runner = TrialRunner(client, agent, config, Keys(asked["secret"]).session, workshop=made)
        await runner.run([asked["task"]], concurrency=1, prefix=prefix, on_result=lambda r, t: kept.append((r.line(), t)))
    await client.aclose()
    ((result, trajectory),) = kept
    taken = dict(sorted(runs(ledger(asked, result["trial_id"])).items()))
    return {"result": result, "paths": trajectory["paths"], "taken": taken, "left": sorted(p.name for p in STATE.iterdir())}


async def stepped(asked: dict[str, Any]) -> dict[str, Any]:
    """Steps of one sandbox, without a trial."""
    made = sandbox(asked["task"], "alone", Path(asked["directory"]))
    try:
        await made.start()
        said = [await made.step(action, f"key-{n}") for n, action in enumerate(asked["steps"])]
        return {
            "said": said,
            "there": sorted(p.name for p in Path(asked["directory"]).iterdir()),
            "containers": len([*STATE.glob("*.pid")]),
        }
    finally:
        if not asked.get("leave"):
            await made.stop()


def main() -> None:
    agent = ProcessAgent("tool_agent:run")
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            said = asyncio.run(stepped(asked) if "steps" in asked else played(asked, agent))
        except Exception as e:
            said = {"raised": f"{type(e).__name__}: {e}"}
        print(json.dumps(said), flush=True)
        if asked.get("leave"):
            os._exit(1)
    agent.close()


if __name__ == "__main__":
    main()
