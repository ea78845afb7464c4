"""`ray job submit … -- rollout-ft run …`: stopped by Ray, gone on with in another job, against an undisturbed run.

A head of its own, with a dashboard and token authentication, on ports outside those of Ray's workers (10002 to 19999).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_run import MARK, marked, nothing_left
from run_files import BIN, CONFIG, SLOW, clean, data, events, first_tasks, lines, settings

from rollout_ft.config import load

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
RAY = Path(sys.executable).with_name("ray")
PATIENCE_S = 120.0
TASKS = 6


def free_ports(count: int) -> list[int]:
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(21000, 31000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
    return found


@dataclass(frozen=True)
class Head:
    url: str
    env: dict[str, str]

    def ray(self, *args: str, check: bool = True) -> str:
        done = subprocess.run([str(RAY), *args], env=self.env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, name: str, *command: str, wait: bool) -> str:
        return self.ray(
            "job", "submit", "--address", self.url, "--submission-id", name, *([] if wait else ["--no-wait"]), "--", *command
        )  # fmt: skip

    def logs(self, name: str) -> str:
        return self.ray("job", "logs", "--address", self.url, name)


@pytest.fixture
def head() -> Iterator[Head]:
    mark, temporary = uuid.uuid4().hex, tempfile.mkdtemp(prefix="t")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        MARK: mark, "TMPDIR": temporary, "RAY_TMPDIR": temporary, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }  # fmt: skip
    gcs, dashboard, agent, metrics, client, dashboard_grpc, runtime_env = free_ports(7)
    subprocess.run(
        [
            str(RAY), "start", "--head", "--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-grpc-port={dashboard_grpc}", f"--runtime-env-agent-port={runtime_env}", "--num-cpus=4",
            "--object-store-memory=150000000", f"--temp-dir={temporary}", "--disable-usage-stats",
        ],
        env=env, capture_output=True, timeout=PATIENCE_S, check=True,
    )  # fmt: skip
    yield Head(f"http://127.0.0.1:{dashboard}", env)
    for process in marked(mark):
        with contextlib.suppress(psutil.Error):
            process.kill()
    asyncio.run(nothing_left(mark))
    shutil.rmtree(temporary, ignore_errors=True)


def wait_until(there: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_that_ray_stopped_goes_on_in_another_job(tmp_path: Path, head: Head):
    tasks = first_tasks(tmp_path / "tasks.jsonl", TASKS)
    out, config = tmp_path / "out", tmp_path / "config.json"
    overrides = [*settings(tasks, speed=SLOW), "ray.address=auto"]
    config.write_text(load(CONFIG, overrides).model_dump_json())  # what is submitted is a line for a shell
    head.submit("first", str(BIN), "run", "-c", str(config), "--output", str(out), wait=False)
    wait_until(lambda: lines(out / "trials.jsonl"))
    head.ray("job", "stop", "--address", head.url, "first")
    assert not (out / "summary.json").exists() or len(lines(out / "trials.jsonl")) < TASKS
    assert "rollout-ft resume" in head.logs("first")
    before = lines(out / "trials.jsonl")
    head.submit("second", str(BIN), "resume", str(out), wait=True)
    assert data(out) == clean(tmp_path / "clean", tasks)
    assert lines(out / "trials.jsonl")[: len(before)] == before
    assert len(events(out, "run.resumed")) == 1
