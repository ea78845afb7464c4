"""Runs that end in every way that is not theirs to choose, and go on: killed before, in and after the work, stopped, torn,
outlived by their actors, without a journal. What they give is what an undisturbed run gives, to the bit."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_run import marked, nothing_left
from run_files import (
    CONFIG,
    FAST,
    SLOW,
    Command,
    clean,
    data,
    events,
    first_tasks,
    goes_on,
    kill,
    lines,
    serving,
    settings,
    started,
    under_way,
)  # fmt: skip

from rollout_ft.cli.directory import saved_config, with_journal
from rollout_ft.cli.journals import Journals
from rollout_ft.cli.trials import Past
from rollout_ft.types import Turn

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
TASKS = 6


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_tasks(tmp_path_factory.mktemp("r") / "tasks.jsonl", TASKS)


@pytest.fixture(scope="module")
def undisturbed(tasks: Path) -> dict[str, Any]:
    return clean(tasks.parent / "clean", tasks)


def all_ended(directory: Path) -> bool:
    return len(lines(directory / "trials.jsonl")) == TASKS


@pytest.mark.parametrize("point", [started, serving, all_ended])
def test_wherever_a_run_is_killed_it_goes_on(point: Callable[[Path], bool], tasks: Path, tmp_path: Path, undisturbed: dict[str, Any]):
    out = tmp_path / "out"
    kill(point, out, *settings(tasks, speed=SLOW if point is not all_ended else FAST))
    assert not (out / "summary.json").exists()
    code, err = goes_on(out)
    assert code == 0, err
    assert data(out) == undisturbed
    assert json.loads((out / "summary.json").read_text())["outcomes"] == {"completed": TASKS}


def test_a_run_goes_on_twice_with_the_same_command_and_owes_what_is_torn(tasks: Path, tmp_path: Path, undisturbed: dict[str, Any]):
    mark, out = uuid.uuid4().hex, tmp_path / "out"
    args = ["run", "-c", CONFIG, "--output", str(out), *settings(tasks, speed=SLOW)]
    with Command(*args, mark=mark) as command:
        command.until(lambda: under_way(out))
        code, err = command.stop()
    assert code == 1
    assert f"rollout-ft resume {out}" in err
    with Command(*args, mark=mark) as command:
        command.until(lambda: len(lines(out / "trials.jsonl")) >= 3)
        command.kill()
    asyncio.run(nothing_left(mark))
    *whole, last = (out / "trials.jsonl").read_bytes().splitlines(keepends=True)
    (out / "trials.jsonl").write_bytes(b"".join(whole) + last[:-20])
    (out / "events.jsonl").write_bytes((out / "events.jsonl").read_bytes() + b'{"event": "vi')
    with Command(*args, mark=mark) as command:
        code, err = command.ended()
    assert code == 0, err
    assert data(out) == undisturbed
    assert len(events(out, "run.resumed")) == 2
    written = {line["trial_id"]: line for line in lines(out / "trials.jsonl")}
    owed = json.loads(last)
    assert written[owed["trial_id"]] | {"seconds": 0} == owed | {"seconds": 0}, "what was owed was read, not played again"
    before = (out / "trials.jsonl").read_bytes()
    with Command("resume", str(out), mark=mark) as command:
        assert command.ended()[0] == 0
    assert (out / "trials.jsonl").read_bytes() == before
    asyncio.run(nothing_left(mark))


CLUSTER = """
import json, os, sys
from rollout_ft.cluster import connect
from rollout_ft.config import RayConfig

