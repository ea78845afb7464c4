"""The page about a real run that lost an engine: what it says is what the run's own files say."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from report_page import Page, whole

from rollout_ft.cli.directory import create
from rollout_ft.cli.output import Output
from rollout_ft.cli.report import read, write
from rollout_ft.clock import monotonic
from rollout_ft.config import Config, TrialConfig
from rollout_ft.testing.impatient import Impatient, Patience
from rollout_ft.testing.local_run import LocalRun, local_run
from rollout_ft.trial.board import Board
from rollout_ft.trial.siblings import plays

TRIALS, TURNS, TOKENS = 6, 3, 60


async def lose_an_engine(run: LocalRun) -> None:
    """In the middle of a generation."""
    ends, engine = monotonic() + 90, run.crew.engines["engine-0"]
    while not any(turn["tokens"] >= 8 for turn in (await engine.in_flight(TRIALS))["turns"]):
        assert monotonic() < ends
        await asyncio.sleep(0.01)
    engine.unit.kill()


@pytest.mark.timeout(240)
async def test_a_run_that_lost_an_engine_is_on_its_page_to_the_token(tmp_path: Path):
    engine: dict[str, Any] = {"count": 2, "stream_interval_tokens": 4, "args": ["--model", "hash", "--tokens-per-s", "60"]}
    trial = TrialConfig(concurrency=TRIALS)
    config = Config.model_validate({"engine": engine, "trial": trial.model_dump()})
    tasks = [{"task_id": f"t{i}", "tokens": [TOKENS] * TURNS, "tools_s": [0.0] * TURNS} for i in range(TRIALS)]
    directory = create(tmp_path / "run", config, tasks)
    output = Output(directory.path, Board(plays(tasks, trial), trial), config.telemetry.max_events_bytes)
    load = Impatient(Patience(scale=10))
    async with local_run(config) as run:
        await run.whole()
        losing = asyncio.create_task(lose_an_engine(run))
        await run.run_trials(tasks, load.play, prefix="", config=trial, on_result=output.trial)
        await losing
        await load.aclose()
        for event in run.events.take():
            output.event(event)
    summary = output.summary(1.0)
    output.close()
    page = Page(write(read([directory.path])).read_text())
    lines = [json.loads(line) for line in (directory.path / "trials.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (directory.path / "events.jsonl").read_text().splitlines()]
    happened = Counter(event["event"] for event in events)

    assert len(lines) == TRIALS
    assert json.loads((directory.path / "summary.json").read_text()) == summary
    for name in ("generated", "reused", "wasted"):
        assert whole(page.row("tokens", name)[1]) == summary[f"tokens_{name}"] == sum(line[f"tokens_{name}"] for line in lines)
    assert whole(page.row("tokens", "in trajectories")[1]) == TRIALS * TURNS * TOKENS
    assert summary["tokens_reused"] > 0
    assert page.marks["tokens"]["f-engine"] == happened["engine.dead"] == 1
    assert sum(whole(row[1]) for row in page.cells["recovery"] if row) == happened["session.resumed"] > 0
    told = {tuple(row[1:]) for row in page.cells["worst"] if len(row) == 3}
    assert any(kind == "fault" and said.startswith("its engine engine-0 was lost: ") for kind, said in told)
    assert any(kind == "turn" and "of them from before a fault" in said for kind, said in told)
