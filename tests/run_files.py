"""`rollout-ft run` as a process of its own, killed where a test wants it, and what its directory then holds."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ray_run import MARK, nothing_left
from safetensors import safe_open

BIN = Path(sys.executable).with_name("rollout-ft")
CONFIG = "configs/local-cpu.yaml"
SLOW, FAST = "60", "0"
PATIENCE_S = 60.0


def settings(tasks: Path, *, speed: str = FAST) -> list[str]:
    engine = f"engine.args=[--tokens-per-s,'{speed}',--model,hash]"
    return ["ray.address=local", "engine.count=2", engine, f"trial.tasks={tasks}", "trial.concurrency=3"]


def first_tasks(path: Path, count: int) -> Path:
    path.write_text("\n".join(Path("examples/tasks/quickstart.jsonl").read_text().splitlines()[:count]))
    return path


class Command:
    """A command that runs; killed at the latest when the block is left. `ray` is what it is told of a cluster."""

    def __init__(self, *args: str, mark: str, ray: dict[str, str] | None = None):
        self._temporary = tempfile.mkdtemp(prefix="t")  # short: the paths of sockets are
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {MARK: mark, "TMPDIR": self._temporary} | (ray or {})
        self._process = subprocess.Popen([str(BIN), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def until(self, there: Callable[[], Any]) -> None:
        """Returns when something is there, while the command runs."""
        deadline = time.monotonic() + PATIENCE_S
        while not there():
            assert self._process.poll() is None, self._process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()

    def stop(self) -> tuple[int, str]:
        self._process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        _, err = self._process.communicate(timeout=PATIENCE_S)
        return self._process.returncode, err


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(directory: Path, name: str) -> list[dict[str, Any]]:
    return [each for each in lines(directory / "events.jsonl") if each["event"] == name]


def data(directory: Path) -> dict[str, Any]:
    """What trains: rewards, token ids, loss masks and logprobs of every trial, as bytes."""
    found: dict[str, Any] = {}
    for line in lines(directory / "trials.jsonl"):
        assert line["trial_id"] not in found, "a trial has two lines"
        with safe_open(directory / "trajectories" / f"{line['trial_id']}.safetensors", "np") as file:
            tensors = {name: np.asarray(file.get_tensor(name)).tobytes() for name in file.keys()}  # noqa: SIM118 - no mapping
        found[line["trial_id"]] = (line["outcome"], line["reward"], tensors)
    return found


def started(directory: Path) -> bool:
    return (directory / "config.json").exists()


def serving(directory: Path) -> bool:
    return bool(events(directory, "engine.up"))


def under_way(directory: Path) -> bool:
    return bool(lines(directory / "trials.jsonl"))


def clean(place: Path, tasks: Path, *overrides: str) -> dict[str, Any]:
    """What a run of these tasks gives when nothing disturbs it."""
    with Command("run", "-c", CONFIG, "--output", str(place), *settings(tasks), *overrides, mark="clean") as command:
        code, err = command.ended()
    assert code == 0, err
    found = data(place)
    assert len(found) == len(tasks.read_text().splitlines())
    return found


def kill(point: Callable[[Path], bool], out: Path, *settings: str) -> None:
    """Runs, and is killed with its whole cluster once `point` is reached."""
    mark = uuid.uuid4().hex
    with Command("run", "-c", CONFIG, "--output", str(out), *settings, mark=mark) as command:
        command.until(lambda: point(out))
        command.kill()
    asyncio.run(nothing_left(mark))


def goes_on(out: Path, *overrides: str) -> tuple[int, str]:
    """Resumes; its exit code and what it said."""
    mark = uuid.uuid4().hex
    with Command("resume", str(out), *overrides, mark=mark) as command:
        code, err = command.ended()
    asyncio.run(nothing_left(mark))
    return code, err
