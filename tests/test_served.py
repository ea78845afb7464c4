"""`rollout-ft serve --output`: what is kept of a run whose trials are somebody else's; in processes of its own, on real Ray."""

from __future__ import annotations

import asyncio
import json
import signal
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from ray_run import nothing_left
from test_cli import CONFIG, FAST, command, refused, trial_files

from rollout_ft.cli.directory import Directory
from rollout_ft.cli.served import Served, place
from rollout_ft.config import Config
from rollout_ft.telemetry.eventsfile import EventsFile


def said(*args: str) -> Any:
    process = command(*args, "--json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out)


def served(mark: str, output: Path, *overrides: str) -> tuple[Any, openai.OpenAI]:
    process = command("serve", "-c", CONFIG, "--output", str(output), *FAST, *overrides, mark=mark)
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    return process, openai.OpenAI(base_url=ready["gateway_url"], api_key=ready["operator_key"])


def turn(operator: openai.OpenAI, trial_id: str) -> None:
    opened: Any = operator.post("/sessions", body={"trial_id": trial_id}, cast_to=object)
    client = openai.OpenAI(base_url=opened["base_url"], api_key=opened["api_key"])
    client.chat.completions.create(model="any", messages=[{"role": "user", "content": "hello"}], max_tokens=8)


def end(operator: openai.OpenAI, trial_id: str) -> None:
    for _ in range(2):  # told twice, it has one line
        operator.post(f"/trials/{trial_id}/outcome", body={"outcome": "completed", "reward": 1.0}, cast_to=object)


def stop(process: Any) -> str:
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return err


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_what_serve_keeps_is_told_of_like_a_run_and_goes_on_with_its_journal(tmp_path: Path):
    mark, output = uuid.uuid4().hex, tmp_path / "out"
    journal = f"store.journal_dir={tmp_path / 'journal'}"
    process, operator = served(mark, output, journal)
    turn(operator, "first")
    turn(operator, "second")
    end(operator, "first")
    assert said("status", str(output))["outcomes"] == {"completed": 1}
    stop(process)
    assert trial_files(output)["first"]["turns"] == 1
    assert json.loads((output / "summary.json").read_text())["unfinished"] == 1

    process, again = served(mark, output, journal)
    assert again.api_key == operator.api_key
    restarted: Any = again.post("/trials/second/restart", body={"from_attempt": 1}, cast_to=object)
    assert restarted["turns"] == 1
    end(again, "second")
    stop(process)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["trials"], summary["unfinished"]) == (2, 0)
    assert len((output / "trials.jsonl").read_text().splitlines()) == 2
    assert said("audit", str(output))["wrong"] == []
    assert [(row["trial_id"], row["outcome"]) for row in said("trial", "list", str(output))["trials"]] == [
        ("first", "completed"), ("second", "completed"),
    ]  # fmt: skip
    assert said("report", str(output))["figures"][str(output)]["totals"]["trials"] == 2
    asyncio.run(nothing_left(mark))


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_directory_of_a_run_that_ended_with_its_process_is_refused(tmp_path: Path):
    mark, output = uuid.uuid4().hex, tmp_path / "out"
    process, operator = served(mark, output)
    turn(operator, "first")
    end(operator, "first")
    stop(process)
    assert "store.journal_dir" in refused("serve", "-c", CONFIG, "--output", str(output), *FAST)
    assert said("report", str(output))["figures"][str(output)]["totals"]["trials"] == 1
    asyncio.run(nothing_left(mark))


ENDED = {
    "time": 5.0, "event": "trial.ended", "source": "supervisor:a", "seq": 1, "trial": "t", "task": "q", "group": "", "mode": "train",
    "pool": "", "outcome": "completed", "reward": 1.0, "cause": "", "attempts": 1, "turns": 2, "faults_survived": 0, "replayed": 0,
    "seconds": 3, "tokens_generated": 8, "tokens_reused": 0, "tokens_wasted": 0, "tokens_wasted_by": {},
}  # fmt: skip


def unlocked(directory: Directory) -> Directory:
    """What another process would find: the lock is this one's until it ends."""
    return replace(directory, resumed=True)


def test_a_process_that_ends_between_an_event_and_its_line_leaves_the_line_to_the_next(tmp_path: Path):
    directory = place(tmp_path / "out", Config())
    events = EventsFile(directory.path, directory.config.telemetry.max_events_bytes)
    events.append(ENDED)
    events.append({"time": 6.0, "event": "trial.ended", "source": "supervisor:a", "seq": 2, "trial": "of another version"})
    events.close()
    for _ in range(2):
        served = Served(unlocked(directory))
        served.event(ENDED)
        served.close({})
    assert list(trial_files(directory.path)) == ["t"]
    assert len((directory.path / "trials.jsonl").read_text().splitlines()) == 1
    assert json.loads((directory.path / "summary.json").read_text())["trials"] == 1


def test_a_directory_whose_run_never_started_can_be_served_from_again(tmp_path: Path):
    bad = ("serve", "-c", CONFIG, "--output", str(tmp_path / "out"), "ray.address=127.0.0.1:1")
    for _ in range(2):
        assert "ray.address" in refused(*bad)
