"""What Ray's own state and dashboard say of a run: who its actors are, whose calls they carry out, and where the status page is."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from ray_run import Stage, staged

from rollout_ft import rayjob
from rollout_ft.cli.progress import EVERY_S, QUIET_S, Progress
from rollout_ft.config import load
from rollout_ft.fleet.crew import shown_as
from rollout_ft.gateway.actor import base_url
from rollout_ft.rayapi import ray
from rollout_ft.trial.runner import TrialResult

RESULT = TrialResult("t1", "q", "completed", 1.0, "", 2, 3, 1, 9, 0, 0, 1.0)


def test_an_actors_name_says_what_it_is():
    assert shown_as("math/engine-3/2") == "rollout_ft engine-3 (run math, start 2)"
    assert shown_as("a/b/store-0/1") == "rollout_ft store-0 (run a/b, start 1)"
    assert shown_as("alone") == "rollout_ft alone"


def test_what_is_known_before_the_gateway_is_up_is_in_the_jobs_metadata():
    assert rayjob.metadata(load(None, ["run=math"])) == {rayjob.RUN: "math"}
    fixed = rayjob.metadata(load(None, ["run=math", "gateway.port=8123"]))
    assert fixed[rayjob.STATUS] == "http://127.0.0.1:8123/status"
    everywhere = load(None, ["gateway.port=8123", "gateway.host=0.0.0.0"])
    assert rayjob.STATUS not in rayjob.metadata(everywhere)
    assert base_url(everywhere.gateway, 8123, "10.0.0.7") == "http://10.0.0.7:8123"
    assert base_url(load(None, {"gateway.host": "::"}).gateway, 8123, "fd00::7") == "http://[fd00::7]:8123"
    told = rayjob.metadata(load(None, ["run=math", "gateway.advertise_url=https://gate.example/x/"]))
    assert told[rayjob.STATUS] == "https://gate.example/x/status"


@pytest.mark.parametrize("said", ["", "[]", "{", '{"metadata": {}}', '{"metadata": null}'])
def test_a_process_that_is_no_submitted_job_is_none(said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(rayjob.JOB_CONFIG, said)
    assert rayjob.submission_id() == ""


@dataclass
class Seen:
    done: int = 0
    owed: int = 4
    running: int = 3
    restarts: int = 2
    planned: int = 4


def test_progress_is_a_line_now_and_then_and_one_at_the_end():
    course = Seen()
    progress = Progress(course, 100.0)

    def ended(outcome: str, now: float) -> str:
        course.done, course.owed, course.running = course.done + 1, course.owed - 1, course.running - 1
        return progress.ended(replace(RESULT, outcome=outcome), now)

    assert ended("completed", 101.0) == ""
    assert ended("infra_exhausted", 100 + EVERY_S) == (
        "2 of 4 trials have ended, 1 under way; of this process 1 completed, 1 infra_exhausted, 2 attempts restarted"
    )
    assert ended("completed", 101 + EVERY_S) == ""
    assert ended("completed", 102 + EVERY_S).startswith("4 of 4 trials have ended")


def test_progress_is_told_while_nothing_ends_and_says_for_how_long():
    progress, now = Progress(Seen(), 100.0), 100.0
    assert progress.waited(99.0 + QUIET_S) == ""
    lines: list[str] = []
    while now < 100 + 85 * 60:
        now += progress.quiet_s(now)
        lines.append(progress.waited(now))
    assert "" not in lines
    assert len(lines) == 85 * 60 / QUIET_S
    assert lines[0] == "0 of 4 trials have ended, none for 60 s, 3 under way; of this process none, 2 attempts restarted"
    assert ", none for 85 min, " in lines[-1]


def test_a_line_about_an_end_puts_off_the_one_that_comes_while_nothing_ends():
    progress = Progress(Seen(done=3), 100.0)
    assert progress.ended(RESULT, 100 + EVERY_S)
    assert progress.waited(100 + QUIET_S) == ""
    assert progress.quiet_s(100 + QUIET_S) == EVERY_S


# -- real Ray, with its dashboard -------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage() -> AsyncGenerator[Stage]:
    async with staged("ray.dashboard=true", "run=shown") as made:
        yield made


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> str:
    """As Ray's job supervisor leaves it for the entry point of a job."""
    monkeypatch.setenv(rayjob.JOB_CONFIG, json.dumps({"metadata": {"job_submission_id": "job-1", "mine": "kept"}}))
    return "job-1"


