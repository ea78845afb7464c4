"""An engine that we start: its process, and the wait until it can serve.

Owns the order of a start and its deadline. Knows nothing of sessions. Whatever ends a start that did not succeed, no
process is left of it.
"""

from __future__ import annotations

import asyncio

from rollout_ft.config import Config
from rollout_ft.engine.launch import command, environment, log_path
from rollout_ft.engine.process import EngineProcess, free_port
from rollout_ft.engine.sglang import SGLang
from rollout_ft.errors import EngineLost

LOOK_S = 0.05


class Launched:
    """A `Unit`."""

    ours = True

    def __init__(self, process: EngineProcess, port: int):
        self._process = process
        self.url = f"http://127.0.0.1:{port}"

    @classmethod
    async def start(cls, config: Config, engine_id: str, name: str) -> Launched:
        """Starts the engine of the actor `name`, and returns when it can serve.

        Raises EngineLost with the reason when it ends before that, or takes longer than `engine.start_timeout_s`.
        """
        port, log = free_port("127.0.0.1"), log_path(name)
        process = await EngineProcess.start(command(config, engine_id, port), environment(config), log)
        unit, timeout_s = cls(process, port), config.engine.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await unit._ready(engine_id, log)
        except BaseException as e:
            await unit.aclose()
            if isinstance(e, TimeoutError):
                raise EngineLost(engine_id, f"not ready within {timeout_s:g} s (engine.start_timeout_s); see {log}") from None
            raise
        return unit

    async def _ready(self, engine_id: str, log: str) -> None:
        engine = SGLang(engine_id, self.url)
        try:
            while not await engine.ready():
                if not self._process.alive:
                    raise EngineLost(engine_id, f"{self._process.exit_reason} at start; see {log}")
                await asyncio.sleep(LOOK_S)
        finally:
            await engine.aclose()

    def pid(self) -> int | None:
        return self._process.pid()

    async def wait(self) -> str:
        return await self._process.wait()

    def kill(self) -> None:
        self._process.kill()

    async def aclose(self) -> None:
        await self._process.aclose()
