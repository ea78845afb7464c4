"""A real run for tests: real Ray, real processes, and a check that nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncGenerator
from typing import Any

import psutil

import rollout_ft
from rollout_ft.clock import monotonic
from rollout_ft.rayapi import ray
from rollout_ft.testing.faults import Fault
from rollout_ft.trial.agents import ProcessAgent
from rollout_ft.trial.runner import TrialResult

MARK = "ROLLOUT_FT_TEST_RUN"
OVERRIDES = [
    "ray.address=local",
    "engine.count=2",
    "engine.args=[--tokens-per-s,'100',--model,hash]",
    "engine.stream_interval_tokens=4",
    "engine.token_timeout_s=1.5",
    "engine.partial_flush_s=0.2",
    "fleet.kill_window_s=1",
    "gateway.ping_s=0.5",
]
AGENT = "rollout_ft.testing.quickstart_agent:run"


class Stage:
    """A run with a fault plan, an agent in processes of its own, and the trials played so far."""

    def __init__(self, run: rollout_ft.Run):
        self.run, self.agent = run, ProcessAgent(AGENT)
        self._plan: Any = ray.get_actor(f"{run.config.run}/faults/1", run.setup.namespace)
        self.events: list[dict[str, Any]] = []
        run.on_event = self.events.append
        self._killer = asyncio.create_task(self._kill_agents())

    async def play(self, name: str, task: dict[str, Any], *faults: Fault, **fields: Any) -> tuple[TrialResult, dict[str, Any]]:
        """Plays one task under faults; the trial is called `{name}-{task_id}`."""
        await self.arm(*faults)
        kept: list[tuple[TrialResult, dict[str, Any]]] = []
        await self.run.run_trials([task], self.agent, prefix=f"{name}-", on_result=lambda r, t: kept.append((r, t)), **fields)
        return kept[0]

    async def arm(self, *faults: Fault) -> None:
        """Each is met by the trial that it names."""
        await self._plan.arm.remote(list(faults))

    async def fired(self) -> list[str]:
        return await self._plan.fired.remote()

    async def whole(self) -> None:
        """Returns when all engines are healthy and the view has all its replicas again."""
        async with asyncio.timeout(60):
            while True:
                fleet = await self.run.fleet()
                if all(e["state"] == "healthy" for e in fleet["engines"]) and len(fleet["view"]["members"]) == 2:
                    return
                await asyncio.sleep(0.05)

    async def _kill_agents(self) -> None:
        while True:
            trial_id = await self._plan.next_agent.remote()
            self.agent.kill(trial_id)  # whichever agent it is by then

    async def aclose(self) -> None:
        self._killer.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._killer
        self.agent.close()


@contextlib.asynccontextmanager
async def staged(*overrides: str) -> AsyncGenerator[Stage]:
    """A run that leaves nothing behind: no process, no temporary directory."""
    mark = os.environ[MARK] = uuid.uuid4().hex
    async with rollout_ft.start("configs/local-cpu.yaml", [*OVERRIDES, *overrides], faults=True) as run:
        stage, temporary = Stage(run), os.environ["RAY_TMPDIR"]
        try:
            yield stage
        finally:
            await stage.aclose()
    await nothing_left(mark)
    assert not os.path.exists(temporary)
    assert "RAY_TMPDIR" not in os.environ


async def nothing_left(mark: str) -> None:
    """Every process that inherited the mark ends."""
    until = monotonic() + 15
    while left := marked(mark):
        assert monotonic() < until, [p.cmdline() for p in left]
        await asyncio.sleep(0.05)


def marked(mark: str) -> list[psutil.Process]:
    """Processes that inherited the mark; this one and its multiprocessing tracker, which ends with it, left out."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.pid == os.getpid() or "resource_tracker" in " ".join(process.cmdline())
            if not ours and process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
    return found


def marked_engines() -> list[psutil.Process]:
    """The processes of this run's engines, told from their guards, which have the same command line, by their parents."""
    found = [p for p in marked(os.environ[MARK]) if "--stream-interval" in p.cmdline()]
    pids = {p.pid for p in found}
    return [p for p in found if p.ppid() in pids]