joined = connect(RayConfig(address="local"))
print(json.dumps({k: v for k, v in os.environ.items() if k.startswith("RAY_")} | {"RAY_ADDRESS": joined.address}), flush=True)
sys.stdin.read()
joined.leave()
"""


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """What a command needs to join a cluster that is not its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with subprocess.Popen([sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.communicate(timeout=60)


def test_actors_that_outlive_their_driver_are_adopted(tasks: Path, tmp_path: Path, undisturbed: dict[str, Any], cluster: dict[str, str]):
    mark, out = uuid.uuid4().hex, tmp_path / "out"
    args = ["-c", CONFIG, "--output", str(out), *settings(tasks, speed=SLOW), "ray.address=auto", "store.journal_dir=none"]
    with Command("run", *args, mark=mark, ray=cluster) as command:
        command.until(lambda: under_way(out))
        command.kill()
    asyncio.run(nothing_left(mark))  # the driver's own: its agents do not outlive it
    with Command("resume", str(out), mark=mark, ray=cluster) as command:
        code, err = command.ended()
    assert code == 0, err
    assert data(out) == undisturbed
    assert len(events(out, "run.adopted")) == 1
    assert len(events(out, "engine.up")) == 2, "no engine was started twice"


def test_actors_under_another_config_are_ended_before_the_journal_has_another_writer(
    tasks: Path, tmp_path: Path, undisturbed: dict[str, Any], cluster: dict[str, str]
):
    mark, out = uuid.uuid4().hex, tmp_path / "out"
    args = ["-c", CONFIG, "--output", str(out), *settings(tasks, speed=SLOW), "ray.address=auto"]
    with Command("run", *args, mark=mark, ray=cluster) as command:
        command.until(lambda: under_way(out))
        command.kill()
    with Command("resume", str(out), "engine.count=1", "store.replicas=1", mark=mark, ray=cluster) as command:
        code, err = command.ended()
    assert code == 0, err
    assert data(out) == undisturbed
    assert not events(out, "run.adopted")


def test_a_run_without_a_journal_does_not_go_on_after_its_cluster(tasks: Path, tmp_path: Path):
    kill(under_way, tmp_path / "out", *settings(tasks, speed=SLOW), "store.journal_dir=none")
    code, err = goes_on(tmp_path / "out")
    assert code == 1
    assert "it has no journal (store.journal_dir is none)" in err


def test_a_journal_that_is_older_than_what_was_known_is_not_gone_on_from(tasks: Path, tmp_path: Path):
    out = tmp_path / "out"
    kill(under_way, out, *settings(tasks, speed=SLOW))
    with (out / "events.jsonl").open("a") as file:
        file.write('{"event": "view.opened", "number": 9}\n')
    code, err = goes_on(out)
    assert code == 1
    assert "no live store has opened view 9" in err


def test_a_trial_that_cannot_be_read_is_named_and_does_not_stop_the_others(tasks: Path, tmp_path: Path, undisturbed: dict[str, Any]):
    out = tmp_path / "out"
    kill(under_way, out, *settings(tasks, speed=SLOW))
    past = Past(out)
    broken = next(row["trial_id"] for row in past.listed()["trials"] if row["state"] == "unfinished" and row["turns"])
    entries = Journals(with_journal(saved_config(out), out)).trial(broken).entries
    reply = next(entry.reply for entry in entries if isinstance(entry, Turn))
    for file in (out / "journal").glob("*/*.segment"):
        stored = bytearray(file.read_bytes())
        stored[stored.index(reply)] ^= 1
        file.write_bytes(stored)
    code, err = goes_on(out)
    assert code == 1
    assert f"{broken} has no outcome yet" in err
    assert ".segment" in err
    assert "byte" in err
    assert data(out) == {trial_id: made for trial_id, made in undisturbed.items() if trial_id != broken}


def test_a_run_that_loses_every_store_goes_on_from_its_journals(tasks: Path, tmp_path: Path, undisturbed: dict[str, Any]):
    mark, out = uuid.uuid4().hex, tmp_path / "out"
    args = ["-c", CONFIG, "--output", str(out), *settings(tasks, speed=SLOW)]
    with Command("run", *args, mark=mark) as command:
        command.until(lambda: under_way(out))
        stores = [p for p in marked(mark) if "ray::StoreActor" in " ".join(p.cmdline())]
        assert len(stores) == 2
        for store in stores:
            store.send_signal(signal.SIGKILL)
        code, err = command.ended()
    assert code == 0, err
    assert data(out) == undisturbed
    assert len(events(out, "store.lost")) == 2
