"""What the doctor finds, and that it finds it on a real cluster."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from rollout_ft.cli.doctor.command import show
from rollout_ft.cli.doctor.monitoring import Monitoring, look
from rollout_ft.cli.doctor.rules import Facts, HealthCheck, Node, judge
from rollout_ft.config import Config

TUNED = HealthCheck(500, 500, 1000, 3)
NODE = Node("10.0.0.1", False, 0, 1 << 20, True, 64 << 30, True, True)
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


@pytest.mark.parametrize(
    ("watched", "says"),
    [
        ({"discovery": False}, "--include-dashboard"),
        ({"prometheus_answers": False, "scraped": None, "rules": None}, "RAY_PROMETHEUS_HOST"),
        ({"scraped": False}, "file_sd_configs"),
        ({"rules": False}, "alerts.yaml"),
        ({"grafana_answers": False, "board": False}, "RAY_GRAFANA_HOST"),
        ({"board": False}, "rollout_ft.json"),
    ],
)
def test_what_is_missing_for_boards_and_alerts_is_one_note_each_that_says_what_to_do(watched: dict[str, Any], says: str):
    [finding] = judge(replace(WELL, watched=Monitoring(**watched)))
    assert finding.level == "note"
    assert says in finding.do


def test_a_node_without_metrics_is_named_and_nothing_is_said_of_the_list_that_would_have_it():
    [finding] = judge(replace(WELL, nodes=(HEAD, replace(NODE, exports=False), NODE), watched=Monitoring(discovery=False)))
    assert NODE.address in finding.what


def test_who_does_not_count_is_told_that_boards_are_empty():
    [finding] = judge(replace(WELL, config=Config.model_validate({"telemetry": {"metrics": False}})))
    assert "telemetry.metrics" in finding.what


def test_what_could_not_be_asked_is_not_called_missing():
    assert found(watched=Monitoring(scraped=None, rules=None, board=None)) == []


class Answers(BaseHTTPRequestHandler):
    """A Prometheus or a Grafana; `paths` has what it answers, the rest is 404."""

    paths: ClassVar[dict[str, tuple[int, Any]]] = {}

    def do_GET(self) -> None:
        status, answer = next((a for path, a in self.paths.items() if self.path.startswith(path)), (404, {}))
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: Any) -> None:
        return None


@contextlib.contextmanager
def answering(paths: dict[str, tuple[int, Any]]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Answers,), {"paths": paths}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_prometheus_and_grafana_are_asked_where_the_heads_environment_says_they_are(tmp_path: Path):
    there = {"status": "success", "data": {"result": [1], "groups": [{"name": "rollout_ft"}]}}
    both = {"/api/v1/": (200, there), "/api/health": (200, {}), "/api/dashboards/uid/rollout-ft": (200, {})}
    (tmp_path / "prom_metrics_service_discovery.json").touch()
    with answering(both) as url:
        seen = look({"RAY_PROMETHEUS_HOST": url, "RAY_GRAFANA_HOST": url + "/"}, str(tmp_path))
    assert seen == Monitoring(True, url, True, True, True, url, True, True)


def test_what_they_do_not_have_is_seen(tmp_path: Path):
    without = {"/api/v1/": (200, {"status": "success", "data": {"result": [], "groups": []}}), "/api/health": (200, {})}
    with answering(without) as url:
        seen = look({"RAY_PROMETHEUS_HOST": url, "RAY_GRAFANA_HOST": url}, str(tmp_path))
    assert seen == Monitoring(False, url, True, False, False, url, True, False)


def test_a_grafana_that_asks_for_a_key_is_believed_when_the_board_is_in_rays_directory(tmp_path: Path):
    environment = {"RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR": str(tmp_path)}
    with answering({"/api/health": (200, {}), "/api/dashboards": (401, {})}) as url:
        environment |= {"RAY_GRAFANA_HOST": url, "RAY_PROMETHEUS_HOST": "http://127.0.0.1:9"}
        assert look(environment, str(tmp_path)).board is None
        (tmp_path / "board.json").write_text(Path("configs/grafana/rollout_ft.json").read_text())
        assert look(environment, str(tmp_path)).board is True


def test_without_a_journal_nothing_is_said_of_where_it_is():
    assert found(nodes=(HEAD, replace(NODE, sees_journal=False), NODE)) == []


def test_a_cluster_for_this_machine_alone_needs_no_token_and_no_large_object_store():
    assert found(loopback=True, auth_mode="disabled", nodes=(HEAD, replace(NODE, object_store_bytes=1), NODE)) == []


def test_problems_come_before_notes_and_many_nodes_are_counted():
    nodes = (HEAD, *(replace(NODE, address=f"10.0.1.{i}", niceness=15) for i in range(9)))
    judged = judge(replace(WELL, nodes=nodes, gcs_storage="memory"))
    assert [finding.level for finding in judged] == ["problem", "note"]
    assert "10.0.1.2 and 6 more" in judged[0].what


def test_one_node_is_a_node():
    said = Console(record=True, width=80)
    show({"findings": [], "nodes": [{}]}, said)
    assert said.export_text() == "1 node, 0 problems\n"


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
    assert node["exports"]
    assert not seen["watched"]["discovery"], "ray.dashboard is off"
    assert seen["node_loss_s"]["gone"] == 3.5
    assert done.returncode == any(finding["level"] == "problem" for finding in seen["findings"])
    assert not list(tmp_path.iterdir())
