"""What is counted of a run, and the counting.

Owns every metric's name, labels and sentence, and a process's counts. Pure. Counting is an addition in a dict, and a duration
is two: turns pass here, and a record in Ray costs as much as all that is counted of one. No id is ever a label. A count
never goes down, so that whoever adds counts up may be told the same twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product

from rollout_ft.engine.gate import Closed
from rollout_ft.fleet.health import State
from rollout_ft.session.entries import KINDS
from rollout_ft.telemetry.histograms import SUM, Bounds, bucket, millionths, names
from rollout_ft.telemetry.losses import LOSSES, MOVED, OTHER
from rollout_ft.types import RESTARTS, Outcome, Served, SessionSpec

Series = tuple[str, ...]
"""A metric's name and the values of its labels, in their order."""
MODES, POOL = ("train", "eval"), "default"
MAX_POOLS = 32
"""A pool is whatever a caller says: those beyond so many are counted as one."""
ADMISSION, NO_ENGINE = "admission", "no_engine"
TURN_S = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300, 600, 1200)
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
COMMIT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
RECOVERY_S = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)


@dataclass(frozen=True, slots=True)
class Metric:
    """`labels`: each with the values that are known before anything happened, which begin at zero. Those of a histogram, which
    has `bounds`, begin with the bucket."""

    name: str
    sentence: str
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    bounds: Bounds = ()

    def seeds(self) -> list[Series]:
        return [(self.name, *values) for values in product(*self.labels.values())]


def _metrics(*declared: tuple[str, str, dict[str, Iterable[str]]]) -> dict[str, Metric]:
    return {name: Metric(name, text, {k: tuple(map(str, v)) for k, v in labels.items()}) for name, text, labels in declared}


def _histograms(*declared: tuple[str, str, Bounds, dict[str, Iterable[str]]]) -> dict[str, Metric]:
    plain = _metrics(*((name, text, {"le": (*names(bounds), SUM), **labels}) for name, text, bounds, labels in declared))
    return {name: replace(plain[name], bounds=bounds) for name, _, bounds, _ in declared}


