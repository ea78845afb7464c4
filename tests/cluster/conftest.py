"""A cluster of several nodes for all tests here, the seed of their faults, and the table of what each fault cost."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Generator
from typing import Any

import pytest
from judged import ROWS, Judged
from ray_run import MARK, nothing_left

from rollout_ft.testing.machines import Machines, machines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--siege-seed", type=int, default=7, help="plans the faults")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.stash[ROWS]:
        return
    terminalreporter.section(f"faults, seed {config.getoption('--siege-seed')}")
    terminalreporter.line(
        f"{'fault':45} {'next token s':>12} {'at most':>8} {'longest pause':>13} {'replies':>8} {'lost':>5} {'regenerated':>12}"
    )
    for row in config.stash[ROWS]:
        cells = ["-" if row[k] is None else row[k] for k in ("next_token_s", "next_token_s_max", "pause_s_max")]
        line = f"{row['fault']:45} {cells[0]:>12} {cells[1]:>8} {cells[2]:>13} {row['replies']:>8} {row['turns_lost']:>5}"
        terminalreporter.line(f"{line} {row['tokens_regenerated']:>12}")


@pytest.fixture
def judged(request: pytest.FixtureRequest) -> Judged:
    return Judged(request)


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left() -> Generator[None]:
    mark = os.environ[MARK] = uuid.uuid4().hex
    yield
    asyncio.run(nothing_left(mark))


@pytest.fixture(scope="session")
def shared(_nothing_is_left: None) -> Generator[Machines]:
    with machines(3) as ms:
        yield ms
    assert not os.path.exists(ms.directory)


@pytest.fixture
def ms(shared: Machines) -> Machines:
    """Whole again after what the last test did to it."""
    shared.heal()
    return shared
