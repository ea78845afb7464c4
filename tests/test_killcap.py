"""How many engines are replaced on suspicion, and how soon one is started again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.fleet.killcap import KillCap, Verdict
from rollout_ft.fleet.restarts import MAX_PAUSE_S, Restarts

many = settings(max_examples=300, deadline=None)
ASKED = st.lists(st.tuples(st.integers(0, 32), st.integers(1, 3), st.floats(0, 40)), max_size=80)


@pytest.mark.parametrize(("fleet", "share", "killed"), [(1, 0.25, 1), (3, 0.25, 1), (8, 0.25, 2), (33, 0.25, 8), (4, 1.0, 4)])
def test_when_all_are_in_trouble_at_once_a_share_of_them_is_killed_and_at_least_one(fleet: int, share: float, killed: int):
    cap = KillCap(share, 60)
    assert sum(cap.judge((f"e{i}", 1), fleet, 0.0).kill for i in range(fleet)) == killed


def test_what_was_spared_is_decided_again_when_the_window_has_moved_on():
    cap = KillCap(0.25, 60)
    assert [cap.judge((f"e{i}", 1), 4, 0.0).kill for i in range(4)] == [True, False, False, False]
    assert not cap.judge(("e1", 1), 4, 59.9).kill
    assert cap.judge(("e1", 1), 4, 60.0).kill


def test_who_was_allowed_is_allowed_when_it_asks_again_and_counts_once():
    cap = KillCap(0.5, 60)
    assert [cap.judge(("e0", 1), 4, float(t)).kill for t in range(5)] == [True] * 5
    assert cap.judge(("e1", 1), 4, 5.0).kill
    assert not cap.judge(("e2", 1), 4, 6.0).kill


def test_a_spared_engine_is_news_once():
    cap = KillCap(0.25, 60)
    cap.judge(("e0", 1), 4, 0.0)
    assert [cap.judge(("e1", 1), 4, float(t)) for t in (1, 2)] == [Verdict(False, True), Verdict(False, False)]


@many
@given(ASKED, st.integers(1, 40), st.floats(0.01, 1.0))
def test_within_any_window_no_more_than_the_share_is_killed(asked: list[tuple[int, int, float]], fleet: int, share: float):
    cap, now, kills = KillCap(share, 60), 0.0, dict[tuple[int, int], float]()
    for engine, incarnation, later_s in asked:
        now += later_s
        if cap.judge((f"e{engine}", incarnation), fleet, now).kill and now - kills.get((engine, incarnation), -60.0) >= 60:
            kills[(engine, incarnation)] = now
        assert sum(now - at < 60 for at in kills.values()) <= max(1, share * fleet)


def test_an_engine_that_dies_is_started_again_at_once_and_one_that_cannot_start_later_and_later():
    restarts, pauses = Restarts().died(0, 3600), list[float]()
    assert restarts.pause_s == 0
    for _ in range(9):
        restarts = restarts.failed()
        pauses.append(restarts.pause_s)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert restarts.up().pause_s == 0


def test_an_outage_of_a_day_retires_no_engine():
    restarts, now, most = Restarts(), 0.0, 0
    while now < 86400:
        restarts = restarts.failed().died(now, 3600)
        most = max(most, restarts.count)
        now += restarts.pause_s
    assert most < 100


@many
@given(st.lists(st.floats(60, 1e5), max_size=300))
def test_a_month_of_replacements_keeps_no_more_than_a_window_of_them(apart_s: list[float]):
    restarts, now, times = Restarts(), 0.0, list[float]()
    for later_s in apart_s:
        now += later_s
        times.append(now)
        restarts = restarts.died(now, 3600)
        assert restarts.count == sum(now - at < 3600 for at in times) <= 61


@many
@given(st.integers(0, 10_000))
def test_no_pause_is_longer_than_the_longest(failures: int):
    assert 0 <= Restarts(failures=failures).pause_s <= MAX_PAUSE_S
