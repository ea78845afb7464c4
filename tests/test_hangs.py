"""Engines that stand still, or seem to, through the whole stack: what hangs is found, and what only takes long is left alone."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from ray_run import Stage, marked_engines, staged

from rollout_ft.clock import monotonic, wall
from rollout_ft.testing.faults import Fault, Kind

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

TASK = {"task_id": "q", "prompt": "Explain tides.", "turns": 3, "seed": 11, "timeout_s": 90.0, "max_tokens": 48}
COMPILE_S, PREFILL_S, TOKEN_S, FIRST_TOKEN_S = 3.5, 6.0, 1.5, 2.5
ODD = str(Path(__file__).with_name("odd_engine.py"))
SLOW_S = 4.0
"""How much later than due a machine that does other things may find something."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(directory: Path) -> AsyncGenerator[Stage]:
    overrides = [
        f"engine.command=['{sys.executable}','{ODD}']",
        f"engine.args=[--tokens-per-s,'60',--model,hash,--count-file,'{directory}/{{engine}}.count']",
        f"engine.env={{ODD_COMPILE_S: '{COMPILE_S}', ODD_PREFILL_S: '{PREFILL_S}'}}",
        f"engine.first_token_timeout_s={FIRST_TOKEN_S}",
        f"engine.token_timeout_s={TOKEN_S}",
        "engine.compile_timeout_s=30",
        "engine.canary_idle_s=1",
        "model.context_tokens=131072",
    ]
    async with staged(*overrides) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def clean(stage: Stage) -> dict[str, Any]:
    """The trial without a fault, on engines that have compiled nothing yet, and what was `said` of these: what every other
    must equal."""
    result, trajectory = await stage.play("clean", TASK)
    assert (result.outcome, result.attempts, result.tokens_wasted) == ("completed", 1, 0)
    return {**trajectory, "said": said(stage, 0)}


def equal(trajectory: dict[str, Any], clean: dict[str, Any]) -> bool:
    keys = ("token_ids", "loss_mask", "logprobs", "version_spans")
    return [[p[k] for k in keys] for p in trajectory["paths"]] == [[p[k] for k in keys] for p in clean["paths"]]


def engine_process(engine_id: str) -> psutil.Process:
    return next(p for p in marked_engines() if any(f"/{engine_id}.count" in arg for arg in p.cmdline()))


async def until(event: str, stage: Stage, since: float, **fields: Any) -> dict[str, Any]:
    """The first event of this name after that moment, on the wall clock."""
    while True:
        for each in stage.events:
            if each["event"] == event and each["time"] >= since and all(each.get(k) == v for k, v in fields.items()):
                return each
        await asyncio.sleep(0.05)


def said(stage: Stage, since: float) -> list[str]:
    return [e["event"] for e in stage.events if e["time"] >= since and e["event"].startswith("engine.")]


async def test_an_engine_that_compiles_for_its_first_request_is_left_alone(clean: dict[str, Any]):
    assert not {"engine.doubted", "engine.dead"} & set(clean["said"])
    assert FIRST_TOKEN_S < COMPILE_S


async def test_an_idle_engine_that_freezes_is_found_by_its_canary(stage: Stage, directory: Path, clean: dict[str, Any]):
    await stage.whole()
    canary, since = directory / "engine-1.canary", wall()
    while not canary.exists():
        await asyncio.sleep(0.05)
    engine_process("engine-1").send_signal(signal.SIGSTOP)
    doubted = await until("engine.doubted", stage, since, engine="engine-1")
    lost = await until("engine.dead", stage, since, engine="engine-1")
    assert "canary" in doubted["reason"]
    assert "3 in a row were not answered while it was idle" in lost["reason"]
    await until("engine.up", stage, lost["time"], engine="engine-1")


async def test_an_engine_that_freezes_in_mid_generation_is_found_within_its_deadline(stage: Stage, clean: dict[str, Any]):
    await stage.whole()
    since = wall()
    result, trajectory = await stage.play("frozen", TASK, Fault(Kind.ENGINE_FREEZE, "frozen-q", 2, 16))
    lost = await until("engine.dead", stage, since)
    stood_s = float(lost["reason"].split()[-2])
    assert lost["reason"].startswith("stalled: no token of any of its 1 calls")
    assert TOKEN_S <= stood_s <= TOKEN_S + SLOW_S
    assert (result.outcome, result.attempts, result.tokens_wasted) == ("completed", 1, 0)
    assert equal(trajectory, clean)


async def test_an_engine_that_answers_probes_and_never_generates_is_found_by_a_request(
    stage: Stage, directory: Path, clean: dict[str, Any]
):
    await stage.whole()
    since = wall()
    for engine_id in ("engine-0", "engine-1"):
        (directory / f"{engine_id}.wedge").touch()
    playing = asyncio.create_task(stage.play("wedged", TASK))
    lost = await until("engine.dead", stage, since)
    for engine_id in ("engine-0", "engine-1"):
        (directory / f"{engine_id}.wedge").unlink()
    result, trajectory = await playing
    assert lost["reason"].startswith(("stalled: ", "probes: "))
    assert (result.outcome, result.attempts) == ("completed", 1)
    assert equal(trajectory, clean)


async def test_a_prompt_of_a_hundred_thousand_tokens_does_not_make_its_neighbours_look_frozen(stage: Stage, clean: dict[str, Any]):
    await stage.whole()
    since, began = wall(), monotonic()
    long = {**TASK, "task_id": "long", "prompt": "the " * 100_000, "turns": 1}
    short = [{**TASK, "task_id": f"short-{i}", "turns": 8} for i in range(4)]
    results = await stage.run.run_trials([*short, long], stage.agent, concurrency=5, prefix="beside-")
    assert [(r.outcome, r.attempts, r.tokens_wasted) for r in results] == [("completed", 1, 0)] * 5
    assert monotonic() - began >= PREFILL_S
    assert "engine.dead" not in said(stage, since)
    assert "engine.doubted" not in said(stage, since)
