"""What the doctor finds, and that it finds it on a real cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rollout_ft.cli.doctor.rules import Facts, HealthCheck, Node, judge
from rollout_ft.config import Config

TUNED = HealthCheck(500, 500, 1000, 3)
NODE = Node("10.0.0.1", False, 0, 1 << 20, True, 64 << 30, True)
HEAD = replace(NODE, address="10.0.0.0", head=True)
WELL = Facts(Config(), TUNED, "token", "rocksdb", (HEAD, NODE, replace(NODE, address="10.0.0.2")), False)


def found(**changed: Any) -> list[str]:
    return [finding.level for finding in judge(replace(WELL, **changed))]


def test_nothing_is_found_where_all_is_well():
    assert found() == []


def test_a_node_is_given_up_after_what_was_measured():
    assert (HealthCheck().gone_s, HealthCheck().hung_s) == (15, 65)
    assert (TUNED.gone_s, TUNED.hung_s) == (1.5, 4.5)


@pytest.mark.parametrize(
    "changed",
    [
        {"health": HealthCheck()},
        {"auth_mode": "disabled"},
        {"nodes": (HEAD, replace(NODE, niceness=15), NODE)},
        {"nodes": (HEAD, replace(NODE, open_files=1024), NODE)},
        {"nodes": (HEAD, replace(NODE, reaps=False), NODE)},
        {"nodes": (HEAD, replace(NODE, object_store_bytes=1 << 30), NODE)},
        {"nodes": (HEAD, NODE)},
        {"nodes": (HEAD, replace(NODE, sees_journal=False), NODE), "config": Config.model_validate({"store": {"journal_dir": "/j"}})},
        {"tokens_per_s": 4.0},
    ],
)
def test_each_thing_that_is_not_as_it_should_be_is_one_problem(changed: Any):
    assert found(**changed) == ["problem"]


def test_what_the_owner_of_a_cluster_should_have_decided_is_a_note():
    assert found(gcs_storage="memory") == ["note"]
    assert found(nodes=(HEAD,), health=HealthCheck()) == ["note"], "a cluster of one node has no other to lose"


def test_without_a_journal_nothing_is_said_of_where_it_is():
    assert found(nodes=(HEAD, replace(NODE, sees_journal=False), NODE)) == []


def test_a_cluster_for_this_machine_alone_needs_no_token_and_no_large_object_store():
    assert found(loopback=True, auth_mode="disabled", nodes=(HEAD, replace(NODE, object_store_bytes=1), NODE)) == []


def test_problems_come_before_notes_and_many_nodes_are_counted():
    nodes = (HEAD, *(replace(NODE, address=f"10.0.1.{i}", niceness=15) for i in range(9)))
    judged = judge(replace(WELL, nodes=nodes, gcs_storage="memory"))
    assert [finding.level for finding in judged] == ["problem", "note"]
    assert "10.0.1.2 and 6 more" in judged[0].what


@pytest.mark.ray
@pytest.mark.timeout(90)
def test_the_command_examines_a_cluster(tmp_path: Path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [str(Path(sys.executable).with_name("rollout-ft")), "doctor", "ray.address=local", f"store.journal_dir={tmp_path}", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=env | {"RAY_health_check_period_ms": "700"}, check=False)
    seen = json.loads(done.stdout)
    [node] = seen["nodes"]
    assert node["head"]
    assert node["niceness"] == os.nice(0)
    assert node["sees_journal"]
    assert seen["node_loss_s"]["gone"] == 3.5
    assert done.returncode == any(finding["level"] == "problem" for finding in seen["findings"])
    assert not list(tmp_path.iterdir())
