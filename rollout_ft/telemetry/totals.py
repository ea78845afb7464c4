"""A run's metrics: what its actors have counted, added up over all that ever were.

Owns the sums. Pure. Each actor tells all that it has counted, so that an answer that is lost, late or repeated changes
nothing. What an actor had counted since it was last asked dies with it, and a supervisor that is started again knows what the
actors that live have counted: the sums are for people and alerts, the store is what knows of every turn. So tokens are counted
once more when a trial ends, from what the store has of it: a count of those that is behind is brought up to them, and when all
trials have ended it is the count of their summaries.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

from rollout_ft.telemetry import metrics as m
from rollout_ft.telemetry.histograms import Spread
from rollout_ft.telemetry.losses import START, loss_of
from rollout_ft.telemetry.metrics import Counts, Metric, Readings, Series
from rollout_ft.types import JSON

MAX_STARTS = 1024
COUNTED_SINCE = "rollout_ft/counted_since"


@dataclass(slots=True)
class _Told:
    incarnation: int
    counts: dict[Series, int] = field(default_factory=dict[Series, int])
    gauges: dict[Series, int] = field(default_factory=dict[Series, int])


class Totals:
    """`since`: wall clock, when the supervisor that keeps them began; it comes with them as `COUNTED_SINCE`."""

    def __init__(self, since: float = 0.0) -> None:
        self._since = since
        self.counts, self._settled = Counts(), Counts()
        self.fleet: dict[Series, int] = {}
        """Gauges of what the supervisor itself knows."""
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

    def keep(self, roles: Set[str]) -> None:
        """Those that there are: what was so at another is so no more."""
        for role in self._told.keys() - roles:
            self._told[role].gauges = {}

    def saw(self, event: JSON) -> None:
        """A transition of which there are few, counted from its event."""
        match event["event"]:
            case "engine.start_failed":
                self._starts[event["engine"], event["incarnation"]] = None
                if len(self._starts) > MAX_STARTS:
                    del self._starts[next(iter(self._starts))]
            case "engine.dead":
                started = (event["engine"], event["incarnation"]) not in self._starts
                self.counts.add(m.ENGINES_LOST, loss_of(event["reason"]) if started else START)
            case "trial.ended":
                self.counts.add(m.TRIALS_FINISHED, event["outcome"])
                self._settle(event)
            case "trial.restarted":
                self.counts.add(m.ATTEMPTS_RESTARTED, "checkpoint" if event["checkpoint"] else "scratch", event["reason"] or "asked")
            case "session.moved":
                self.counts.add(m.SESSIONS_MOVED)
            case "session.resumed":
                self.counts.observe(m.RECOVERY_SECONDS, event["seconds"], event["reason"])
            case _:
                pass

    def _settle(self, ended: JSON) -> None:
        for name in (m.TOKENS_GENERATED, m.TOKENS_REUSED, m.TOKENS_WASTED):
            self._settled.add(name, ended["mode"], ended["pool"] or m.POOL, by=ended[name])

    def counted(self) -> dict[Series, int]:
        """Every counter that is not zero."""
        live = {series: count for series, count in self.counts.values.items() if series[0] in m.COUNTERS}
        settled = self._settled.values
        return {**live, **{series: max(count, live.get(series, 0)) for series, count in settled.items()}}

    def gauges(self) -> dict[Series, int]:
        """Every gauge, also those that are zero."""
        now = Counter(dict.fromkeys(seeds(m.GAUGES.values()), 0))
        for gauges in (self.fleet, *(told.gauges for told in self._told.values())):
            now.update(gauges)
        return dict(now)

    def flat(self) -> dict[str, float]:
        """`rollout_ft/NAME`, summed over all labels, and `rollout_ft/NAME/VALUE` by its first label, where that is not `mode`; of a
        histogram `/count`, `/sum`, `/p50` and `/p99`."""
        made: dict[str, float] = {COUNTED_SINCE: self._since}
        for name, spread in spreads(self.counts.values, whole=True).items():
            said = {"count": spread.count, "sum": round(spread.sum, 3), "p50": spread.quantile(0.5), "p99": spread.quantile(0.99)}
            made |= {f"rollout_ft/{name[0]}/{key}": value for key, value in said.items()}
        zeros = dict.fromkeys(seeds(m.COUNTERS.values()), 0)
        for series, value in ({**zeros, **self.counted()} | self.gauges()).items():
            key, labels = f"rollout_ft/{series[0]}", (m.COUNTERS | m.GAUGES)[series[0]].labels
            made[key] = made.get(key, 0) + value
            if labels and next(iter(labels)) != "mode":
                made[f"{key}/{series[1]}"] = made.get(f"{key}/{series[1]}", 0) + value
        return made


def seeds(metrics: Iterable[Metric]) -> list[Series]:
    return [series for metric in metrics for series in metric.seeds()]


def spreads(values: Mapping[Series, int], *, whole: bool = False) -> dict[Series, Spread]:
    """Every histogram by its name and its labels without the bucket's; with `whole` by its name, summed over its labels."""
    zeros = dict.fromkeys(seeds(m.HISTOGRAMS.values()), 0)
    counted: defaultdict[Series, Counter[str]] = defaultdict(Counter)
    for (name, le, *labels), count in (zeros | {series: n for series, n in values.items() if series[0] in m.HISTOGRAMS}).items():
        counted[(name,) if whole else (name, *labels)][le] += count
    return {series: Spread.of(m.HISTOGRAMS[series[0]].bounds, buckets) for series, buckets in counted.items()}
