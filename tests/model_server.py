"""Model servers in processes of their own, for tests: the real SGLang on a CPU and the small engine, started alike."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ports import free_port

from rollout_ft.engine.process import GUARD
from rollout_ft.testing.sglang_cpu import CPU_ARGS, launch_command, models_command

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venvs/sglang/bin/python"
START_S = 150


@dataclass
class ModelServer:
    """A server under a guard: whatever ends the tests ends it too, with all its processes."""

    url: str
    log: Path
    model: Path
    _guard: subprocess.Popen[bytes]
    _pipe: int

    @property
    def pid(self) -> int:
        """The HTTP server's."""
        return psutil.Process(self._guard.pid).children()[0].pid

    @property
    def scheduler_pid(self) -> int:
        """Of the process that computes: the small engine has only the one."""
        children = psutil.Process(self.pid).children(recursive=True)
        return next((child.pid for child in children if "scheduler" in " ".join(child.cmdline())), self.pid)

    @property
    def alive(self) -> bool:
        return self._guard.poll() is None

    def kill(self) -> None:
        """All of it, stopped processes included."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        self._guard.wait()

    def wait_until_gone(self, timeout_s: float) -> None:
        self._guard.wait(timeout_s)


Start = Callable[..., ModelServer]


def launch(program: Sequence[str], model: Path, directory: Path, *args: str, env: dict[str, str] | None = None) -> ModelServer:
    """Starts a server and returns when it is ready; fails the test with its last words when it does not get there."""
    port = free_port()
    command = [*program, "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port), *args]
    log = directory / f"server-{port}.log"
    read, write = os.pipe()
    with log.open("wb") as out:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", GUARD, str(read), *command],
            pass_fds=(read,), start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=out,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (env or {}),
        )  # fmt: skip
    os.close(read)
    server = ModelServer(f"http://127.0.0.1:{port}", log, model, guard, write)
    _wait_until_ready(server)
    return server


def launch_sglang(model: Path, directory: Path, *args: str, env: dict[str, str] | None = None) -> ModelServer:
    return launch([*launch_command(str(PYTHON)), *CPU_ARGS], model, directory, *args, env=env)


def _wait_until_ready(server: ModelServer) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.alive:
        try:
            with urllib.request.urlopen(f"{server.url}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    server.kill()
    pytest.fail("the server did not start:\n" + "\n".join(server.log.read_text(errors="replace").splitlines()[-30:]))


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    if not PYTHON.exists():
        pytest.fail("there is no SGLang here: make test-sglang installs it")
    return PYTHON


@pytest.fixture(scope="session")
def tiny_model(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model with a byte-level tokenizer (263 ids) and a context of 4096."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    subprocess.run(models_command(str(sglang_python), "tiny", directory), check=True, capture_output=True)
    return directory


@pytest.fixture
def start_sglang(tiny_model: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts servers that this test may break: `start_sglang("--some-argument", env={...})`."""
    started: list[ModelServer] = []

    def start(*args: str, model: Path = tiny_model, env: dict[str, str] | None = None) -> ModelServer:
        started.append(launch_sglang(model, tmp_path, "--incremental-streaming-output", *args, env=env))
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def sglang_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    """One for all tests: leave it as it was found."""
    server = launch_sglang(tiny_model, tmp_path_factory.mktemp("sglang"), "--incremental-streaming-output")
    yield server
    server.kill()
