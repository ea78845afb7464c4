"""A real run's metrics, as Ray's own Prometheus endpoint shows them, and as one flat object."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator

import aiohttp
import pytest
import pytest_asyncio
from ray_run import Stage, staged

from rollout_ft.rayapi import ray
from rollout_ft.testing.faults import Fault, Kind

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

TASK = {"task_id": "q", "prompt": "Explain tides.", "turns": 2, "seed": 11, "timeout_s": 2.0, "max_tokens": 48}
_SAMPLE = re.compile(r"^ray_(rollout_ft_\w+)\{(.*)\} (\S+)$", re.MULTILINE)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage() -> AsyncGenerator[Stage]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        async with staged() as made:
            yield made


async def scraped() -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of ours, by its name and our labels."""
    (node,) = ray.nodes()
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics") as answer:
        text = await answer.text()
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for name, labels, value in _SAMPLE.findall(text):
        ours = frozenset((k, v) for k, v in re.findall(r'(\w+)="([^"]*)"', labels) if k[0].islower() and not k.startswith("otel_"))
        found[name, ours] = float(value)
    return found


async def sample(stage: Stage, name: str, **labels: str) -> float | None:
    return (await scraped()).get((name, frozenset({"run": stage.run.config.run, **labels}.items())))


async def shows(stage: Stage, expected: float, name: str, **labels: str) -> None:
    """Returns when the endpoint shows this value: it is behind by two reports, ours and Ray's."""
    async with asyncio.timeout(30):
        while await sample(stage, name, **labels) != expected:
            await asyncio.sleep(0.1)


async def test_turns_tokens_and_zeros_are_on_rays_endpoint_and_agree_with_the_trial(stage: Stage) -> None:
    before = await stage.run.metrics()
    result, _ = await stage.play("calm", TASK)
    mine = {"mode": "train", "pool": "default"}
    await shows(stage, before["rollout_ft/turns_served/fresh"] + 2, "rollout_ft_turns_served_total", outcome="fresh", **mine)
    await shows(stage, before["rollout_ft/turns_committed"] + 2, "rollout_ft_turns_committed_total", **mine)
    sampled = before["rollout_ft/tokens_generated"] + result.tokens_generated
    await shows(stage, sampled, "rollout_ft_tokens_generated_total", **mine)
    ended = before["rollout_ft/trials_finished/completed"] + 1
    await shows(stage, ended, "rollout_ft_trials_finished_total", outcome="completed")
    await shows(stage, 2, "rollout_ft_engines", state="healthy")
    await shows(stage, before["rollout_ft/turn_seconds/count"] + 2, "rollout_ft_turn_seconds_bucket", le="+Inf", **mine)
    await shows(stage, before["rollout_ft/first_token_seconds/count"] + 2, "rollout_ft_first_token_seconds_count", **mine)
    await shows(stage, 2, "rollout_ft_store_replicas", count="in_view")
    await shows(stage, 1, "rollout_ft_store_exposed")
    assert (await sample(stage, "rollout_ft_checkpoint_bytes", kind="entries") or 0) > 0
    assert await sample(stage, "rollout_ft_turns_served_total", outcome="fresh", mode="eval", pool="default") == 0
    assert await sample(stage, "rollout_ft_engines_lost_total", reason="stalled") == 0
    assert await sample(stage, "rollout_ft_turns_parked", cause="paused") == 0


async def test_after_an_engines_death_counters_go_on_and_agree_with_the_trials_to_the_token(stage: Stage) -> None:
    before = await stage.run.metrics()
    result, _ = await stage.play("killed", TASK, Fault(Kind.ENGINE_KILL, "killed-q", 2, 16))
    await stage.whole()
    mine = {"mode": "train", "pool": "default"}
    await shows(stage, 1, "rollout_ft_engines_lost_total", reason="process")
    await shows(stage, before["rollout_ft/turns_committed"] + 2, "rollout_ft_turns_committed_total", **mine)
    await shows(stage, 1, "rollout_ft_recovery_seconds_count", reason="process")
    await shows(stage, 2, "rollout_ft_engines", state="healthy")
    now = await stage.run.metrics()
    gained = {key: value - before[key] for key, value in now.items()}
    assert (gained["rollout_ft/turns_served/continued"], gained["rollout_ft/sessions_moved"]) == (1, 1)
    assert gained["rollout_ft/tokens_generated"] == result.tokens_generated
    assert (gained["rollout_ft/tokens_reused"], gained["rollout_ft/tokens_wasted"]) == (result.tokens_reused, result.tokens_wasted)
    assert 0 < now["rollout_ft/recovery_seconds/sum"] < 30
    assert now["rollout_ft/engines/healthy"] == 2
