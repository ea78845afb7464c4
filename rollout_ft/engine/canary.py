"""Asks an engine that nobody uses whether it still works.

Owns when it is asked, and how. An idle engine computes the prompt of one token: that is a forward pass, and samples nothing
that anybody would have to count. A paused one is asked for its /server_info, which its scheduler answers and its HTTP
server alone cannot. Nothing is sent while it is closed for any other reason, and what is not ours is never asked.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Collection
from enum import StrEnum

from rollout_ft.config import EngineConfig
from rollout_ft.engine.evidence import Evidence, of_status
from rollout_ft.engine.gate import Closed, Gate
from rollout_ft.engine.patience import Patience
from rollout_ft.engine.port import Engine
from rollout_ft.errors import EngineLost, EngineRefused

TOKEN = b"0"
PARTS = 5
"""Of `canary_idle_s`: so often it is looked whether a probe is due, and asked again when one was missed."""


class Probe(StrEnum):
    GENERATE = "a prompt of one token"
    INFO = "/server_info"


def due(*, idle_s: float, asked_s: float, canary_idle_s: float, closed: Collection[Closed], missed: bool) -> Probe | None:
    """What to ask for now. `idle_s`: since the last call ended, 0 while one runs; `asked_s`: since the last probe, which was
    answered unless `missed`."""
    if asked_s < (canary_idle_s / PARTS if missed else canary_idle_s):
        return None
    if closed:
        return Probe.INFO if set(closed) == {Closed.PAUSED} else None
    return Probe.GENERATE if idle_s >= canary_idle_s or (missed and idle_s) else None


class Canary:
    def __init__(self, engine: Engine, config: EngineConfig, gate: Gate, patience: Patience):
        self._engine, self._config, self._gate, self._patience = engine, config, gate, patience
        self._deadline_s = max(config.token_timeout_s, config.compile_timeout_s)
        """Until it was answered once: a new engine may have to compile what it computes."""

    async def sing(self, probe: Probe) -> Evidence:
        """One probe. What ended badly because the engine was closed meanwhile says nothing."""
        closings = self._gate.closings
        try:
            async with asyncio.timeout(self._deadline_s):
                if probe is Probe.INFO:
                    await self._engine.scheduler_answers()
                else:
                    stream = self._engine.generate(uuid.uuid4().hex, TOKEN, {"max_new_tokens": 0, "temperature": 0})
                    async for _ in stream:
                        pass
        except (TimeoutError, EngineLost):
            return Evidence.PROBE_MISSED if closings == self._gate.closings else Evidence.REFUSED
        except EngineRefused as e:
            return Evidence.PROBE_MISSED if of_status(e.status) is Evidence.FAILED else Evidence.REFUSED
        self._deadline_s = self._config.token_timeout_s
        return Evidence.PROBE_ANSWERED if probe is Probe.INFO else Evidence.MOVED

    async def watch(self, tell: Callable[[Evidence], Awaitable[bool]]) -> None:
        """Probes for ever. `tell` is given what each showed, and ends it by saying that the engine is given up."""
        loop = asyncio.get_running_loop()
        asked, missed = loop.time(), False
        while True:
            await asyncio.sleep(self._config.canary_idle_s / PARTS)
            probe = due(
                idle_s=self._patience.idle_s, asked_s=loop.time() - asked, canary_idle_s=self._config.canary_idle_s,
                closed=self._gate.closed, missed=missed,
            )  # fmt: skip
            if probe is None:
                continue
            evidence = await self.sing(probe)
            asked, missed = loop.time(), evidence is Evidence.PROBE_MISSED
            if await tell(evidence):
                return
