"""A real run with one fault of every kind, reconstructed from its events alone: what was lost, what came of it, every token."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

import pytest
import pytest_asyncio
from ray_run import Stage, staged

from rollout_ft.telemetry.account import Account, account
from rollout_ft.telemetry.audit import audit
from rollout_ft.telemetry.figures import totals
from rollout_ft.testing.faults import Fault, Kind
from rollout_ft.trial.runner import TrialResult

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

TASK = {"task_id": "q", "prompt": "Explain tides.", "turns": 3, "seed": 11, "timeout_s": 2.0, "max_tokens": 48}


def engines(told: Account) -> int:
    return sum(count for what, count in told.lost.items() if what.startswith("engine"))


TELLS: dict[Kind, Callable[[Account], int]] = {
    Kind.SLOW: lambda told: told.events["turn.attached"],
    Kind.CUT: lambda told: told.events["turn.replayed"],
    Kind.ENGINE_KILL: lambda told: told.lost["engine: process"],
    Kind.ENGINE_FREEZE: engines,
    Kind.ACTOR_KILL: lambda told: told.lost["engine: actor"],
    Kind.ACTOR_FREEZE: lambda told: told.lost["engine: silent"],
    Kind.ACTOR_KILL_COMMITTED: lambda told: told.lost["engine: actor"],
    Kind.AGENT_KILL: lambda told: told.restarts["infra"],
    Kind.STORE_KILL: lambda told: told.lost["store"],
    Kind.GATEWAY_KILL: lambda told: told.lost["gateway"],
    Kind.SUPERVISOR_KILL: lambda told: told.lost["supervisor"],
}
"""How the events tell each kind of fault; the supervisor's is the last, as its counters begin anew."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage() -> AsyncGenerator[Stage]:
    async with staged() as made:
        yield made


async def heard(stage: Stage) -> Account:
    await stage.run.renew(timeout_s=30)
    return account(stage.events)


async def test_every_fault_recovery_and_token_of_a_run_is_in_its_events(stage: Stage) -> None:
    results: list[TrialResult] = []
    for kind, of in TELLS.items():
        await stage.whole()
        before = of(await heard(stage))
        fault = Fault(kind, f"{kind}-q", 2, 16, 14.0)
        result, _ = await stage.play(kind, TASK, fault)
        results.append(result)
        assert fault.id in await stage.fired(), kind
        told = await heard(stage)
        assert of(told) > before, (kind, dict(told.events), dict(told.lost))
        if kind is not Kind.SUPERVISOR_KILL:  # with it may die what nobody had heard yet
            made = audit(told, results, totals(results), await stage.run.metrics())
            assert (made.wrong, made.notes) == ([], []), kind
    told = await heard(stage)
    assert told.recoveries["resumed"] >= 3, "an engine killed, frozen, its actor killed: each went on elsewhere"
    assert sum(told.wasted.values()) == told.sums["tokens_wasted"] == sum(result.tokens_wasted for result in results)
    await stage.whole()
    assert not (await heard(stage)).down
