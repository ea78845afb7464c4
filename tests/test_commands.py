"""Agents that are a program, with real processes: what they find, how their end is read, and that nothing outlives them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from test_process import FAMILIES, ROOT, Family

from rollout_ft.config import load
from rollout_ft.errors import ConfigError
from rollout_ft.trial.client import Client, Session
from rollout_ft.trial.commands import CAUSE_CHARACTERS, CommandAgent, agent_of, failed
from rollout_ft.trial.policy import AttemptEnd, Blame, End

SESSION = Session("t~2", "t", 2, "http://127.0.0.1:9/sessions/t~2/v1", "the-key", 0, cast(Client, None))
TASK = {"task_id": "t", "prompt": "Explain tides."}


async def run(*argv: str) -> AttemptEnd:
    with contextlib.closing(CommandAgent(argv)) as agent:
        return await agent.run(TASK, SESSION)


async def shell(script: str) -> AttemptEnd:
    return await run("sh", "-c", script)


async def python(code: str, *args: str) -> AttemptEnd:
    return await run(sys.executable, "-I", "-S", "-c", "import json, os, signal, sys\n" + code, *args)


async def test_it_finds_its_task_its_session_and_who_it_is(tmp_path: Path):
    seen = tmp_path / "seen"
    end = await python("json.dump([dict(os.environ), json.load(open(os.environ['ROLLOUT_FT_TASK']))], open(sys.argv[1], 'w'))", str(seen))
    assert end == AttemptEnd(End.RETURNED, None)
    environment, task = json.loads(seen.read_text())
    assert task == TASK
    assert environment.items() >= {
        "OPENAI_BASE_URL": SESSION.base_url, "OPENAI_API_BASE": SESSION.base_url, "OPENAI_API_KEY": "the-key",
        "ANTHROPIC_BASE_URL": "http://127.0.0.1:9/sessions/t~2", "ANTHROPIC_API_KEY": "the-key", "ANTHROPIC_AUTH_TOKEN": "the-key",
        "ROLLOUT_FT_TRIAL_ID": "t", "ROLLOUT_FT_ATTEMPT": "2",
    }.items()  # fmt: skip
    assert environment["PATH"] == os.environ["PATH"]
    assert not Path(environment["ROLLOUT_FT_TASK"]).parent.exists()


@pytest.mark.parametrize(
    ("script", "end"),
    [
        ("true", AttemptEnd(End.RETURNED)),
        ("""echo '{"reward": 0.25}' > $ROLLOUT_FT_RESULT""", AttemptEnd(End.RETURNED, 0.25)),
        ("""echo '{"reward": null}' > $ROLLOUT_FT_RESULT""", AttemptEnd(End.RETURNED)),
        ("""echo '{"error": "it broke"}' > $ROLLOUT_FT_RESULT""", AttemptEnd(End.RAISED, cause="it broke")),
        (
            """echo '{"error": "APITimeoutError: Request timed out."}' > $ROLLOUT_FT_RESULT""",
            AttemptEnd(End.RAISED, cause="APITimeoutError: Request timed out.", blame=Blame.INFRA),
        ),
        ("""echo '{"reward": 1}' > $ROLLOUT_FT_RESULT; echo bad >&2; exit 3""", AttemptEnd(End.RAISED, cause="exit code 3: bad")),
        ("kill -9 $$", AttemptEnd(End.DIED, cause="the agent's process ended with exit code -9")),
        ("sh -c 'kill -9 $$'; exit $?", AttemptEnd(End.DIED, cause="the agent's process ended with exit code 137")),
        ("kill -15 $$", AttemptEnd(End.DIED, cause="the agent's process ended with exit code -15")),
    ],
)
async def test_how_it_ended_is_read_from_its_exit_code_and_its_result(script: str, end: AttemptEnd):
    assert await shell(script) == end


@pytest.mark.parametrize(
    "write",
    [
        "echo '{' > $ROLLOUT_FT_RESULT", "echo 1 > $ROLLOUT_FT_RESULT", """echo '{"reward": "much"}' > $ROLLOUT_FT_RESULT""",
        "mkfifo $ROLLOUT_FT_RESULT", "mkdir $ROLLOUT_FT_RESULT", "ln -s /dev/zero $ROLLOUT_FT_RESULT",
        "ln -s nowhere $ROLLOUT_FT_RESULT", "head -c 2000000 /dev/zero > $ROLLOUT_FT_RESULT",
    ],
)  # fmt: skip
async def test_what_is_no_result_is_the_agents_failure_and_is_said(write: str):
    end = await shell(write)
    assert (end.end, end.reward, end.blame) == (End.RAISED, None, Blame.AGENT)
    assert "ROLLOUT_FT_RESULT is no result" in end.cause


TRACEBACK = "Traceback (most recent call last):\n  File 'a.py', line 1\n    raise it\n"
DURING = "\nDuring handling of the above exception, another exception occurred:\n\n"


@pytest.mark.parametrize(
    ("words", "infra"),
    [
        (TRACEBACK + "openai.APIConnectionError: Connection error.", True),
        (TRACEBACK + "litellm.exceptions.Timeout: litellm.Timeout: APITimeoutError\nmore words", True),
        (TRACEBACK + "openai.InternalServerError", True),
        (TRACEBACK + "ValueError: a" + DURING + TRACEBACK + "anthropic.APITimeoutError: Request timed out.", True),
        (TRACEBACK + "openai.APIConnectionError: Connection error." + DURING + TRACEBACK + "ValueError: a", False),
        (TRACEBACK + "ValueError: APIConnectionError: a", False),
        (TRACEBACK + "openai.BadRequestError: Error code: 400", False),
        ("a Timeout of the tool", False),
        ("", False),
    ],
)
def test_an_error_is_of_the_infrastructure_when_what_it_ended_with_is_what_a_client_raises_for_it(words: str, infra: bool):
    assert (failed("", words).blame is Blame.INFRA) is infra


async def test_whatever_it_prints_it_never_waits_and_the_end_of_it_is_the_cause():
    end = await python("print('x' * 10_000_000); sys.stderr.write('the last words'); sys.exit(1)")
    assert end.cause.endswith("the last words")
    assert len(end.cause) < CAUSE_CHARACTERS + 30


STARTER = """
import asyncio, sys, test_commands
asyncio.run(test_commands.run(*sys.argv[1:]))
"""


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    family = Family(tmp_path / "alive")
    yield family
    family.close()


async def test_what_it_leaves_behind_is_gone_when_its_end_is_told(family: Family):
    assert (await run(*family.command("crash"))).cause == "exit code 3: "
    left = asyncio.create_task(family.gone())
    await asyncio.wait_for(left, 5)


@pytest.mark.parametrize(("part", "count"), FAMILIES)
async def test_an_attempt_that_is_given_up_is_gone_with_all_that_it_started(family: Family, part: str, count: int):
    attempt = asyncio.create_task(run(*family.command(part)))
    await family.arrive(count)
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt
    await family.gone()


@pytest.mark.parametrize(("part", "count"), FAMILIES)
async def test_an_attempt_that_is_killed_died_with_all_that_it_started(family: Family, part: str, count: int):
    agent = CommandAgent(family.command(part))
    attempt = asyncio.create_task(agent.run(TASK, SESSION))
    await family.arrive(count)
    assert not agent.kill("another")
    assert agent.kill("t")
    assert await attempt == AttemptEnd(End.DIED, cause="the agent's process was killed")
    await family.gone()
    assert not agent.kill("t")
    agent.close()


@pytest.mark.parametrize(("part", "count"), FAMILIES)
async def test_no_attempt_outlives_whoever_started_it(family: Family, part: str, count: int):
    path = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", STARTER, *family.command(part)]
    starter = await asyncio.to_thread(subprocess.Popen, command, env=path)
    try:
        await family.arrive(count)
    finally:
        starter.kill()
        starter.wait()
    await family.gone()


def test_a_run_has_one_agent(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"trial\.agent and trial\.command"):
        load(overrides={"trial.agent": "a:b", "trial.command": ["true"]})
    assert load(overrides=["trial.agent=", "trial.command=[sh]"]).trial.command == ["sh"]
    assert isinstance(agent_of(load(overrides={"trial.command": ["true", "x"]}).trial, tmp_path), CommandAgent)


def test_a_program_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="no-such-program"):
        agent_of(load(overrides={"trial.command": ["no-such-program"]}).trial, tmp_path)


FILL = "cd $ROLLOUT_FT_DIR; ls -A; pwd; mkdir -p a/b; touch a/b/c; ln -s /etc d; chmod 500 a/b a; exit 1"


async def test_every_attempt_finds_an_empty_directory_at_the_same_path_and_leaves_none(tmp_path: Path):
    agent = CommandAgent(["sh", "-c", FILL], tmp_path / "attempts")
    first = await agent.run(TASK, SESSION)
    assert first == await agent.run(TASK, SESSION) == AttemptEnd(End.RAISED, cause=f"exit code 1: {tmp_path}/attempts/t/own")
    assert list((tmp_path / "attempts").iterdir()) == []


async def test_what_a_killed_process_left_of_an_attempt_is_not_found_by_the_next(tmp_path: Path):
    left = tmp_path / "t" / "own" / "left"
    left.mkdir(parents=True)
    await CommandAgent(["sh", "-c", FILL], tmp_path).run(TASK, SESSION)
    assert not left.exists()


async def test_a_directory_that_it_made_itself_goes_with_the_agent():
    agent = CommandAgent(["sh", "-c", "echo $ROLLOUT_FT_DIR; exit 1"])
    directory = Path((await agent.run(TASK, SESSION)).cause.removeprefix("exit code 1: ")).parent.parent
    assert directory.exists()
    agent.close()
    assert not directory.exists()
