"""The local sandbox: real commands, real processes, real copies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from rollout_ft.errors import BadTask
from rollout_ft.trial.environment import EnvironmentLost
from rollout_ft.trial.sandbox import MAX_OUTPUT_BYTES, LocalSandbox, local


@pytest_asyncio.fixture
async def sandbox(tmp_path: Path) -> AsyncGenerator[LocalSandbox]:
    made = local({"files": {"a/b.txt": "hello"}}, "t", tmp_path / "t")
    await made.start()
    try:
        yield made
    finally:
        await made.stop()
        assert not list(tmp_path.glob("t/live-*"))


async def run(sandbox: LocalSandbox, command: str, **more: Any) -> Any:
    return await sandbox.step({"command": command, **more}, "key-1")


async def test_a_command_runs_where_the_tasks_files_are(sandbox: LocalSandbox):
    assert await run(sandbox, "cat a/b.txt; echo oops >&2; exit 3") == {
        "output": "hellooops\n", "exit_code": 3, "timed_out": False, "truncated_bytes": 0,
    }  # fmt: skip


async def test_a_command_is_told_its_idempotency_key_and_nothing_of_ours(sandbox: LocalSandbox):
    os.environ["ROLLOUT_FT_SECRET_OF_OURS"] = "secret"
    try:
        said = (await run(sandbox, "env"))["output"]
    finally:
        del os.environ["ROLLOUT_FT_SECRET_OF_OURS"]
    assert "ROLLOUT_FT_TOOL_KEY=key-1" in said
    assert "secret" not in said


async def test_what_changes_the_files_is_there_for_the_next(sandbox: LocalSandbox):
    await run(sandbox, "echo more >> a/b.txt")
    assert (await run(sandbox, "cat a/b.txt"))["output"] == "hellomore\n"


async def test_a_command_that_takes_too_long_is_ended_and_says_so(sandbox: LocalSandbox):
    said = await run(sandbox, "echo begun; sleep 60", timeout_s=0.5)
    assert (said["output"], said["timed_out"], said["exit_code"]) == ("begun\n", True, -9)
    assert (await run(sandbox, "echo on"))["output"] == "on\n"


async def test_a_command_that_never_stops_talking_is_cut_and_ended(sandbox: LocalSandbox):
    said = await run(sandbox, "yes", timeout_s=0.5)
    assert len(said["output"]) == MAX_OUTPUT_BYTES
    assert said["timed_out"]
    assert said["truncated_bytes"] > 0


async def test_what_a_command_leaves_in_the_background_does_not_hold_up_its_result_and_ends_with_the_sandbox(tmp_path: Path):
    sandbox = local({}, "t", tmp_path / "t")
    await sandbox.start()
    pid = int((await run(sandbox, "setsid sleep 300 & echo $!", timeout_s=5))["output"])
    assert psutil.pid_exists(pid)
    await sandbox.stop()
    assert not psutil.pid_exists(pid)


async def test_a_snapshot_is_what_was_there_then(sandbox: LocalSandbox, tmp_path: Path):
    await run(sandbox, "ln -s a/b.txt link; mkfifo pipe; chmod 700 a/b.txt")
    name = await sandbox.snapshot()
    await run(sandbox, "echo later >> a/b.txt; rm link")
    other = local({"files": {"a/b.txt": "hello"}}, "t", tmp_path / "other")
    os.rename(tmp_path / "t" / name, tmp_path / name)
    (tmp_path / "other").mkdir()
    os.rename(tmp_path / name, tmp_path / "other" / name)
    await other.restore(name)
    assert (await run(other, "cat link; stat -c %a a/b.txt; test -p pipe && echo fifo"))["output"] == "hello700\nfifo\n"
    await other.stop()
    await other.forget(name)
    await other.forget(name)
    assert not (tmp_path / "other").exists()


async def test_a_snapshot_that_is_not_there_is_a_lost_environment(sandbox: LocalSandbox, tmp_path: Path):
    with pytest.raises(EnvironmentLost, match="is not there"):
        await local({}, "t", tmp_path / "other").restore("snapshot-0123456789ab")


@pytest.mark.parametrize("name", ["/etc", "../t", "snapshot-0123456789ab/../..", "", "live-01234567"])
async def test_no_name_leads_out_of_the_snapshots_of_a_trial(sandbox: LocalSandbox, tmp_path: Path, name: str):
    for call in (sandbox.restore, sandbox.forget):
        with pytest.raises(EnvironmentLost, match="no snapshot"):
            await call(name)
    assert sandbox.path.exists()


@pytest.mark.parametrize("command", ["echo a\0b", "true " + "x" * 200_000])
async def test_a_command_that_no_shell_takes_is_an_error_and_not_the_end_of_the_sandbox(sandbox: LocalSandbox, command: str):
    assert "cannot be run" in (await run(sandbox, command))["error"]
    assert (await run(sandbox, "echo on"))["output"] == "on\n"


async def test_a_command_that_removes_the_directory_has_the_next_begin_in_an_empty_one(sandbox: LocalSandbox):
    await run(sandbox, "rm -rf ~")
    assert (await run(sandbox, "ls; echo on"))["output"] == "on\n"


@pytest.mark.parametrize("timeout_s", [0, -1, 1e300, float("nan"), "10", None, True and 10_000])
async def test_a_time_limit_that_is_none_is_refused(sandbox: LocalSandbox, timeout_s: Any):
    assert "timeout_s" in (await run(sandbox, "echo hi", timeout_s=timeout_s))["error"]


async def test_folders_that_may_not_be_written_are_removed_as_well(tmp_path: Path):
    sandbox = local({}, "t", tmp_path / "t")
    await sandbox.start()
    await run(sandbox, "mkdir -p a/b; touch a/b/c; chmod -R a-w a")
    name = await sandbox.snapshot()
    await sandbox.stop()
    await sandbox.forget(name)
    assert not (tmp_path / "t").exists()


async def test_a_sandbox_whose_process_is_killed_in_mid_command_is_lost_with_all_that_ran_in_it(sandbox: LocalSandbox):
    await run(sandbox, "echo hi")
    running = asyncio.create_task(run(sandbox, "echo $$ > pid; sleep 300"))
    pid_file = sandbox.path / "pid"
    async with asyncio.timeout(10):
        while not (pid_file.exists() and pid_file.read_text().strip()):
            await asyncio.sleep(0.01)
    shell, init = int(pid_file.read_text()), sandbox.pid()
    assert init is not None
    os.kill(init, signal.SIGKILL)
    with pytest.raises(EnvironmentLost, match="process ended"):
        await running
    await sandbox.stop()
    assert not psutil.pid_exists(shell)


async def test_a_new_sandbox_of_a_trial_removes_what_a_dead_one_left(tmp_path: Path):
    left = tmp_path / "t" / "live-dead"
    left.mkdir(parents=True)
    sandbox = local({}, "t", tmp_path / "t")
    await sandbox.start()
    assert not left.exists()
    await sandbox.stop()
    assert not (tmp_path / "t").exists()


async def test_a_task_whose_files_lie_outside_is_refused(tmp_path: Path):
    with pytest.raises(BadTask, match="outside the sandbox"):
        await local({"files": {"../../x": ""}}, "t", tmp_path / "t").start()


@pytest.mark.parametrize("action", [{}, {"command": 3}, {"command": ["ls"]}])
async def test_an_action_without_a_command_says_what_is_missing(sandbox: LocalSandbox, action: Any):
    assert "command" in (await sandbox.step(action, "key"))["error"]
