"""The board and the alerts with a real Prometheus that scrapes a real run with planned faults."""

from __future__ import annotations

import asyncio
import math
import shutil
import subprocess
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import yaml
from ray_run import Stage, staged
from scraping import BOARD, CONFIGS, Prometheus, Query, config_for, program, prometheus, queries

from rollout_ft.cli.doctor.monitoring import Monitoring, look
from rollout_ft.config import TrialConfig
from rollout_ft.rayapi import ray
from rollout_ft.testing.faults import Fault, Kind
from rollout_ft.types import Recovery

pytestmark = [
    pytest.mark.skipif(not program("prometheus") or not program("promtool"), reason="no prometheus: make test-metrics brings one"),
    pytest.mark.timeout(400),
]
TASK = {"task_id": "q", "prompt": "Explain tides.", "turns": 3, "seed": 11, "timeout_s": 5.0, "max_tokens": 48}
RULES = CONFIGS / "alerts.yaml"
CASES = Path("tests/metrics/alerts_test.yaml")


# -- alerts -------------------------------------------------------------------------------------------------------


def test_every_alert_rule_loads():
    done = subprocess.run([program("promtool"), "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_when_it_has_to_and_not_otherwise(tmp_path: Path):
    cases = tmp_path / "cases.yaml"
    cases.write_text(CASES.read_text().replace("ALERTS", str(RULES)))
    done = subprocess.run([program("promtool"), "test", "rules", str(cases)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_alert_is_without_a_case_and_no_case_without_a_run_that_is_well():
    alerts = {rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
    cases = yaml.safe_load(CASES.read_text())["tests"]
    fired = {test["alertname"] for case in cases for test in case["alert_rule_test"] if test["exp_alerts"]}
    assert fired == alerts
    for case in cases:
        assert any('run="well"' in series["series"] for series in case["input_series"]), case["name"]


# -- a run --------------------------------------------------------------------------------------------------------


@dataclass
class Watched:
    stage: Stage
    prometheus: Prometheus
    boards: Path
    session: Path
    began: float


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watched(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Watched]:
    """A run whose trials met faults, as docs/dashboards.md says how to watch one."""
    boards, directory, began = tmp_path_factory.mktemp("boards"), tmp_path_factory.mktemp("prometheus"), time.time()
    shutil.copy(BOARD, boards)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "3000")  # gauges are forgotten after twice as long
        patch.setenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", str(boards))
        patch.setattr(ray._private.ray_constants, "RAY_DASHBOARD_STARTUP_TIMEOUT_S", 240)
        async with staged("ray.dashboard=true") as stage:
            session = Path(ray._private.worker._global_node.get_session_dir_path())
            discovery = session / "prom_metrics_service_discovery.json"
            async with asyncio.timeout(60):
                while not discovery.exists():
                    await asyncio.sleep(0.2)
            async with prometheus(config_for(str(discovery)), directory) as made:
                await _eventful(stage)
                yield Watched(stage, made, boards, session, began)


async def _eventful(stage: Stage) -> None:
    await stage.play("calm", TASK)
    for kind in (Kind.ENGINE_KILL, Kind.ENGINE_FREEZE, Kind.AGENT_KILL):
        await stage.play(kind, TASK, Fault(kind, f"{kind}-q", 2, 16))
        await stage.whole()
    await stage.play("cut", TASK, Fault(Kind.CUT, "cut-q", 2))
    await stage.play("scratch", TASK, Fault(Kind.CUT, "scratch-q", 3), config=TrialConfig(recovery=Recovery.RESTART))
    await stage.play("spent", TASK, Fault(Kind.AGENT_KILL, "spent-q", 2, 8), config=TrialConfig(max_restarts=0))
    await stage.play("after", TASK)


async def seen(watched: Watched, query: Query) -> bool:
    """Whether a panel has anything to show: at least one number at some time of the run, be it a zero that it leaves out."""
    found = await watched.prometheus.over(query.expr.partition(" and on ")[0], watched.began, time.time())
    return any(math.isfinite(float(value)) for series in found for _, value in series["values"])


@pytest.mark.ray
@pytest.mark.asyncio(loop_scope="module")
async def test_every_panels_query_returns_data(watched: Watched) -> None:
    empty = list(queries())
    async with asyncio.timeout(60):  # the last of it is reported, and scraped, a little later
        while empty := [query for query in empty if not await seen(watched, query)]:
            await asyncio.sleep(1)
    assert not empty


@pytest.mark.ray
@pytest.mark.asyncio(loop_scope="module")
async def test_prometheus_agrees_with_the_run_to_the_token(watched: Watched) -> None:
    names = ("tokens_generated", "tokens_wasted", "turns_committed", "engines_lost", "trials_finished")
    shown: dict[str, float] = {}
    flat: dict[str, float] = {}
    until = time.time() + 30  # both are behind: the flat one by a second, which the last trial may have ended in
    while not shown or shown != {name: flat[f"rollout_ft/{name}"] for name in names}:
        assert time.time() < until, (shown, flat)
        await asyncio.sleep(0.5)
        flat = await watched.stage.run.metrics()
        for name in names:
            (sample,) = await watched.prometheus.ask(f"sum(ray_rollout_ft_{name}_total)")
            shown[name] = float(sample["value"][1])


@pytest.mark.ray
@pytest.mark.asyncio(loop_scope="module")
async def test_recoveries_are_told_apart_and_a_stall_is_counted_from_when_it_stood_still(watched: Watched) -> None:
    found = {s["metric"]["reason"]: float(s["value"][1]) for s in await watched.prometheus.ask("ray_rollout_ft_recovery_seconds_sum")}
    assert found["process"] > 0
    assert found["stalled"] + found["silent"] > 1.5, "engine.token_timeout_s is in it"


@pytest.mark.ray
@pytest.mark.asyncio(loop_scope="module")
async def test_our_board_is_where_rays_grafana_reads_its_boards_and_ray_leaves_it_there(watched: Watched) -> None:
    provisioned = yaml.safe_load((watched.session / "metrics/grafana/provisioning/dashboards/default.yml").read_text())
    assert provisioned["providers"][0]["options"]["path"] == str(watched.boards)
    assert (watched.boards / BOARD.name).read_text() == BOARD.read_text()
    assert (watched.boards / "default_grafana_dashboard.json").exists(), "beside Ray's own"


@pytest.mark.ray
@pytest.mark.asyncio(loop_scope="module")
async def test_the_doctor_finds_all_but_a_grafana(watched: Watched) -> None:
    environment = {"RAY_PROMETHEUS_HOST": watched.prometheus.url, "RAY_GRAFANA_HOST": "http://127.0.0.1:9"}
    environment["RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"] = str(watched.boards)
    found = await asyncio.to_thread(look, environment, str(watched.session))
    assert found == Monitoring(True, watched.prometheus.url, True, True, True, "http://127.0.0.1:9", False, True)


@pytest.mark.ray
@pytest.mark.asyncio(loop_scope="module")
async def test_the_alerts_are_evaluated_and_lost_trials_fire(watched: Watched) -> None:
    async with asyncio.timeout(60):
        while True:
            groups = (await watched.prometheus.get("/api/v1/rules"))["groups"]
            rules = {rule["name"]: rule for rule in groups[0]["rules"]}
            if rules["RolloutTrialsLost"]["state"] == "firing":
                break
            await asyncio.sleep(1)
    assert not [rule["name"] for rule in rules.values() if rule["health"] != "ok"]
