"""Agents in processes of their own, started by a script."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from rollout_ft.trial.agents import ProcessAgent
from rollout_ft.trial.client import Session
from rollout_ft.trial.policy import End

HEAVY = """
import os
print("heavy imported", os.getpid(), flush=True)
"""
AGENT = """
def play(task, base_url, api_key):
    return 0.5
"""
SCRIPT = """
import asyncio
from rollout_ft.trial.client import Session
import heavy
from rollout_ft.trial.agents import ProcessAgent

async def main():
    agent = ProcessAgent("agent_of_a_script:play")
    session = Session("t~1", "t", 1, "http://127.0.0.1:1/v1", "key", 0, None)
    for _ in range(3):
        assert (await agent.run({}, session)).reward == 0.5
    agent.close()

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_what_a_script_imports_is_imported_for_all_its_agents_at_once(tmp_path: Path):
    """By the script, and by the process that the agents are forked from."""
    for name, text in (("heavy", HEAVY), ("agent_of_a_script", AGENT), ("script", SCRIPT)):
        (tmp_path / f"{name}.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}
    done = subprocess.run([sys.executable, tmp_path / "script.py"], env=environment, capture_output=True, text=True, timeout=50, check=True)
    pids = [line for line in done.stdout.splitlines() if line.startswith("heavy imported")]
    assert len(set(pids)) == 2, done.stdout


SESSION = Session("t~1", "t", 1, "http://127.0.0.1:1/v1", "key", 0, cast(Any, None))


@pytest.fixture
def agent() -> Iterator[ProcessAgent]:
    made = ProcessAgent("hostile_agent:run")
    yield made
    made.close()


@pytest.mark.parametrize(
    "said",
    [b"\n", b"{}\n", b'{"end":"flown"}\n', b'{"end":"returned","reward":"much"}\n', pickle.dumps(os.getpid) + b"\n", b"x" * 70_000 + b"\n"],
)
async def test_what_an_agents_process_says_of_its_end_is_read_and_never_run(agent: ProcessAgent, said: bytes):
    ended = await agent.run({"say": said.hex()}, SESSION)
    assert ended.end in (End.RAISED, End.DIED)
    assert ended.reward is None


async def test_an_agents_process_that_says_half_of_its_end_holds_up_nobody(agent: ProcessAgent):
    running = asyncio.create_task(agent.run({"say": b'{"end":'.hex(), "then_s": 600}, SESSION))
    while not agent.kill("t"):
        await asyncio.sleep(0.01)
    assert (await running).end is End.DIED
