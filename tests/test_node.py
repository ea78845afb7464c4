"""How a process of ours settles, where it may not have its way."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import Any

import pytest

from rollout_ft.fleet.node import settle


@pytest.fixture(autouse=True)
def _collector_as_it_was():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_a_process_that_may_not_choose_its_scheduling_serves_all_the_same(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def forbidden(*args: Any) -> None:
        asked.append(args[1])
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)

    async def serve() -> None:
        settle()

    asyncio.run(serve())
    assert asked == [os.SCHED_BATCH]
    assert gc.get_freeze_count() > 0
