"""Harbor's own queue and retry around our agent: what it retries goes on where it was, and so does a trial whose process died."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml
from attempts import DATA, DRIVERS, tools
from foreign import QUIET, ROOT, Driver, python_of
from ray_run import Stage, staged

from rollout_ft.gateway.keys import Keys
from rollout_ft.testing.faults import Fault, Kind

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

TURNS = 4
SEED = 3
INFRA = "ServiceUnavailableError"
TEST = """#!/bin/sh
set -e
python3 -c "print(int(open('notes').read().split()[-1], 16) / 16**12)" > ../logs/verifier/reward.txt
"""


@dataclass
class Played:
    said: dict[str, Any]
    trial: dict[str, Any]
    data: list[Any]
    tools: Counter[tuple[int, int]]


class Harbor:
    """A task of Harbor's, and the processes that run trials of it."""

    def __init__(self, stage: Stage, path: Path):
        self.stage, self.path = stage, path
        self._running: dict[str, Driver] = {}
        stage.agent.close()
        stage.agent = self  # type: ignore[assignment]
        self.keys = Keys(stage.run.setup.secret)
        (path / "task" / "tests").mkdir(parents=True)
        (path / "task" / "environment").mkdir()
        (path / "task" / "instruction.md").write_text("Fix the bug.")
        (path / "task" / "task.toml").write_text('version = "1.0"\n[metadata]\n[agent]\ntimeout_sec = 120\n[verifier]\ntimeout_sec = 60\n')
        (path / "task" / "tests" / "test.sh").write_text(TEST)

    def environment(self, name: str) -> dict[str, str]:
        run = self.stage.run
        return {
            "ROLLOUT_FT_GATEWAY_URL": run.gateway_url, "ROLLOUT_FT_OPERATOR_KEY": run.operator_key, "FAULT_DIR": str(self.path),
            "ROLLOUT_FT_TRIAL_ID": name, "ROLLOUT_FT_ATTEMPT": "0",
        }  # fmt: skip

    def tools(self, name: str) -> Counter[tuple[int, int]]:
        return tools(self.path / f"{name}.tools")

    async def driver(self, name: str) -> Driver:
        self._running[name] = await Driver.start("harbor", DRIVERS / "harbor_trial.py", **self.environment(name))
        return self._running[name]

    def kill(self, trial_id: str) -> bool:
        """For a fault in mid-request: kills the process that plays the trial."""
        self._running[trial_id].kill()
        return True

    def close(self) -> None:
        """All processes are closed by those who started them."""

    def arm(self, name: str, point: str, turn: int, error: str = "") -> None:
        (self.path / f"{name}-{point}-{turn}").write_text(error)

    async def play(self, name: str, *, processes: int = 1, max_retries: int = 3) -> Played:
        """A trial, by as many processes as it takes when all but the last are killed."""
        asked = {
            "task": str(self.path / "task"), "trials_dir": str(self.path / "trials"), "trial_name": name, "seed": SEED,
            "max_retries": max_retries,
        }  # fmt: skip
        for _ in range(processes - 1):
            driver = await self.driver(name)
            with pytest.raises(EOFError):
                await driver.ask(asked)
            await driver.aclose()
        driver = await self.driver(name)
        said = await driver.ask(asked)
        await driver.aclose()
        assert not list(self.path.glob(f"{name}-*")), "a point was not reached"
        trial = await self.stage.run.client.trial(name)
        trajectory = await self.stage.run.client.trajectory(trial["session_id"], self.keys.session(trial["session_id"]))
        data = [[path[key] for key in DATA] for path in trajectory["paths"]]
        return Played(said, trial, data, self.tools(name))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def harbor(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Harbor]:
    async with staged() as stage:
        yield Harbor(stage, tmp_path_factory.mktemp("harbor"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clean(harbor: Harbor) -> Played:
    played = await harbor.play("clean")
    assert (played.said["errors"], played.said["starts"]) == ([], 1), played.said
    assert played.said["metadata"]["rollout_ft"] == {"trial_id": "clean", "session_id": "clean~1", "attempt": 1}
    assert (played.trial["outcome"], played.trial["reward"]) == ("completed", played.said["rewards"]["reward"])
    assert 0 < played.said["rewards"]["reward"] < 1
    return played


def judge(played: Played, clean: Played, *, attempts: int, begun: int) -> None:
    """`begun`: how many tools the attempts began together; each has a sandbox of its own, and replays its tools in there."""
    assert (played.said["errors"], played.said["rewards"]) == ([], clean.said["rewards"])
    assert (played.trial["outcome"], played.trial["reward"], played.trial["attempt"]) == ("completed", clean.trial["reward"], attempts)
    assert played.data == clean.data
    assert sum(played.tools.values()) == begun
    assert played.trial["metadata"]["turns_committed"] == TURNS


POINTS = [("before", 1, 0), ("before", 3, 2), ("reply", 1, 0), ("reply", 4, 3), ("tool", 2, 2), ("after", 4, 4)]
"""Where, in which turn, and how many tools have begun by then."""


@pytest.mark.parametrize(("point", "turn", "begun"), POINTS)
async def test_what_harbor_retries_goes_on_where_it_was(harbor: Harbor, clean: Played, point: str, turn: int, begun: int):
    harbor.arm(f"retry.{point}{turn}", point, turn, INFRA)
    played = await harbor.play(f"retry.{point}{turn}")
    assert played.said["starts"] == 2
    judge(played, clean, attempts=2, begun=begun + TURNS)


@pytest.mark.parametrize(("point", "turn", "begun"), POINTS)
async def test_a_trial_whose_process_is_killed_goes_on_where_it_was(harbor: Harbor, clean: Played, point: str, turn: int, begun: int):
    harbor.arm(f"kill.{point}{turn}", point, turn)
    played = await harbor.play(f"kill.{point}{turn}", processes=2)
    assert played.said["starts"] == 1
    judge(played, clean, attempts=2, begun=begun + TURNS)


@pytest.mark.parametrize("turn", range(1, TURNS + 1))
async def test_a_trial_whose_process_is_killed_in_mid_request_goes_on_where_it_was(harbor: Harbor, clean: Played, turn: int):
    await harbor.stage.arm(Fault(Kind.AGENT_KILL, f"request{turn}", turn, 16))
    judge(await harbor.play(f"request{turn}", processes=2), clean, attempts=2, begun=turn - 1 + TURNS)


async def test_a_trial_that_is_retried_and_killed_goes_on_where_it_was(harbor: Harbor, clean: Played):
    harbor.arm("both", "tool", 1, INFRA)
    harbor.arm("both", "reply", 2)
    harbor.arm("both", "after", 3, INFRA)
    played = await harbor.play("both", processes=2)
    judge(played, clean, attempts=4, begun=1 + 1 + 3 + TURNS)


async def test_an_engine_that_dies_is_not_seen_by_harbor(harbor: Harbor, clean: Played):
    await harbor.stage.arm(Fault(Kind.ENGINE_KILL, "engine", 2, 16))
    judge(await harbor.play("engine"), clean, attempts=1, begun=TURNS)


async def test_where_the_retries_are_spent_there_is_no_reward_and_the_trial_can_still_go_on(harbor: Harbor, clean: Played):
    harbor.arm("spent", "before", 2, INFRA)
    first = await harbor.play("spent", max_retries=0)
    assert (first.said["errors"], first.trial["state"], first.trial["reward"]) == ([INFRA], "running", None)
    judge(await harbor.play("spent"), clean, attempts=2, begun=1 + TURNS)


async def test_an_agent_that_fails_by_itself_is_told_as_that(harbor: Harbor):
    harbor.arm("wrong", "before", 2, "NotFoundError")
    played = await harbor.play("wrong")
    assert (played.said["starts"], played.trial["outcome"], played.trial["cause"]) == (1, "agent_failed", "NotFoundError")


async def test_the_pages_command_runs_the_pages_job(harbor: Harbor, clean: Played, tmp_path: Path):
    harbor.arm("job", "reply", 2, INFRA)
    job = yaml.safe_load((ROOT / "examples" / "harbor" / "job.yaml").read_text())
    loop = {"import_path": "harbor_trial:Loop", "model_name": "openai/default"}
    job["agents"][0]["kwargs"] |= {"agent": loop, "session": {"seed": SEED}}
    here = {"tasks": [{"path": str(harbor.path / "task")}], "datasets": [], "environment": {"import_path": "harbor_trial:Directory"}}
    (tmp_path / "job.json").write_text(json.dumps({**job, **here, "jobs_dir": str(tmp_path / "jobs")}))
    command = python_of("harbor").with_name("harbor")
    plugin = "rollout_ft.integrations.harbor:Outcomes"
    env = os.environ | harbor.environment("job") | QUIET | {"PYTHONPATH": f"{ROOT}:{DRIVERS}", "HARBOR_TELEMETRY": "off"}
    process = await asyncio.create_subprocess_exec(
        command, "run", "-c", tmp_path / "job.json", "--plugin", plugin, "--yes", "--quiet", env=env, stdin=asyncio.subprocess.DEVNULL
    )  # fmt: skip
    assert await process.wait() == 0
    (result,) = [json.loads(path.read_text()) for path in (tmp_path / "jobs").glob("*/*/result.json")]
    trial = await harbor.stage.run.client.trial(result["trial_name"])
    assert (trial["outcome"], trial["attempt"], trial["reward"]) == ("completed", 2, clean.trial["reward"])
    assert harbor.tools("job") == {(0, 1): 2, (0, 2): 1, (0, 3): 1, (0, 4): 1}


@pytest.mark.parametrize(("name", "model"), [("terminus-2", "openai/default"), ("claude-code", "anthropic/default")])
async def test_harbors_own_agents_are_pointed_at_their_session(harbor: Harbor, tmp_path: Path, name: str, model: str):
    driver = await harbor.driver("made")
    url = "http://127.0.0.1:9/sessions/t~1"
    asked = {"made": {"name": name, "model_name": model}, "base_url": f"{url}/v1", "api_key": "the-key", "logs_dir": str(tmp_path)}
    said = await driver.ask(asked)
    await driver.aclose()
    assert (said["name"], said["api_base"]) == (name, f"{url}/v1" if name == "terminus-2" else None)
    assert (said["env"]["OPENAI_API_KEY"], said["env"]["ANTHROPIC_API_KEY"]) == ("the-key", "the-key")
    assert said["env"]["ANTHROPIC_BASE_URL"] == url
    assert harbor.stage.run.operator_key not in json.dumps(said)
