"""What a cluster should be like, and what to set where it is not.

Owns the rules. Pure: they judge facts that were collected elsewhere. A problem costs turns, minutes or secrets when the
fault comes; a note is what the owner of the cluster should have decided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from rollout_ft.cli.doctor.monitoring import GRAFANA, PROMETHEUS, Monitoring
from rollout_ft.config import Config, journalled

NODE_LOSS_S = 5.0
SDK_TRIES, SDK_TIMEOUT_S = 3, 600.0
"""What the openai and anthropic clients do unless told otherwise."""
SPARE_FILES = 1024


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """Ray's own, in its GCS; the defaults are Ray's."""

    initial_delay_ms: int = 5000
    period_ms: int = 3000
    timeout_ms: int = 10000
    failure_threshold: int = 5

    @property
    def gone_s(self) -> float:
        """Until a node whose processes are dead is given up."""
        return self.failure_threshold * self.period_ms / 1000

    @property
    def hung_s(self) -> float:
        """Until one that is cut off or frozen is."""
        return self.failure_threshold * (self.period_ms + self.timeout_ms) / 1000


@dataclass(frozen=True, slots=True)
class Node:
    address: str
    head: bool
    niceness: int
    open_files: int
    reaps: bool
    """Whether its process 1 collects children that nobody else waits for."""
    object_store_bytes: int
    sees_journal: bool
    exports: bool
    """Whether Ray shows its metrics to Prometheus."""


@dataclass(frozen=True, slots=True)
class Facts:
    config: Config
    health: HealthCheck
    auth_mode: str
    gcs_storage: str
    nodes: tuple[Node, ...]
    loopback: bool
    """A cluster that the command started for itself, on this machine alone."""
    tokens_per_s: float = 0.0
    """How fast one generation is; 0 where nobody said."""
    watched: Monitoring = field(default_factory=Monitoring)


@dataclass(frozen=True, slots=True)
class Finding:
    level: Literal["problem", "note"]
    what: str
    why: str
    do: str


def judge(facts: Facts) -> list[Finding]:
    """Everything that is not as it should be, the worst first."""
    found = [finding for rule in RULES for finding in rule(facts)]
    return sorted(found, key=lambda finding: finding.level != "problem")


def node_loss(facts: Facts) -> Iterator[Finding]:
    health = facts.health
    if len(facts.nodes) > 1 and health.hung_s > NODE_LOSS_S:
        yield Finding(
            "problem",
            f"Ray gives a node up after {health.gone_s:g} s when it is gone, after {health.hung_s:g} s when it hangs",
            "until then commits wait for its store, and what ran on it is not replaced",
            "start the head with RAY_health_check_initial_delay_ms=500 RAY_health_check_period_ms=500 RAY_health_check_timeout_ms=1000 "
            "RAY_health_check_failure_threshold=3 (1.5 s and 4.5 s); on nodes too loaded for that, a timeout of 3000 (10.5 s)",
        )


def niceness(facts: Facts) -> Iterator[Finding]:
    slow = [node.address for node in facts.nodes if node.niceness > 0]
    if slow:
        yield Finding(
            "problem",
            f"actors run at niceness {max(node.niceness for node in facts.nodes)} on {_some(slow)}",
            "whatever else runs there is served before gateways, engines' actors and stores",
            "start every node with RAY_worker_niceness=0",
        )


def auth(facts: Facts) -> Iterator[Finding]:
    if facts.auth_mode != "token" and not facts.loopback:
        yield Finding(
            "problem",
            "the cluster takes commands from whoever reaches its ports (RAY_AUTH_MODE is not token)",
            "agents run code that a model wrote, often in the same network",
            "RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN_PATH for the head, every node, and every command (ray job submit too)",
        )


def replicas(facts: Facts) -> Iterator[Finding]:
    wanted, workers = facts.config.store.replicas, sum(not node.head for node in facts.nodes)
    kept = "what is journalled survives it" if journalled(facts.config) else "without a journal every turn of the run is lost with it"
    if len(facts.nodes) == 1:
        yield Finding(
            "note", f"one node has all {wanted} replicas of the checkpoint store", kept,
            "add nodes, or set store.journal_dir to a disk that outlives this one",
        )  # fmt: skip
    elif workers < wanted:
        yield Finding(
            "problem", f"{wanted} replicas of the checkpoint store, and {workers} nodes beside the head",
            f"two replicas on one node, or one on the head, are lost together with it: {kept}",
            f"add nodes, or set store.replicas={max(1, workers)}",
        )  # fmt: skip


def reaping(facts: Facts) -> Iterator[Finding]:
    bad = [node.address for node in facts.nodes if not node.reaps]
    if bad:
        yield Finding(
            "problem",
            f"process 1 on {_some(bad)} does not collect the children of dead processes",
            "the actors of a raylet that died see its zombie, and go on for ever: engines keep their GPU memory, stores their journals",
            "run containers with an init (docker run --init, tini, shareProcessNamespace in Kubernetes)",
        )


def open_files(facts: Facts) -> Iterator[Finding]:
    needed = facts.config.gateway.max_connections + SPARE_FILES
    low = [node for node in facts.nodes if node.open_files < needed]
    if low:
        yield Finding(
            "problem",
            f"processes may open {min(node.open_files for node in low)} files on {_some([node.address for node in low])}",
            f"a gateway takes {facts.config.gateway.max_connections} connections (gateway.max_connections), and each is a file",
            f"ulimit -n {max(65536, needed)} where every node is started, or a smaller gateway.max_connections",
        )


def object_store(facts: Facts) -> Iterator[Finding]:
    needed = facts.config.store.memory_bytes
    low = [node for node in facts.nodes if node.object_store_bytes < needed]
    if low and not facts.loopback:
        yield Finding(
            "problem",
            f"the object store has {min(node.object_store_bytes for node in low) / 2**30:.1f} GiB on {_some([n.address for n in low])}",
            f"a replica keeps up to {needed / 2**30:.1f} GiB there (store.memory_bytes); what does not fit is spilled to the node's disk",
            "ray start --object-store-memory, or a smaller store.memory_bytes with a journal",
        )


def journal(facts: Facts) -> Iterator[Finding]:
    blind = [node.address for node in facts.nodes if not node.sees_journal]
    if journalled(facts.config) and blind:
        yield Finding(
            "problem",
            f"{_some(blind)} cannot write to, or has another directory than we have at, {facts.config.store.journal_dir}",
            "a run goes on after its cluster only with the journals that the next one finds there",
            "set store.journal_dir to a directory that every node shares",
        )


def head(facts: Facts) -> Iterator[Finding]:
    if len(facts.nodes) > 1 and facts.gcs_storage == "memory":
        yield Finding(
            "note",
            "the head keeps the cluster's state in its memory",
            "when the head dies the whole cluster ends, and runs go on from their journals in the next one",
            "RAY_gcs_storage=rocksdb RAY_gcs_storage_path=DIR, or RAY_REDIS_ADDRESS, for the head: then it can be started again",
        )


def client_patience(facts: Facts) -> Iterator[Finding]:
    if not facts.tokens_per_s:
        return
    longest_s = facts.config.session.max_output_tokens / facts.tokens_per_s
    held_s = SDK_TRIES * min(SDK_TIMEOUT_S, facts.config.gateway.max_hold_s)
    if longest_s > held_s:
        yield Finding(
            "problem",
            f"a turn of session.max_output_tokens takes {longest_s:,.0f} s at {facts.tokens_per_s:g} tokens/s",
            f"a plain request is held for {held_s:,.0f} s in all: {SDK_TRIES} tries of a client as it comes, each ended by a 503",
            "stream, raise the client's timeout and max_retries (and gateway.max_hold_s), or lower session.max_output_tokens",
        )


def metrics(facts: Facts) -> Iterator[Finding]:
    silent = [node.address for node in facts.nodes if not node.exports]
    if not facts.config.telemetry.metrics:
        yield Finding(
            "note", "turns are not counted (telemetry.metrics)", "boards, alerts and run.metrics() are empty", "telemetry.metrics=true"
        )  # fmt: skip
    elif silent:
        yield Finding(
            "note", f"Ray shows no metrics on {_some(silent)}", "Prometheus finds nothing there, and no board or alert has what it tells",
            "install ray[default] on every node, and start it without RAY_enable_metrics_collection=0",
        )  # fmt: skip
    elif not facts.watched.discovery:
        yield Finding(
            "note", "Ray keeps no list of its nodes for Prometheus", "its dashboard writes that, and is off",
            "start the head with --include-dashboard=true (ray.dashboard=true for a cluster that we start)",
        )  # fmt: skip


def prometheus(facts: Facts) -> Iterator[Finding]:
    watched = facts.watched
    if not watched.prometheus_answers:
        yield Finding(
            "note", f"no Prometheus answers at {watched.prometheus}", "nobody is told when trials are lost, and there is no history",
            f"start one as docs/dashboards.md says, or start the head with {PROMETHEUS[0]} set to where it is",
        )  # fmt: skip
    elif watched.scraped is False:
        yield Finding(
            "note", f"the Prometheus at {watched.prometheus} has no metrics of this cluster", "it reads another list of nodes",
            "give it this cluster's list (file_sd_configs): docs/dashboards.md",
        )  # fmt: skip
    if watched.rules is False:
        yield Finding(
            "note", f"the Prometheus at {watched.prometheus} has no alert rules of ours", "nobody is told when trials are lost",
            "add configs/grafana/alerts.yaml to its rule_files: docs/dashboards.md",
        )  # fmt: skip


def grafana(facts: Facts) -> Iterator[Finding]:
    watched = facts.watched
    if not watched.grafana_answers:
        yield Finding(
            "note", f"no Grafana answers at {watched.grafana}", "there is no board of the run, and Ray's dashboard shows no time series",
            f"start one as docs/dashboards.md says, or start the head with {GRAFANA[0]} set to where it is",
        )  # fmt: skip
    elif watched.board is False:
        yield Finding(
            "note", f"the Grafana at {watched.grafana} has no board of ours", "Ray's own boards know of actors, not of trials",
            "install configs/grafana/rollout_ft.json: docs/dashboards.md",
        )  # fmt: skip


RULES = (
    node_loss, niceness, auth, replicas, reaping, open_files, object_store, journal, head, client_patience, metrics, prometheus, grafana,
)  # fmt: skip


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
