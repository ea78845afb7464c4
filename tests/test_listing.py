"""Lists of trials: what passes their filters, in which order, and that pages neither miss nor repeat."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.engine.gate import Closed
from rollout_ft.fleet.health import State
from rollout_ft.fleet.listing import AT_ENGINE, STATES, WAITS, Around, Query, Rank, Row, counts, select
from rollout_ft.types import JSON, Outcome, session_id

OUTCOMES = ["", *(each.value for each in Outcome)]
ENGINES = {"engine-0": "healthy", "engine-1": "dead"}
rows = st.builds(
    Row, trial_id=st.from_regex(r"[a-c][0-9]{1,2}", fullmatch=True), attempt=st.integers(1, 3), entries=st.integers(1, 9),
    released=st.booleans(), damaged=st.booleans(), known=st.just(True), task_id=st.sampled_from(["", "T1", "t2"]),
    group_id=st.sampled_from(["", "g1", "g2"]), outcome=st.sampled_from(OUTCOMES),
)  # fmt: skip
trials = st.lists(rows, unique_by=lambda row: row.trial_id)
queries = st.builds(
    Query, state=st.sampled_from(["", *STATES]), outcome=st.sampled_from(OUTCOMES), group_id=st.sampled_from(["", "g1"]),
    task_id=st.sampled_from(["", "t2"]), search=st.sampled_from(["", "A1", "t"]), attention=st.booleans(),
)  # fmt: skip


def turn(quiet_s: float, waits_for: str = "tokens") -> JSON:
    return {"quiet_s": quiet_s, "waits_for": waits_for}


def around_of(found: list[Row]) -> Around:
    """Every second one is held, every fourth by an engine that is dead."""
    held = [session_id(row.trial_id, row.attempt) for row in found[::2]]
    return Around({sid: f"engine-{i % 2}" for i, sid in enumerate(held)}, ENGINES, {held[0]: turn(40)} if held else {})


def ids(found: list[Row], query: Query, around: Around) -> list[str]:
    return [row.trial_id for row, _, _ in select(found, query, around).rows]


def in_pages(found: list[Row], query: Query, around: Around, limit: int) -> list[str]:
    told, after = list[str](), ""
    while True:
        page = select(found, replace(query, after=after, limit=limit), around)
        told += [row.trial_id for row, _, _ in page.rows]
        assert len(page.rows) <= limit
        if not page.next:
            return told
        after = page.next


@given(trials, queries, st.integers(1, 5))
def test_pages_put_together_are_the_list_without_a_limit(found: list[Row], query: Query, limit: int):
    around = around_of(found)
    whole = ids(found, query, around)
    assert in_pages(found, query, around, limit) == whole
    assert select(found, replace(query, limit=limit), around).total == len(whole) == select(found, query, around).total


@given(trials, trials, st.integers(1, 5))
def test_what_comes_between_two_pages_makes_no_other_trial_be_missed_or_told_twice(first: list[Row], more: list[Row], limit: int):
    """The order is that of ids, as a trainer has it that collects a group."""
    page = select(first, Query(limit=limit), Around())
    told = [row.trial_id for row, _, _ in page.rows]
    now = {row.trial_id: row for row in (*more, *first)}
    if page.next:
        told += ids(list(now.values()), Query(after=page.next), Around())
    assert len(told) == len(set(told))
    assert {row.trial_id for row in first} <= set(told)


@given(trials, queries)
def test_a_filter_lets_through_what_it_names_and_nothing_else(found: list[Row], query: Query):
    around = around_of(found)
    passed = set(ids(found, query, around))
    for row in found:
        state = around.state(row)
        names = (row.trial_id, row.task_id, row.group_id)
        fits = query.state in ("", state) and query.outcome in ("", row.outcome) and query.group_id in ("", row.group_id)
        fits = fits and query.task_id in ("", row.task_id) and any(query.search.lower() in name.lower() for name in names)
        assert (row.trial_id in passed) == fits


@given(trials)
def test_what_needs_attention_is_never_behind_what_does_not(found: list[Row]):
    ranks = [rank for _, _, rank in select(found, Query(attention=True), around_of(found)).rows]
    assert ranks == sorted(ranks)


@given(trials)
def test_everything_that_is_wrong_with_a_trial_says_what_to_do(found: list[Row]):
    around = around_of(found)
    for row, _, rank in select(found, Query(), around).rows:
        why, remedy = around.words(row, rank)
        assert bool(why) == bool(remedy) == (rank < Rank.RUNS)


@given(trials)
def test_the_counts_are_those_of_all_trials(found: list[Row]):
    told = counts(found, around_of(found), {}, 0)
    assert told["known"] == sum(told["states"].values()) == len(found)
    assert sum(told["outcomes"].values()) == sum(bool(row.outcome) for row in found)
    assert told["restarts"] == sum(row.attempt - 1 for row in found)


RUNNING = Row("t", 1, 3)
HELD = {"t~1": "engine-0"}


@pytest.mark.parametrize(("row", "around", "rank"), [
    (replace(RUNNING, damaged=True), Around(HELD, ENGINES), Rank.DAMAGED),
    (RUNNING, Around(HELD, ENGINES, {"t~1": turn(31)}), Rank.STUCK),
    (RUNNING, Around(HELD, ENGINES, {"t~1": turn(29)}), Rank.RUNS),
    (RUNNING, Around(HELD, ENGINES, {"t~1": turn(6, "paused")}), Rank.WAITS),
    (RUNNING, Around(HELD, ENGINES, {"t~1": turn(4, "paused")}), Rank.RUNS),
    (replace(RUNNING, outcome="infra_exhausted", released=True), Around(), Rank.LOST),
    (replace(RUNNING, attempt=2), Around({"t~2": "engine-0"}, ENGINES), Rank.RESTARTED),
    (replace(RUNNING, outcome="agent_failed"), Around(), Rank.FAILED),
    (RUNNING, Around({"t~1": "engine-1"}, ENGINES), Rank.HOMELESS),
    (RUNNING, Around({"t~1": "engine-9"}, ENGINES), Rank.HOMELESS),
    (RUNNING, Around(), Rank.IDLE),
    (RUNNING, Around(HELD, ENGINES), Rank.RUNS),
    (replace(RUNNING, outcome="completed"), Around(HELD, ENGINES), Rank.DONE),
])  # fmt: skip
def test_what_a_trial_needs_depends_on_its_state_its_engine_and_its_turn(row: Row, around: Around, rank: Rank):
    assert around.rank(row, around.state(row)) is rank


def test_everything_that_a_turn_can_wait_for_has_words():
    assert set(WAITS) == {each.value for each in Closed} | AT_ENGINE | {"admission", "retry"}
    assert all(what and remedy for what, remedy in WAITS.values())
    assert set(ENGINES.values()) <= {each.value for each in State}
