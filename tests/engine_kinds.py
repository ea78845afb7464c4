"""The engines that the adapter's suite is run against: both models of the small one, and with -m sglang the real one."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from asking import call, until_idle
from model_server import ModelServer, Start, launch, launch_sglang

from rollout_ft.engine.sglang import SGLang
from rollout_ft.testing.small_engine import MODEL_DIR

KINDS = ["transformer", "hash", pytest.param("sglang", marks=pytest.mark.sglang)]
INCREMENTAL = "--incremental-streaming-output"


def launch_kind(kind: str, request: pytest.FixtureRequest, directory: Path, *args: str, env: dict[str, str] | None = None) -> ModelServer:
    if kind == "sglang":
        return launch_sglang(request.getfixturevalue("tiny_model"), directory, *args, env=env)
    # About as fast as the real one here, so that there is a middle of a generation.
    program = [sys.executable, "-m", "rollout_ft.testing.small_engine", "--model", kind, "--tokens-per-s", "300", "--stream-interval", "1"]
    return launch(program, MODEL_DIR, directory, *args, env=env)


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def shared_server(kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    if kind == "sglang":
        yield request.getfixturevalue("sglang_server")
        return
    server = launch_kind(kind, request, tmp_path_factory.mktemp(kind), INCREMENTAL)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def shared_narrow(kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    one_place = ("--max-running-requests", "1", "--max-queued-requests", "1")
    server = launch_kind(kind, request, tmp_path_factory.mktemp(f"narrow-{kind}"), INCREMENTAL, *one_place)
    yield server
    server.kill()


@pytest.fixture
async def server(shared_server: ModelServer) -> AsyncIterator[ModelServer]:
    """Whatever a test left running or paused is gone before the next."""
    yield shared_server
    await tidy(shared_server)


@pytest.fixture
async def narrow(shared_narrow: ModelServer) -> AsyncIterator[ModelServer]:
    """An engine where one request runs and one waits."""
    yield shared_narrow
    await tidy(shared_narrow)


async def tidy(server: ModelServer) -> None:
    await call(server.url, "/continue_generation", {})
    await call(server.url, "/abort_request", {"abort_all": True})
    await until_idle(server.url)


@pytest.fixture
def start(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Start]:
    """Starts an engine that this test may break."""
    started: list[ModelServer] = []

    def launched(*args: str, env: dict[str, str] | None = None, incremental: bool = True) -> ModelServer:
        started.append(launch_kind(kind, request, tmp_path, *args, *([INCREMENTAL] if incremental else []), env=env))
        return started[-1]

    yield launched
    for each in started:
        each.kill()


@pytest.fixture
async def engine(server: ModelServer) -> AsyncIterator[SGLang]:
    adapter = SGLang("e0", server.url)
    yield adapter
    await adapter.aclose()