async def dashboard(path: str) -> Any:
    url = ray._private.worker.global_worker.node.address_info["webui_url"]
    headers = {"authorization": f"Bearer {os.environ.get('RAY_AUTH_TOKEN', '')}"}
    async with aiohttp.ClientSession() as http, http.get(f"http://{url}{path}", headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def eventually(path: str, found: Any) -> Any:
    """What the dashboard says, once `found` finds something in it: it hears of things a second or two late."""
    async with asyncio.timeout(60):
        while not (what := found(await dashboard(path))):
            await asyncio.sleep(0.5)
    return what


@pytest.mark.ray
@pytest.mark.timeout(180)
@pytest.mark.asyncio(loop_scope="module")
async def test_every_actor_of_a_run_says_what_it_is(stage: Stage) -> None:
    def reprs(told: Any) -> set[str] | None:
        alive = [actor for actor in told["data"]["result"]["result"] if actor["state"] == "ALIVE" and actor["name"].startswith("shown/")]
        said = {actor["repr_name"] for actor in alive if "faults" not in actor["name"]}
        return said if "" not in said and len(said) >= 7 else None

    said = await eventually("/api/v0/actors?detail=1&limit=100", reprs)
    assert said == {
        *(f"rollout_ft {role} (run shown, start 1)" for role in ("engine-0", "engine-1", "store-0", "store-1", "gateway-0", "gateway-1")),
        "rollout_ft supervisor (run shown, start 1)",
    }  # fmt: skip


@pytest.mark.ray
@pytest.mark.timeout(180)
@pytest.mark.asyncio(loop_scope="module")
async def test_calls_are_called_by_what_they_do_and_by_no_trials_name(stage: Stage) -> None:
    """Ray makes a series of each name: `ray_tasks{Name=…}`."""
    await stage.run.open_session(trial_id="named")
    names = await eventually("/api/v0/tasks?detail=1&limit=10000", _names)
    assert not [name for name in names if "named" in name]


def _names(told: Any) -> set[str]:
    """Once the call that opened the trial is among them."""
    names = {task["name"] for task in told["data"]["result"]["result"]}
    return names if any(name.endswith("open") for name in names) else set()


@pytest.mark.ray
@pytest.mark.timeout(180)
@pytest.mark.asyncio(loop_scope="module")
async def test_the_drivers_job_names_its_run(stage: Stage) -> None:
    (job,) = [each for each in await dashboard("/api/jobs/") if not each["submission_id"]]
    assert job["metadata"][rayjob.RUN] == "shown"


@pytest.mark.ray
@pytest.mark.timeout(180)
@pytest.mark.asyncio(loop_scope="module")
async def test_a_submitted_jobs_metadata_gets_the_link_and_keeps_what_it_had(stage: Stage, submitted: str) -> None:
    from ray.dashboard.modules.job.common import JobInfo, JobInfoStorageClient
    from ray.experimental import internal_kv
    from ray.job_submission import JobStatus

    info = JobInfo(status=JobStatus.RUNNING, entrypoint="rollout-ft run", metadata={"mine": "kept"})
    key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=submitted).encode()
    internal_kv._internal_kv_put(key, json.dumps(info.to_json()).encode(), namespace="job")
    await asyncio.to_thread(rayjob.announce, stage.run.config, stage.run.gateway_url)
    job = next(each for each in await dashboard("/api/jobs/") if each["submission_id"] == submitted)
    assert job["metadata"] == {"mine": "kept", rayjob.RUN: "shown", rayjob.STATUS: stage.run.status_url}
    assert stage.run.operator_key not in json.dumps(job)


@pytest.mark.ray
@pytest.mark.timeout(180)
@pytest.mark.asyncio(loop_scope="module")
async def test_after_the_supervisors_death_a_group_is_had_as_before_and_a_reader_of_events_is_told(stage: Stage) -> None:
    await stage.run.open_session(trial_id="kept", group_id="g1", task_id="q")
    await stage.run.client.outcome("kept", "completed", 1.0, "", 1)
    await stage.run.open_session(trial_id="kept-too", group_id="g1")
    before = await stage.run.client.get("/trials?group_id=g1")
    cursor = (await stage.run.client.get("/events"))["next"]
    await asyncio.to_thread(ray.kill, ray.get_actor("shown/supervisor/1", stage.run.setup.namespace), no_restart=False)
    after = await stage.run.client.get("/trials?group_id=g1")
    assert [(t["trial_id"], t["state"], t["outcome"], t["task_id"]) for t in after] == [
        ("kept", "ended", "completed", "q"), ("kept-too", "held", None, ""),
    ]  # fmt: skip
    assert after == before
    told = await stage.run.client.get(f"/events?since={cursor}")
    assert told["missed"]
