"""A run's metrics on Ray's own Prometheus endpoint, as `ray_rollout_ft_…`, with the run's name as label `run`.

Owns Ray's metrics, in the supervisor alone: a series by Ray is one of the process that made it, and those of an engine would
end with it. Ray shows what it was told within `metrics_report_interval_ms` (10 s unless set).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rollout_ft.telemetry.metrics import COUNTERS, GAUGES, RECOVERY_BOUNDS_S, RECOVERY_SECONDS, Metric, Series
from rollout_ft.telemetry.totals import Totals, seeds


class Publisher:
    def __init__(self, run: str):
        from ray.util import metrics

        made: Any = metrics
        self._run = {"run": run}
        self._counters = {m.name: self._make(made.Counter, m) for m in COUNTERS.values()}
        self._gauges = {m.name: self._make(made.Gauge, m) for m in GAUGES.values()}
        self._recovery = self._make(made.Histogram, RECOVERY_SECONDS, boundaries=list(RECOVERY_BOUNDS_S))
        self._published: dict[Series, int] = {}
        for series in seeds(COUNTERS.values()):
            self._published[series] = 0
            self._counters[series[0]]._record(0, _tags(COUNTERS, series))  # `inc` takes no zero

    def _make(self, kind: Any, metric: Metric, **options: Any) -> Any:
        made = kind(f"rollout_ft_{metric.name}", description=metric.sentence, tag_keys=("run", *metric.labels), **options)
        return made.set_default_tags(self._run)

    def publish(self, totals: Totals) -> None:
        """Tells Ray what is new since the last call."""
        for series, count in totals.counted().items():
            new = count - self._published.get(series, 0)
            if new:
                self._published[series] = count
                self._counters[series[0]].inc(new, _tags(COUNTERS, series))
        for series, value in totals.gauges().items():
            self._gauges[series[0]].set(value, _tags(GAUGES, series))
        for seconds in totals.recoveries:
            self._recovery.observe(seconds)
        totals.recoveries.clear()


def _tags(metrics: Mapping[str, Metric], series: Series) -> dict[str, str]:
    return dict(zip(metrics[series[0]].labels, series[1:], strict=True))
