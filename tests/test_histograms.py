"""Histograms: what is read from buckets is what was observed, as far as buckets can tell."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.telemetry import metrics as m
from rollout_ft.telemetry.histograms import ABOVE, Spread, bucket, millionths, names
from rollout_ft.telemetry.losses import LOSSES, MOVED, loss_of, unseen_s
from rollout_ft.telemetry.metrics import HISTOGRAMS, Counts, Readings
from rollout_ft.telemetry.publisher import Publisher
from rollout_ft.telemetry.totals import Totals, spreads

BOUNDS = m.COMMIT_S
MINE = ("train", "default")
values_s = st.lists(st.one_of(st.floats(0, 100), st.sampled_from(BOUNDS)), max_size=60)


def spread_of(values: list[float]) -> Spread:
    counted: Counter[str] = Counter()
    for value in values:
        counted[bucket(BOUNDS, value)] += 1
        counted["sum"] += millionths(value)
    return Spread.of(BOUNDS, counted)


@given(values_s)
def test_every_bucket_has_the_values_that_are_at_most_its_bound(values: list[float]):
    spread = spread_of(values)
    for bound, name in zip(BOUNDS, names(BOUNDS), strict=False):
        assert spread.rising[name] == sum(value <= bound for value in values)
    assert spread.rising[ABOVE] == spread.count == len(values)
    assert spread.sum == pytest.approx(math.fsum(values), abs=1e-6 * len(values))


@given(values_s.filter(bool), st.floats(0.01, 1))
def test_a_quantile_is_in_the_bucket_of_the_value_that_is_it(values: list[float], q: float):
    true = sorted(values)[max(0, math.ceil(q * len(values)) - 1)]
    found = spread_of(values).quantile(q)
    if true > BOUNDS[-1]:
        assert found == BOUNDS[-1]
    else:
        above = next(bound for bound in BOUNDS if true <= bound)
        below = max((bound for bound in BOUNDS if bound < above), default=0.0)
        assert below <= found <= above


@given(values_s)
def test_quantiles_rise(values: list[float]):
    spread = spread_of(values)
    found = [spread.quantile(q / 20) for q in range(21)]
    assert found == sorted(found)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1000)), max_size=60), st.data())
def test_told_by_several_late_or_twice_the_buckets_are_those_of_all_that_was_observed(told: list[tuple[int, float]], data: Any):
    totals, actors, whole = Totals(), [Counts(), Counts(), Counts()], Counts()
    for actor, seconds in told:
        actors[actor].observe(m.TURN_SECONDS, seconds, *MINE)
        whole.observe(m.TURN_SECONDS, seconds, *MINE)
        if data.draw(st.booleans()):
            for _ in range(2):
                totals.take(f"engine-{actor}", 1, Readings(dict(actors[actor].values)))
    for i, actor in enumerate(actors):
        totals.take(f"engine-{i}", 1, Readings(dict(actor.values)))
    assert totals.counts.values == whole.values
    assert totals.flat()["rollout_ft/turn_seconds/count"] == len(told)


def test_a_run_that_did_nothing_has_every_histogram_at_zero():
    flat = Totals().flat()
    for name in HISTOGRAMS:
        assert [flat[f"rollout_ft/{name}/{key}"] for key in ("count", "sum", "p50", "p99")] == [0, 0, 0, 0]
    there = spreads({})
    assert {series for series in there if series[0] == m.RECOVERY_SECONDS} == {(m.RECOVERY_SECONDS, why) for why in (*LOSSES, MOVED)}
    assert (m.TURN_SECONDS, "eval", "default") in there


def test_pools_without_end_are_one_in_histograms_as_well():
    counts = Counts()
    for i in range(1000):
        counts.observe(m.TURN_SECONDS, 1.0, "train", f"pool-{i}")
    assert len({series[-1] for series in counts.values}) == m.MAX_POOLS + 1
    assert spreads(counts.values)[m.TURN_SECONDS, "train", "other"].count == 1000 - m.MAX_POOLS


@pytest.mark.parametrize(
    ("reason", "unseen"),
    [
        ("stalled: no token of any of its 3 calls for 9.1 s", 9.1), ("stalled: no token of any of its 1 calls for 12.0 s", 12.0),
        ("missed pings", 2.0), ("does not answer", 2.0), ("killed by SIGKILL", 0.0), ("actor died: gone for 3.0 s", 0.0),
    ],
)  # fmt: skip
def test_how_long_nothing_came_is_known_where_the_reason_tells(reason: str, unseen: float):
    assert unseen_s(reason, silence_s=2.0) == unseen
    assert loss_of(reason) in LOSSES


# -- published ----------------------------------------------------------------------------------------------------


class Told:
    """One of Ray's metrics, as it was told."""

    every: dict[str, Told]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]):
        self.tag_keys, self.values, self.times = tag_keys, {}, 0
        self.every[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> Told:
        return self

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys) - {"run"}
        self.values[tuple(tags.values())], self.times = value, self.times + 1

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        self.values[tuple(tags.values())] = self.values.get(tuple(tags.values()), 0) + value

    _record = set


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[str, Told]:
    from ray.util import metrics

    made: dict[str, Told] = {}
    monkeypatch.setattr(Told, "every", made, raising=False)
    for kind in ("Counter", "Gauge"):
        monkeypatch.setattr(metrics, kind, Told)
    return made


def test_buckets_are_published_as_prometheus_has_them_each_time_for_ray_forgets_them(told: dict[str, Told]):
    totals, publisher = Totals(), Publisher("run")
    publisher.publish(totals)
    buckets, times = told["rollout_ft_turn_seconds_bucket"], told["rollout_ft_turn_seconds_bucket"].times
    assert set(buckets.values.values()) == {0}
    for seconds in (0.3, 0.4, 3.0, 9999.0):
        totals.counts.observe(m.TURN_SECONDS, seconds, *MINE)
    publisher.publish(totals)
    assert [buckets.values[le, *MINE] for le in ("0.25", "0.5", "2", "4", "1200", "+Inf")] == [0, 2, 2, 3, 3, 4]
    assert told["rollout_ft_turn_seconds_count"].values[MINE] == 4
    assert told["rollout_ft_turn_seconds_sum"].values[MINE] == pytest.approx(10002.7)
    publisher.publish(totals)
    assert buckets.times == 3 * times


def test_what_ray_is_told_in_deltas_adds_up_to_the_totals(told: dict[str, Told]):
    totals, publisher = Totals(), Publisher("run")
    for _ in range(3):
        totals.counts.add(m.TURNS_COMMITTED, *MINE, by=2)
        publisher.publish(totals)
        publisher.publish(totals)
    assert told["rollout_ft_turns_committed"].values[MINE] == 6
    assert told["rollout_ft_turns_committed"].values["eval", "default"] == 0
