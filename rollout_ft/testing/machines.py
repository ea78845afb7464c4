"""Several nodes of Ray on this machine, which may be killed and frozen: for tests and for measuring recovery.

Owns the processes of the cluster it started and the environment they read; nothing of either is left when it ends. A
raylet that is killed is reaped here, or its workers would live on.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil

from rollout_ft.cluster import reread_environment

HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "500", "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3",
}  # fmt: skip
"""What is recommended: Ray's own defaults take up to 65 s to see a node that stands still."""
STORE_BYTES = 80 * 2**20


class Machine:
    """One node: a raylet and what it started."""

    def __init__(self, node: Any):
        self._node = node
        self.node_id: str = node.node_id
        self._raylet: Any = node.all_processes["raylet"][0].process
        self.pid: int = self._raylet.pid
        self._frozen: list[psutil.Process] = []
        self.struck = False

    def kill(self) -> None:
        """The raylet is killed and reaped; its workers end themselves within a second, as they do when it crashes."""
        self.struck = True
        self._raylet.kill()
        self._raylet.wait()

    def freeze(self) -> None:
        """Everything of the node stops, engines included, as when the machine hangs: connections stay, nobody answers."""
        self.struck = True
        raylet = psutil.Process(self._raylet.pid)
        self._frozen = [raylet, *raylet.children(recursive=True)]
        for process in self._frozen:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        for process in self._frozen:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
        self._frozen = []

    def end(self) -> None:
        """Nothing of it is left, whatever was done to it."""
        with contextlib.suppress(psutil.Error):
            self._frozen += psutil.Process(self._raylet.pid).children(recursive=True)
        for process in self._frozen:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.kill()


class Machines:
    """A head and `workers` other nodes; `address` is what `ray.address` takes."""

    def __init__(self, cluster: Any, directory: str):
        self._cluster, self.directory = cluster, directory
        self.address: str = cluster.address
        self.head = Machine(cluster.head_node)
        self.workers: dict[str, Machine] = {}

    def add(self) -> Machine:
        """One more node."""
        with _own_signals():
            node = self._cluster.add_node(wait=True, num_cpus=1, object_store_memory=STORE_BYTES)
        machine = Machine(node)
        self.workers[machine.node_id] = machine
        return machine

    def heal(self) -> None:
        """What was killed or frozen is ended, and as many nodes are added."""
        for machine in [m for m in self.workers.values() if m.struck]:
            machine.end()
            del self.workers[machine.node_id]
            self.add()

    def end(self) -> None:
        for machine in self.workers.values():
            machine.end()
        self._cluster.shutdown()


@contextlib.contextmanager
def _own_signals() -> Generator[None]:
    """Every node that is started here takes SIGTERM for itself; it goes back to who had it. From the main thread only."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def machines(workers: int = 3, **environment: str) -> Generator[Machines]:
    """A cluster with Ray's health checks as recommended; `environment` is added for all its processes and this one."""
    from ray.cluster_utils import Cluster  # not in every installation of Ray, and for no other use than this

    directory = tempfile.mkdtemp(prefix="rft-")
    Path(directory, "ray").mkdir()
    ours = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": directory, "RAY_worker_niceness": "0",
        **HEALTH_CHECKS, **environment,
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    reread_environment()
    try:
        head: Any = {
            "num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False,
            "temp_dir": directory,
        }  # fmt: skip
        with _own_signals():
            made = Machines(Cluster(initialize_head=True, connect=False, head_node_args=head), directory)
        try:
            for _ in range(workers):
                made.add()
            yield made
        finally:
            made.end()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        reread_environment()
        shutil.rmtree(directory, ignore_errors=True)
