"""SWE-ReX's own deployments and runtimes as a trial's environment: agents and sandboxes killed in a tool and behind it.

Its docker deployment starts what stands in for docker's program: a container is a process group, with SWE-ReX's server in it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from foreign import ROOT, Driver, python_of

from rollout_ft.config import Config
from rollout_ft.testing.local_run import LocalRun, local_run

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]
SCRIPT, DOCKER = Path(__file__).parent / "drivers" / "run_swe_rex.py", Path(__file__).parent / "stand_ins" / "docker"
TURNS = 4
TASK = {"task_id": "rex", "prompt": "Tidy up.", "turns": TURNS, "max_tokens": 16, "seed": 3, "files": {"log": "begun\n"}}
LOCAL, CONTAINER = {"type": "local"}, {"type": "docker", "image": "any", "pull": "never", "startup_timeout": 60}


@dataclass
class Stage:
    run: LocalRun
    driver: Driver
    directory: Path
    state: Path
    played: int = 0

    async def play(self, deployment: Any, kill: str = "", when: str = "", at: int = 0, **task: Any) -> dict[str, Any]:
        self.played += 1
        run, directory = self.run, self.directory / str(self.played)
        directory.mkdir()
        asked = {
            "url": run.url, "operator_key": run.keys.operator, "secret": run.keys.secret, "prefix": f"p{self.played}-",
            "task": {**TASK, "deployment": deployment, **task}, "directory": str(directory), "kill": kill, "when": when, "at": at,
            "marks": str(self.directory),
        }  # fmt: skip
        said = await self.driver.ask(asked)
        assert "result" in said, said
        assert not directory.exists(), "something of the trial is left"
        assert said["left"] == [], "a container is left"
        return said

    async def steps(self, deployment: Any, *commands: Any, **asked: Any) -> dict[str, Any]:
        directory = asked.pop("directory", self.directory / "alone")
        task = {"deployment": deployment, **asked.pop("task", {})}
        steps = [c if isinstance(c, dict) else {"command": c, "timeout_s": 5} for c in commands]
        directory.mkdir(exist_ok=True)
        return await self.driver.ask({"task": task, "steps": steps, "directory": str(directory), **asked})


async def start(state: Path) -> Driver:
    path = f"{DOCKER}:{os.environ['PATH']}"
    python = str(python_of("swe-rex"))
    return await Driver.start("swe-rex", SCRIPT, PATH=path, STAND_IN_STATE=str(state), STAND_IN_PYTHON=python, PYTHONPATH=str(ROOT))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Stage]:
    engine = {"count": 1, "stream_interval_tokens": 2, "args": ["--model", "hash", "--tokens-per-s", "400"]}
    state = tmp_path_factory.mktemp("containers")
    async with local_run(Config.model_validate({"engine": engine})) as run:
        driver = await start(state)
        try:
            yield Stage(run, driver, tmp_path_factory.mktemp("sandboxes"), state)
        finally:
            await driver.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clean(stage: Stage) -> dict[str, Any]:
    """The same trial in a sandbox of our own kind of deployment or another is the same trial."""
    said = await stage.play(CONTAINER)
    assert (said["result"]["outcome"], said["result"]["attempts"]) == ("completed", 1)
    assert said["taken"] == {str(n): 1 for n in range(1, TURNS + 1)}
    return said


def expect_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert [one["result"][k] for k in ("outcome", "reward", "turns")] == [other["result"][k] for k in ("outcome", "reward", "turns")]
    names = ("token_ids", "loss_mask", "logprobs")
    assert [[path[n] for n in names] for path in one["paths"]] == [[path[n] for n in names] for path in other["paths"]]


async def test_a_local_deployment_and_a_container_make_the_same_trial(stage: Stage, clean: dict[str, Any]):
    said = await stage.play(LOCAL)
    expect_same(said, clean)
    assert said["taken"] == clean["taken"]


@pytest.mark.parametrize("at", range(1, TURNS + 1))
@pytest.mark.parametrize("when", ["in", "behind"])
async def test_of_an_agent_that_is_killed_each_tool_runs_once_and_once_more_to_rebuild_its_sandbox(
    stage: Stage, clean: dict[str, Any], when: str, at: int
):
    said = await stage.play(LOCAL, "agent", when, at)
    expect_same(said, clean)
    assert said["result"]["attempts"] == 2
    again = at if at < TURNS else 0  # what is recorded is served: only a step that is due needs a sandbox
    assert said["taken"] == {str(n): 1 + (n <= again) for n in range(1, TURNS + 1)}


@pytest.mark.parametrize("at", [1, 3, TURNS])
@pytest.mark.parametrize("kill", ["sandbox", "sandbox and agent"])
@pytest.mark.parametrize("when", ["in", "behind"])
async def test_a_container_that_is_killed_is_rebuilt_by_its_recorded_steps(
    stage: Stage, clean: dict[str, Any], when: str, kill: str, at: int
):
    said = await stage.play(CONTAINER, kill, when, at)
    expect_same(said, clean)
    assert said["result"]["attempts"] == 1 + ("agent" in kill)
    due = when == "in" or at < TURNS  # some step is, and so another container
    more = {int(n): count - 1 - (due and int(n) <= at) for n, count in said["taken"].items()}
    if kill == "sandbox" or when == "behind":
        assert not any(more.values()), said["taken"]
    # Whether a dead agent's step had another container before its attempt was over is a matter of moments.
    assert set(more.values()) <= {-1, 0, 1}, said["taken"]
    assert all(n <= at for n, by in more.items() if by), said["taken"]


async def test_a_driver_that_is_killed_leaves_a_container_that_the_next_sandbox_of_its_trial_ends(stage: Stage, tmp_path: Path):
    driver = await start(stage.state)
    alone = Stage(stage.run, driver, tmp_path, stage.state)
    first = await alone.steps(CONTAINER, "pwd", directory=tmp_path / "t", leave=True)
    await driver.aclose()
    left = [p.name for p in stage.state.iterdir()]
    assert first["containers"] == 1
    assert len(left) == 2
    assert [name.partition("-")[0] for name in first["there"]] == ["container"]
    again = await stage.steps(CONTAINER, "pwd", directory=tmp_path / "t")
    assert again["said"][0]["output"] != first["said"][0]["output"]
    assert again["containers"] == 1, "the one that was left is gone"
    assert not [*stage.state.iterdir()]
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("deployment", [LOCAL, CONTAINER], ids=["local", "container"])
async def test_a_step_says_what_its_command_did(stage: Stage, deployment: Any):
    said = await stage.steps(
        deployment, "cat a/b; echo oops >&2", "cd a; X=1", "pwd | grep -o '/a$'; echo $X $ROLLOUT_FT_TOOL_KEY", "false", "echo (",
        {"command": "echo begun; sleep 30", "timeout_s": 0.5}, "echo on", "exit 3", "ls; echo [$X]", {"command": 3},
        task={"files": {"a/b": "hello\n"}, "setup": "echo more >> a/b"},
    )  # fmt: skip
    assert "said" in said, said
    cat, cd, pwd, failed, syntax, slow, on, ended, fresh, none = said["said"]
    assert (cat["output"], cat["exit_code"]) == ("hello\nmore\noops", 0)
    assert cd["exit_code"] == 0
    assert pwd["output"] == "/a\n1 key-2"
    assert failed["exit_code"] == 1
    assert (syntax["exit_code"], "syntax error" in syntax["output"]) == (2, True)
    assert (slow["timed_out"], slow["exit_code"], "begun" in slow["output"]) == (True, None, True)
    assert (on["output"], on["exit_code"]) == ("on", 0)
    assert (ended["shell_ended"], ended["exit_code"]) == (True, None)
    assert fresh["output"] == "a\n[]"
    assert "command" in none["error"]


async def test_a_deployment_that_is_none_of_theirs_is_the_tasks_fault(stage: Stage):
    for deployment, why in [
        ({"type": "docker", "imag": "x"}, "imag: Extra inputs"),
        ({"type": "tent"}, "there is no type 'tent'; SWE-ReX"),
    ]:
        assert (await stage.steps(deployment, "pwd"))["raised"].startswith(f"BadTask: deployment: {why}")


async def test_a_setup_that_fails_is_a_lost_environment(stage: Stage):
    said = await stage.steps(LOCAL, "pwd", task={"setup": "echo no; false"})
    assert said["raised"].startswith("EnvironmentLost: setup: exit code 1: ")
    assert not [*(stage.directory / "alone").glob("live-*")]
