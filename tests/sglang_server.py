"""A real SGLang on a CPU, for tests: fixtures for a shared one and for ones that a test may break."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil
import pytest

from rollout_ft.engine.process import GUARD, free_port
from rollout_ft.testing.sglang_cpu import CPU_ARGS, launch_command, models_command

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venvs/sglang/bin/python"
START_S = 150


@dataclass
class RealSGLang:
    """A server under a guard: whatever ends the tests ends it too, with its scheduler and detokenizer."""

    url: str
    log: Path
    _guard: subprocess.Popen[bytes]
    _pipe: int

    @property
    def pid(self) -> int:
        """The HTTP server's."""
        return psutil.Process(self._guard.pid).children()[0].pid

    @property
    def scheduler_pid(self) -> int:
        children = psutil.Process(self.pid).children(recursive=True)
        return next(child.pid for child in children if "scheduler" in " ".join(child.cmdline()))

    @property
    def alive(self) -> bool:
        return self._guard.poll() is None

    def http(self) -> aiohttp.ClientSession:
        """For what the adapter has no call for; paths are relative."""
        return aiohttp.ClientSession(self.url)

    def kill(self) -> None:
        """All of it, stopped processes included."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        self._guard.wait()

    def wait_until_gone(self, timeout_s: float) -> None:
        self._guard.wait(timeout_s)


Start = Callable[..., RealSGLang]


def _launch(directory: Path, model: Path, *args: str, env: dict[str, str] | None = None) -> RealSGLang:
    port = free_port("127.0.0.1")
    command = [*launch_command(str(PYTHON)), *CPU_ARGS, "--model-path", str(model), "--host", "127.0.0.1", "--port", str(port)]
    log = directory / f"sglang-{port}.log"
    read, write = os.pipe()
    with log.open("wb") as out:
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", GUARD, str(read), *command, *args],
            pass_fds=(read,), start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=out,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        )  # fmt: skip
    os.close(read)
    return RealSGLang(f"http://127.0.0.1:{port}", log, guard, write)


def _wait_until_ready(server: RealSGLang) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.alive:
        try:
            with urllib.request.urlopen(f"{server.url}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    server.kill()
    pytest.fail("SGLang did not start:\n" + "\n".join(server.log.read_text(errors="replace").splitlines()[-30:]))


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
    started: list[RealSGLang] = []

    def start(*args: str, model: Path = tiny_model, env: dict[str, str] | None = None) -> RealSGLang:
        started.append(_launch(tmp_path, model, "--incremental-streaming-output", *args, env=env))
        _wait_until_ready(started[-1])
        return started[-1]

    yield start
    for server in started:
        server.kill()


@pytest.fixture(scope="session")
def sglang_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealSGLang]:
    """One for all tests: leave it as it was found."""
    server = _launch(tmp_path_factory.mktemp("sglang"), tiny_model, "--incremental-streaming-output")
    _wait_until_ready(server)
    yield server
    server.kill()
