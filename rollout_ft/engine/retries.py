"""The retries of one engine: which are made, and when.

Owns the waits between a refused call and the next. What follows from what is `ladder`'s, how many there may be `budgets`';
this is thin around both: the clock, the luck, and the one event when retries begin to wait for each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rollout_ft.clock import monotonic
from rollout_ft.config import EngineConfig
from rollout_ft.engine.budgets import RetryBudget, Terms
from rollout_ft.engine.ladder import Again, GiveUp, after_refusal, free
from rollout_ft.errors import EngineRefused
from rollout_ft.telemetry.events import Events


class Retries:
    def __init__(self, config: EngineConfig, events: Events, luck: Callable[[], float]):
        self._config, self._events, self._luck = config, events, luck
        retry = config.retry
        self._budget = RetryBudget(Terms(retry.share, retry.floor_per_s, retry.burst), monotonic())
        self._short = False

    async def affordable(self, retry: bool) -> None:
        """Returns when a call may be made: retries are a share of the traffic."""
        if not retry:
            return self._budget.called()
        wait_s = self._budget.retry(monotonic())
        if self._budget.spent and not self._short:
            self._events.emit("retries.spent", wait_s=round(wait_s, 3))
        self._short = self._budget.spent
        if wait_s:
            await asyncio.sleep(wait_s)

    def after(self, refused: EngineRefused, *, excused: bool, spent: int, refusals: int) -> tuple[Again | GiveUp, int]:
        """What follows, and how often in a row the turn was refused without cost by now."""
        refusals = refusals + 1 if free(refused) else 0
        most = self._config.max_generations_per_turn
        then = after_refusal(
            refused, excused=excused, spent=spent, max_spent=most, refusals=refusals, config=self._config.retry, luck=self._luck()
        )  # fmt: skip
        return then, refusals
