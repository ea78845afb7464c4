"""A run's metrics: what its actors have counted, added up over all that ever were.

Owns the sums. Pure. Each actor tells all that it has counted, so that an answer that is lost, late or repeated changes
nothing. What an actor had counted since it was last asked dies with it, and a supervisor that is started again knows what the
actors that live have counted: the sums are for people and alerts, the store is what knows of every turn. So tokens are counted
once more when a trial ends, from what the store has of it: a count of those that is behind is brought up to them, and when all
trials have ended it is the count of their summaries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rollout_ft.telemetry import metrics as m
from rollout_ft.telemetry.metrics import Counts, Metric, Readings, Series
from rollout_ft.types import JSON

MAX_STARTS = 1024
MAX_RECOVERIES = 10_000
_LOSSES = (
    ("process", ("exited", "killed by", "ended")), ("actor", ("actor died",)), ("silent", ("does not answer", "missed pings")),
    ("stalled", ("stalled",)), ("requests", ("failed:",)), ("probes", ("probes:",)), ("connection", ("connection", "/")),
)  # fmt: skip


@dataclass(slots=True)
class _Told:
    incarnation: int
    counts: dict[Series, int] = field(default_factory=dict[Series, int])
    gauges: dict[Series, int] = field(default_factory=dict[Series, int])


class Totals:
    def __init__(self) -> None:
        self.counts, self._settled = Counts(), Counts()
        self.fleet: dict[Series, int] = {}
        """Gauges of what the supervisor itself knows."""
        self.recoveries: list[float] = []
        """Those that nobody has published yet."""
        self._recovered, self._recovered_s = 0, 0.0
        self._told: dict[str, _Told] = {}
        self._starts: dict[tuple[str, int], None] = {}

    def take(self, role: str, incarnation: int, readings: Readings | None) -> None:
        """What one actor tells; None when it did not answer. A new incarnation has counted from nothing."""
        told = self._told.get(role)
        if told is None or told.incarnation < incarnation:
            told = self._told[role] = _Told(incarnation)
        if told.incarnation > incarnation:
            return
        told.gauges = readings.gauges if readings else {}
        for series, count in readings.counts.items() if readings else ():
            new = count - told.counts.get(series, 0)
            if new > 0:
                self.counts.add(*series, by=new)
                told.counts[series] = count

    def saw(self, event: JSON) -> None:
        """A transition of which there are few, counted from its event."""
        match event["event"]:
            case "engine.start_failed":
                self._starts[event["engine"], event["incarnation"]] = None
                if len(self._starts) > MAX_STARTS:
                    del self._starts[next(iter(self._starts))]
            case "engine.dead":
                started = (event["engine"], event["incarnation"]) not in self._starts
                self.counts.add(m.ENGINES_LOST, loss_of(event["reason"]) if started else "start")
            case "trial.ended":
                self.counts.add(m.TRIALS_FINISHED, event["outcome"])
                self._settle(event)
            case "trial.restarted":
                self.counts.add(m.ATTEMPTS_RESTARTED, "checkpoint" if event["checkpoint"] else "scratch", event["reason"] or "asked")
            case "session.moved":
                self.counts.add(m.SESSIONS_MOVED)
            case "session.resumed":
                self._recovered, self._recovered_s = self._recovered + 1, self._recovered_s + event["seconds"]
                if len(self.recoveries) < MAX_RECOVERIES:
                    self.recoveries.append(event["seconds"])
            case _:
                pass

    def _settle(self, ended: JSON) -> None:
        for name in (m.TOKENS_GENERATED, m.TOKENS_REUSED, m.TOKENS_WASTED):
            self._settled.add(name, ended["mode"], ended["pool"] or m.POOL, by=ended[name])

    def counted(self) -> dict[Series, int]:
        """Every counter that is not zero."""
        live, settled = self.counts.values, self._settled.values
        return {**live, **{series: max(count, live.get(series, 0)) for series, count in settled.items()}}

    def gauges(self) -> dict[Series, int]:
        """Every gauge, also those that are zero."""
        now = Counter(dict.fromkeys(seeds(m.GAUGES.values()), 0))
        for gauges in (self.fleet, *(told.gauges for told in self._told.values())):
            now.update(gauges)
        return dict(now)

    def flat(self) -> dict[str, float]:
        """`rollout_ft/NAME`, summed over all labels, and `rollout_ft/NAME/VALUE` by its first label, where that is not `mode`."""
        recovered = f"rollout_ft/{m.RECOVERY_SECONDS.name}"
        made: dict[str, float] = {f"{recovered}/count": self._recovered, f"{recovered}/sum": round(self._recovered_s, 3)}
        zeros = dict.fromkeys(seeds(m.COUNTERS.values()), 0)
        for series, value in ({**zeros, **self.counted()} | self.gauges()).items():
            key, labels = f"rollout_ft/{series[0]}", (m.COUNTERS | m.GAUGES)[series[0]].labels
            made[key] = made.get(key, 0) + value
            if labels and next(iter(labels)) != "mode":
                made[f"{key}/{series[1]}"] = made.get(f"{key}/{series[1]}", 0) + value
        return made


def seeds(metrics: Iterable[Metric]) -> list[Series]:
    return [series for metric in metrics for series in metric.seeds()]


def loss_of(reason: str) -> str:
    """Which of `LOSSES` a reason for an engine's loss is."""
    return next((loss for loss, starts in _LOSSES if reason.startswith(starts)), m.OTHER)


assert {loss for loss, _ in _LOSSES} | {"start", m.OTHER} == set(m.LOSSES)
