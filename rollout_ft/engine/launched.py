"""An engine that we start: its process, and the wait until it can serve.

Owns the order of a start and its deadline, and why the engine ended. Knows nothing of sessions. Whatever ends a start that
did not succeed, no process is left of it. A start that somebody else's port has ended says nothing about the engine, and
is made again with other ports.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

from rollout_ft.config import Config
from rollout_ft.engine import crash, logs, ports
from rollout_ft.engine.launch import Rank, command, environment, log_path
from rollout_ft.engine.memory import oom_kills
from rollout_ft.engine.process import EngineProcess
from rollout_ft.engine.sglang import SGLang
from rollout_ft.errors import EngineLost

LOOK_S = 0.05
TRIM_S = 30.0
PORT_TRIES = 5


class Starting(Protocol):
    async def ready(self) -> None:
        """Returns when it can serve. Raises EngineLost when it ends before that."""
        ...

    @property
    def lost_a_port(self) -> bool: ...
    async def aclose(self) -> None: ...


S = TypeVar("S", bound=Starting)


async def start(begin: Callable[[], Awaitable[S]], engine_id: str, timeout_s: float) -> S:
    """Begins until it can serve: again only when a port was lost. Raises EngineLost, with the reason, when it never can."""
    try:
        async with asyncio.timeout(timeout_s):
            for left in reversed(range(PORT_TRIES)):
                unit = await begin()
                try:
                    await unit.ready()
                    return unit
                except BaseException as e:
                    await unit.aclose()
                    if not (left and isinstance(e, EngineLost) and unit.lost_a_port):
                        raise
    except TimeoutError:
        raise EngineLost(engine_id, f"not ready within {timeout_s:g} s (engine.start_timeout_s)") from None
    raise AssertionError("the last try returns or raises")


class Launched:
    """A `Unit`: one process of an engine on this node."""

    ours = True

    def __init__(self, engine_id: str, process: EngineProcess, claimed: ports.Ports, log: Path, limit_bytes: int):
        self._engine_id, self._process, self._claimed, self._log = engine_id, process, claimed, log
        self.url = f"http://127.0.0.1:{claimed.server}"
        self._since, self._memory = logs.size(log), oom_kills()
        self._trimming = asyncio.create_task(_keep(log, limit_bytes))
        self._ended = asyncio.create_task(self._watch())

    @classmethod
    async def begin(
        cls, config: Config, engine_id: str, name: str, gpus: tuple[str, ...] = (), rank: Rank | None = None,
        claimed: ports.Ports | None = None,
    ) -> Launched:  # fmt: skip
        """Starts the process of the actor `name`."""
        claimed = claimed or ports.claim(random.Random())
        log = Path(log_path(name))
        words = command(config, engine_id, claimed, rank)
        process = await EngineProcess.start(words, environment(config, gpus), str(log))
        return cls(engine_id, process, claimed, log, config.engine.log_bytes)

    async def ready(self) -> None:
        engine = SGLang(self._engine_id, self.url)
        try:
            while not await engine.ready():
                if self._ended.done():
                    raise EngineLost(self._engine_id, f"{self._ended.result()} (at its start)")
                await asyncio.sleep(LOOK_S)
        finally:
            await engine.aclose()

    @property
    def lost_a_port(self) -> bool:
        return crash.port_taken(logs.tail(self._log, self._since))

    def pid(self) -> int | None:
        return self._process.pid()

    async def wait(self) -> str:
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        self._process.kill()

    async def aclose(self) -> None:
        await self._process.aclose()
        await self._ended
        self._claimed.close()

    async def _watch(self) -> str:
        ended = await self._process.wait()
        self._trimming.cancel()
        reason = crash.describe(ended, logs.tail(self._log, self._since), oom_kills().since(self._memory))
        return reason if ended.ours else f"{reason} (log: {self._log})"


async def _keep(log: Path, limit_bytes: int) -> None:
    while True:
        await asyncio.to_thread(logs.trim, log, limit_bytes)
        await asyncio.sleep(TRIM_S)
