"""The facts about a cluster that is connected.

Owns where each fact is found. Judges nothing. What belongs to a node is asked in a task on that node, because the
environment that counts is the one that its raylet, and on the head the GCS, was started with.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from rollout_ft.cli.doctor import monitoring
from rollout_ft.cli.doctor.monitoring import Monitoring
from rollout_ft.cli.doctor.rules import Facts, HealthCheck, Node
from rollout_ft.cluster import Cluster
from rollout_ft.config import Config, journalled
from rollout_ft.rayapi import ray
from rollout_ft.types import JSON

PROBE_TIMEOUT_S = 60.0
REAP_S = 3.0
_HEALTH = ("initial_delay_ms", "period_ms", "timeout_ms", "failure_threshold")


def collect(config: Config, cluster: Cluster, tokens_per_s: float) -> Facts:
    """Blocks for as long as the slowest node takes."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    marker = _mark(config)
    try:
        found: list[JSON] = ray.get([_on(node, marker) for node in alive], timeout=PROBE_TIMEOUT_S)
    finally:
        if marker:
            Path(marker).unlink()
    gcs: JSON = next((each["gcs"] for each in found if each["gcs"] is not None), JSON())
    set_ms = {name: int(gcs[f"RAY_health_check_{name}"]) for name in _HEALTH if f"RAY_health_check_{name}" in gcs}
    storage = "redis" if gcs.get("RAY_REDIS_ADDRESS") else str(gcs.get("RAY_gcs_storage", "memory"))
    nodes = tuple(_node(node, each) for node, each in zip(alive, found, strict=True))
    watched: Monitoring | None = next((each["watched"] for each in found if each["watched"] is not None), None)
    auth, alone = found[0]["auth_mode"], bool(cluster.temp_dir)
    return Facts(config, HealthCheck(**set_ms), auth, storage, nodes, alone, tokens_per_s, watched or Monitoring())


def _mark(config: Config) -> str:
    """A file that every node has to see where the journal is to be."""
    if not journalled(config):
        return ""
    directory = Path(config.store.journal_dir)
    directory.mkdir(parents=True, exist_ok=True)
    marker = directory / f".doctor-{uuid.uuid4().hex}"
    marker.touch()
    return str(marker)


def _on(node: JSON, marker: str) -> Any:
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    probing = ray.remote(num_cpus=0, max_retries=0)(probe).options(scheduling_strategy=strategy)
    return probing.remote(marker, node["NodeManagerAddress"], int(node["MetricsExportPort"]))


def _node(node: JSON, probed: JSON) -> Node:
    return Node(
        node["NodeManagerAddress"], probed["gcs"] is not None, probed["niceness"], probed["open_files"], probed["reaps"],
        int(node["Resources"].get("object_store_memory", 0)), probed["sees_journal"], probed["exports"],
    )  # fmt: skip


def probe(marker: str, address: str, metrics_port: int) -> JSON:
    """Runs on a node."""
    gcs = _gcs()
    return {
        "niceness": os.nice(0), "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "reaps": _reaps(), "gcs": gcs,
        "exports": monitoring.exports(address, metrics_port),
        "watched": monitoring.look(gcs, ray._private.worker._global_node.get_session_dir_path()) if gcs is not None else None,
        "auth_mode": os.environ.get("RAY_AUTH_MODE", "disabled"),
        "sees_journal": not marker or (os.path.exists(marker) and os.access(os.path.dirname(marker), os.W_OK)),
    }  # fmt: skip


def _reaps() -> bool:
    """Whether an orphan that has ended goes away."""
    started = subprocess.run(["sh", "-c", "sleep 0.1 >/dev/null & echo $!"], capture_output=True, text=True, check=True)
    pid, until = int(started.stdout), time.monotonic() + REAP_S
    while psutil.pid_exists(pid):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _gcs() -> dict[str, str] | None:
    """The environment of this cluster's GCS where it runs on this node."""
    session = str(ray._private.worker._global_node.session_name)
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "gcs_server" and any(session in part for part in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.Error):
                return {key: value for key, value in process.environ().items() if key.startswith("RAY_")}
            return {}  # another user's: taken for Ray's defaults
    return None
