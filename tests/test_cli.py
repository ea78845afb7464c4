"""The commands as a user runs them, in processes of their own, on real Ray."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from ray_run import MARK, nothing_left
from report_page import Page, whole
from safetensors import safe_open

TEMPORARY = tempfile.mkdtemp(prefix="t")
BIN = Path(sys.executable).with_name("rollout-ft")
CONFIG = "configs/local-cpu.yaml"
FAST = ["ray.address=local", "engine.count=2", "engine.args=[--tokens-per-s,'0',--model,hash]"]


@pytest.fixture(scope="module", autouse=True)
def _temporary():
    yield
    shutil.rmtree(TEMPORARY)


def command(*args: str, mark: str = "") -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {MARK: mark, "TMPDIR": TEMPORARY}
    return subprocess.Popen([str(BIN), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def refused(*args: str) -> str:
    """What a command that must be refused says: one line, exit code 2."""
    process = command(*args)
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 2, err
    assert len(err.strip().splitlines()) == 1, err
    return err


def first_tasks(path: Path, count: int) -> Path:
    lines = Path("examples/tasks/quickstart.jsonl").read_text().splitlines()[:count]
    path.write_text("\n".join(lines))
    return path


def trial_files(directory: Path) -> dict[str, Any]:
    return {line["trial_id"]: line for line in map(json.loads, (directory / "trials.jsonl").read_text().splitlines())}


def test_help_waits_for_nothing_heavy():
    told = subprocess.run([sys.executable, "-X", "importtime", "-m", "rollout_ft.cli.main", "--help"], check=True, capture_output=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in told.stderr.decode().splitlines()}
    assert "typer" in imported
    assert not imported & {"ray", "torch", "numpy", "pydantic", "aiohttp", "opentelemetry"}


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_says_where_it_is_serves_any_client_and_ends_clean(number: int):
    mark = uuid.uuid4().hex
    process = command("serve", "-c", CONFIG, *FAST, mark=mark)
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert set(ready) == {"gateway_url", "operator_key", "ray_address"}
    operator = openai.OpenAI(base_url=ready["gateway_url"], api_key=ready["operator_key"])
    opened: Any = operator.post("/sessions", body={"trial_id": "t1"}, cast_to=object)
    client = openai.OpenAI(base_url=opened["base_url"], api_key=opened["api_key"])
    reply = client.chat.completions.create(model="any", messages=[{"role": "user", "content": "hello"}], max_tokens=8)
    assert reply.choices[0].message.content
    with pytest.raises(openai.ConflictError):
        operator.with_options(max_retries=0).post("/sessions", body={"trial_id": "t1"}, cast_to=object)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=opened["base_url"].replace("t1~1", "t1~2"), api_key=opened["api_key"]).models.list()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "all 2 replicas of the checkpoint store are on node" in err
    asyncio.run(nothing_left(mark))
    assert not list(Path(TEMPORARY).iterdir())
    port = int(ready["gateway_url"].rsplit(":", 1)[1])
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_run_writes_its_files_and_does_nothing_where_they_are(tmp_path: Path):
    mark, output = uuid.uuid4().hex, tmp_path / "out"
    args = ["run", "-c", CONFIG, "--output", str(output), *FAST, f"trial.tasks={first_tasks(tmp_path / 'tasks.jsonl', 4)}"]
    process = command(*args, mark=mark)
    _, err = process.communicate(timeout=110)
    assert process.returncode == 0, err
    trials = trial_files(output)
    assert sorted(trials) == ["q01", "q02", "q03", "q04"]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["outcomes"] == {"completed": 4}
    assert summary["tokens_generated"] == sum(t["tokens_generated"] for t in trials.values())
    events = [json.loads(line)["event"] for line in (output / "events.jsonl").read_text().splitlines()]
    assert events.count("trial.ended") == 4
    with safe_open(output / "trajectories" / "q01.safetensors", "np") as file:
        rest = json.loads(file.metadata()["trial"])
        assert rest["reward"] == trials["q01"]["reward"]
        mask, logprobs = file.get_tensor("0.loss_mask"), file.get_tensor("0.logprobs")
        assert int(mask.sum()) == trials["q01"]["tokens_generated"]
        assert np.all(logprobs[mask == 0] == 0)
        assert np.all(logprobs[mask == 1] < 0)
    page = Page((output / "report.html").read_text())
    assert whole(page.row("tokens", "generated")[1]) == summary["tokens_generated"]
    assert {row[0] for row in page.cells["trials"] if row} == trials.keys()
    again = command(*args)
    _, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert "all 4 trials have their outcome" in err
    assert trial_files(output) == trials
    asyncio.run(nothing_left(mark))
    assert not list(Path(TEMPORARY).iterdir())


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_run_that_is_stopped_keeps_what_it_finished_and_leaves_nothing_running(tmp_path: Path):
    mark, output = uuid.uuid4().hex, tmp_path / "out"
    slow = ["ray.address=local", "engine.count=2", "engine.args=[--tokens-per-s,'60',--model,hash]", "trial.concurrency=2"]
    process = command("run", "-c", CONFIG, "--output", str(output), *slow, mark=mark)
    while not (output / "trials.jsonl").exists() or not (output / "trials.jsonl").read_text():
        assert process.poll() is None
        os.sched_yield()
    looking = command("status", str(output), "--json")
    seen = json.loads(looking.communicate(timeout=60)[0])
    assert seen["run"] == "local"
    assert seen["serves"]
    assert seen["trials"]["released"] >= 1
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rollout-ft trial list" in refused("status", str(output))
    trials = trial_files(output)
    assert 0 < len(trials) < 48
    assert json.loads((output / "summary.json").read_text())["trials"] == len(trials)
    asyncio.run(nothing_left(mark))
    assert not list(Path(TEMPORARY).iterdir())


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    assert "engine.count?" in refused("serve", "-c", CONFIG, "engine.cuont=2")


def test_a_missing_config_file_is_named():
    assert "nowhere.yaml" in refused("serve", "-c", "nowhere.yaml")


def test_a_broken_task_line_is_named_by_its_number(tmp_path: Path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"task_id": "a"}\n{"task_id": \n')
    assert "line 2" in refused("run", "-c", CONFIG, "--output", str(tmp_path / "out"), f"trial.tasks={tasks}")
    assert not (tmp_path / "out").exists()


def test_an_agent_that_cannot_be_imported_is_named(tmp_path: Path):
    assert "no_such_module" in refused("run", "-c", CONFIG, "--output", str(tmp_path / "out"), "trial.agent=no_such_module:run")


def test_an_environment_that_cannot_be_imported_is_refused_before_anything_is_written(tmp_path: Path):
    said = refused("run", "-c", CONFIG, "--output", str(tmp_path / "out"), "trial.environment=rollout_ft.trial.sandbox:remote")
    assert "trial.environment" in said
    assert not (tmp_path / "out").exists()


def test_a_missing_model_is_named(tmp_path: Path):
    assert "model.path" in refused("serve", "-c", CONFIG, f"model.path={tmp_path}")


@pytest.mark.ray
@pytest.mark.timeout(90)
def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused("serve", "-c", CONFIG, *FAST, f"gateway.port={port}")


@pytest.mark.ray
@pytest.mark.timeout(90)
def test_replicas_that_may_not_share_a_node_need_enough_of_them():
    assert "store.placement distinct" in refused("serve", "-c", CONFIG, *FAST, "store.placement=distinct", "store.min_replicas=2")


@pytest.mark.timeout(90)
def test_an_address_where_no_cluster_answers_is_named():
    assert "ray.address" in refused("serve", "-c", CONFIG, "ray.address=127.0.0.1:1")


def test_a_place_that_cannot_be_written_is_named():
    assert "/proc/nowhere" in refused("run", "-c", CONFIG, "--output", "/proc/nowhere", "ray.address=local")