_WHOSE: dict[str, Iterable[str]] = {"mode": MODES, "pool": (POOL,)}
COUNTERS = _metrics(
    ("requests", "Requests to the gateways, by the class of their status; `gone`: the client left.", {
        "status": ("2xx", "4xx", "5xx", "gone")}),
    ("turns_served", "Replies to requests for a turn, by how they were had.", {"outcome": Served, **_WHOSE}),
    ("turns_committed", "Turns that the store took.", _WHOSE),
    ("turns_acknowledged", "Turns of which the store was told that a client has the reply.", _WHOSE),
    ("generations", "Calls to engines, by how they ended.", {
        "outcome": ("finished", "aborted", "refused", "lost", "cancelled", "mixed")}),
    ("tokens_generated", "Tokens sampled for committed turns, and for what a restart from nothing gave up.", _WHOSE),
    ("tokens_reused", "Tokens that a turn went on from, sampled by an engine that was lost.", _WHOSE),
    ("tokens_wasted", "Sampled tokens of ended trials that are in no trajectory: known when a trial ends.", _WHOSE),
    ("commits", "Entries that the store took, by kind.", {"kind": KINDS}),
    ("commits_refused", "Commits that ended the ownership of their session, by why.", {
        "reason": ("stale_attempt", "stale_owner", "stale_view", "unavailable", "refused")}),
    ("engines_lost", "Starts of engines that were lost, by what was seen.", {"reason": LOSSES}),
    ("trials_finished", "Trials that ended.", {"outcome": Outcome}),
    ("attempts_restarted", "Attempts after the first, by where they began and what for.", {
        "start": ("checkpoint", "scratch"), "reason": RESTARTS}),
    ("sessions_moved", "Sessions that went to another owner.", {}),
    ("spans_dropped", "Spans that the collector did not take, or for which there was no room.", {}),
)  # fmt: skip
GAUGES = _metrics(
    ("engines", "Engines by state.", {"state": State}),
    ("sessions_active", "Sessions of trials that have not ended.", {}),
    ("turns_parked", "Calls that wait to be sent, by cause; `no_engine`: at a gateway.", {"cause": (*Closed, ADMISSION, NO_ENGINE)}),
    ("staleness", "Updates of the weights that the serving engine furthest behind has missed.", {}),
    ("store_replicas", "Replicas of the checkpoint store: in the view, wanted, and the fewest that commits need.", {
        "count": ("in_view", "wanted", "minimum")}),
    ("store_exposed", "1 while a single node holds every replica of the checkpoint store.", {}),
    ("checkpoint_bytes", "What all replicas together keep in memory and in Ray's object store.", {"kind": ("entries", "routed_experts")}),
)  # fmt: skip
HISTOGRAMS = _histograms(
    ("turn_seconds", "From a request's arrival at a gateway to its reply, of those that were not replayed.", TURN_S, _WHOSE),
    ("first_token_seconds", "From a turn's beginning at its engine's actor to its first new token there, all waiting included.",
        FIRST_TOKEN_S, _WHOSE),
    ("commit_seconds", "Until an entry was on every replica of the view.", COMMIT_S, {}),
    ("recovery_seconds", "From the loss of a session's engine, as far as it is known when that began, or from the session's takeover "
        "where nothing was in flight, to its next new token.", RECOVERY_S, {"reason": (*LOSSES, MOVED)}),
)  # fmt: skip
(
    REQUESTS, TURNS_SERVED, TURNS_COMMITTED, TURNS_ACKNOWLEDGED, GENERATIONS, TOKENS_GENERATED, TOKENS_REUSED, TOKENS_WASTED, COMMITS,
    COMMITS_REFUSED, ENGINES_LOST, TRIALS_FINISHED, ATTEMPTS_RESTARTED, SESSIONS_MOVED, SPANS_DROPPED,
) = COUNTERS  # fmt: skip
ENGINES, SESSIONS_ACTIVE, TURNS_PARKED, STALENESS, STORE_REPLICAS, STORE_EXPOSED, CHECKPOINT_BYTES = GAUGES
TURN_SECONDS, FIRST_TOKEN_SECONDS, COMMIT_SECONDS, RECOVERY_SECONDS = HISTOGRAMS
_COUNTED = COUNTERS | HISTOGRAMS


class Counts:
    def __init__(self) -> None:
        self.values: dict[Series, int] = {}
        self._pools: set[str] = set()

    def add(self, name: str, *labels: str, by: int = 1) -> None:
        series = (name, *labels)
        if series in self.values:
            self.values[series] += by
        elif by:
            self._add_first(series, by)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Of a histogram; `labels` without the bucket's."""
        self.add(name, bucket(HISTOGRAMS[name].bounds, value), *labels)
        self.add(name, SUM, *labels, by=millionths(value))

    def _add_first(self, series: Series, by: int) -> None:
        if "pool" in _COUNTED[series[0]].labels:  # the last one, wherever there is one
            if len(self._pools) >= MAX_POOLS and series[-1] not in self._pools:
                series = (*series[:-1], OTHER)
            self._pools.add(series[-1])
        self.values[series] = self.values.get(series, 0) + by


class Uncounted(Counts):
    """Where nobody wants to know."""

    def add(self, name: str, *labels: str, by: int = 1) -> None:
        return None

    def observe(self, name: str, value: float, *labels: str) -> None:
        return None


def counting(on: bool) -> Counts:
    return Counts() if on else Uncounted()


def whose(spec: SessionSpec) -> tuple[str, str]:
    """`mode` and `pool`."""
    return spec.mode, spec.pool or POOL


@dataclass(frozen=True, slots=True)
class Readings:
    """What an actor has counted since it began, and what is so just now."""

    counts: dict[Series, int] = field(default_factory=dict[Series, int])
    gauges: dict[Series, int] = field(default_factory=dict[Series, int])
