"""Engines that stretch over two nodes: whatever happens to one of them happens to the engine, and nothing is left of it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from rollout_ft import runtime
from rollout_ft.cluster import connect
from rollout_ft.config import RayConfig
from rollout_ft.rayapi import ray
from rollout_ft.runtime import Run
from rollout_ft.testing.machines import Machines
from rollout_ft.testing.siege import settings, until
from rollout_ft.types import JSON

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


class Stretched:
    """A run with one engine of two nodes, and the processes of its ranks."""

    def __init__(self, run: Run, directory: Path, events: list[JSON]):
        self.run, self._directory, self.events = run, directory, events

    def ranks(self) -> dict[int, list[psutil.Process]]:
        """The processes of each rank, whichever start they belong to."""
        found: dict[int, list[psutil.Process]] = {0: [], 1: []}
        for process in psutil.process_iter(["cmdline", "status"]):
            words: list[str] = process.info["cmdline"] or []
            if (
                process.info["status"] != psutil.STATUS_ZOMBIE
                and any(str(self._directory) in w for w in words)
                and "guard.py" not in words[3]
            ):
                found[int(words[words.index("--node-rank") + 1])].append(process)
        return found

    def pid(self, rank: int) -> int:
        (process,) = self.ranks()[rank]
        return process.pid

    async def incarnation(self, number: int) -> None:
        """Returns when this start of the engine serves."""
        await until(lambda: any(e["event"] == "engine.up" and e["incarnation"] == number for e in self.events))

    def dead(self) -> list[str]:
        return [e["reason"] for e in self.events if e["event"] == "engine.dead"]

    async def replaced(self, *pids: int) -> None:
        """Returns when nothing is left of the first start, and the second one is whole."""
        await until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
        await self.incarnation(2)
        assert [len(processes) for processes in self.ranks().values()] == [1, 1]


def machine_of(pid: int, ms: Machines) -> str:
    """The node whose raylet has the process among its descendants."""
    above = {p.pid for p in psutil.Process(pid).parents()}
    return next((node_id for node_id, m in ms.workers.items() if m.pid in above), "head")


@asynccontextmanager
async def stretched(ms: Machines, directory: Path, name: str) -> AsyncGenerator[Stretched]:
    args = ["--model", "hash", "--tokens-per-s", "60", "--count-file", f"{directory}/{{engine}}.count"]
    config = settings(ms.address, str(directory), name, 1, engine={"count": 1, "nodes": 2, "args": args})
    events: list[JSON] = []
    async with runtime.start(config) as run:
        run.on_event = events.append
        yield Stretched(run, directory, events)
    assert [len(processes) for processes in Stretched(run, directory, events).ranks().values()] == [0, 0]
    assert set(await asyncio.to_thread(groups, ms, name)) == {"REMOVED"}


def groups(ms: Machines, name: str) -> list[str]:
    """What became of the nodes that were reserved for the run's engines."""
    joined = connect(RayConfig(address=ms.address))
    try:
        table: dict[str, Any] = ray.util.placement_group_table()
        return [group["state"] for group in table.values() if group["name"].startswith(f"{name}/")]
    finally:
        joined.leave()


async def test_smoke_the_loss_of_any_rank_is_the_loss_of_the_engine(ms: Machines, tmp_path: Path):
    async with stretched(ms, tmp_path, "ranks") as s:
        first, second = s.pid(0), s.pid(1)
        assert machine_of(first, ms) != machine_of(second, ms)
        os.kill(second, signal.SIGKILL)
        await s.replaced(first, second)
        assert len(s.dead()) == 1
        assert s.dead()[0].startswith("rank 1 killed by SIGKILL")


async def test_the_loss_of_the_first_rank_ends_the_others(ms: Machines, tmp_path: Path):
    async with stretched(ms, tmp_path, "first") as s:
        first, second = s.pid(0), s.pid(1)
        os.kill(first, signal.SIGSEGV)
        await s.replaced(first, second)
        assert s.dead()[0].startswith("killed by SIGSEGV")


async def test_an_engines_actor_that_is_killed_takes_all_ranks_along(ms: Machines, tmp_path: Path):
    async with stretched(ms, tmp_path, "actor") as s:
        first, second = s.pid(0), s.pid(1)
        pids: dict[str, int] = await s.run.supervisor.ask("pids")
        os.kill(next(pid for name, pid in pids.items() if "/engine-0/" in name), signal.SIGKILL)
        await s.replaced(first, second)


async def test_a_node_that_is_killed_takes_the_whole_engine_along(ms: Machines, tmp_path: Path):
    async with stretched(ms, tmp_path, "node") as s:
        first, second = s.pid(0), s.pid(1)
        node = next(n for n in (machine_of(second, ms), machine_of(first, ms)) if n != "head")
        ms.workers[node].kill()
        await s.replaced(first, second)


async def test_a_supervisor_that_is_killed_leaves_the_engine_and_its_nodes_as_they_are(ms: Machines, tmp_path: Path):
    async with stretched(ms, tmp_path, "supervisor") as s:
        first, second = s.pid(0), s.pid(1)
        pids: dict[str, int] = await s.run.supervisor.ask("pids")
        os.kill(pids["supervisor"], signal.SIGKILL)
        await until(lambda: any(e["event"] == "supervisor.rebuilt" for e in s.events))
        assert (s.pid(0), s.pid(1)) == (first, second)
        os.kill(second, signal.SIGKILL)
        await s.replaced(first, second)
