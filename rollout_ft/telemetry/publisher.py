"""A run's metrics on Ray's own Prometheus endpoint, as `ray_rollout_ft_…`, with the run's name as label `run`.

Owns Ray's metrics, in the supervisor alone: a series by Ray is one of the process that made it, and those of an engine would
end with it. Ray shows what it was told within `metrics_report_interval_ms` (10 s unless set), and forgets gauges that it is
not told again for twice as long.

Histograms are Ray's gauges with the names that Prometheus gives to a histogram's series. Ray's own takes one value at a
time, tells its agent how many fell into each bucket, and that records the middle of the bucket as often: work for each turn
on every node's agent, and a sum that is a guess.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rollout_ft.telemetry.metrics import COUNTERS, GAUGES, HISTOGRAMS, Metric, Series
from rollout_ft.telemetry.totals import Totals, seeds, spreads
from rollout_ft.types import JSON


class Publisher:
    def __init__(self, run: str):
        from ray.util import metrics

        made: Any = metrics
        self._run = {"run": run}
        self._counters = {m.name: self._make(made.Counter, m.name, m.sentence, *m.labels) for m in COUNTERS.values()}
        self._gauges = {m.name: self._make(made.Gauge, m.name, m.sentence, *m.labels) for m in GAUGES.values()}
        self._spreads = {name: self._make(made.Gauge, name, text, *labels) for name, text, labels in _parts()}
        self._published: dict[Series, int] = {}
        for series in seeds(COUNTERS.values()):
            self._published[series] = 0
            self._counters[series[0]]._record(0, _tags(COUNTERS, series))  # `inc` takes no zero

    def _make(self, kind: Any, name: str, sentence: str, *labels: str) -> Any:
        return kind(f"rollout_ft_{name}", description=sentence, tag_keys=("run", *labels)).set_default_tags(self._run)

    def publish(self, totals: Totals) -> None:
        """Tells Ray what was counted since the last call, and every gauge."""
        for series, count in totals.counted().items():
            new = count - self._published.get(series, 0)
            if new:
                self._published[series] = count
                self._counters[series[0]].inc(new, _tags(COUNTERS, series))
        for series, value in totals.gauges().items():
            self._gauges[series[0]].set(value, _tags(GAUGES, series))
        for name, value, tags in _shown(totals):
            self._spreads[name].set(value, tags)


def _parts() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Of each histogram the name, sentence and labels of its three kinds of series."""
    for m in HISTOGRAMS.values():
        le, *labels = m.labels
        yield f"{m.name}_bucket", m.sentence, (le, *labels)
        yield f"{m.name}_count", m.sentence, (*labels,)
        yield f"{m.name}_sum", m.sentence, (*labels,)


def _shown(totals: Totals) -> Iterator[tuple[str, float, JSON]]:
    for (name, *values), spread in spreads(totals.counts.values).items():
        tags = dict(zip(list(HISTOGRAMS[name].labels)[1:], values, strict=True))
        for le, count in spread.rising.items():
            yield f"{name}_bucket", count, {"le": le, **tags}
        yield f"{name}_count", spread.count, tags
        yield f"{name}_sum", spread.sum, tags


def _tags(metrics: Mapping[str, Metric], series: Series) -> dict[str, str]:
    return dict(zip(metrics[series[0]].labels, series[1:], strict=True))
