"""The judge of recorded histories finds each kind of fault that it is there to find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.checkpoint.log import Entry
from rollout_ft.testing.history import History, Received, Written, judge

STORES = ["s1", "s2"]


def bodies(log: Sequence[Entry]) -> dict[str, bytes]:
    return {e.key.rpartition("/")[2]: b"reply " + e.payload for e in log if e.kind == "turn"}


def turn(n: int, attempt: int = 1, epoch: int = 1, trial: str = "t") -> Written:
    return Written(trial, attempt, epoch, Entry("turn", f"1/k{n}", b"%d" % n))


def received(n: int, trial: str = "t") -> Received:
    return Received(trial, 1, f"k{n}", b"reply %d" % n)


OPEN = Written("t", 1, 1, Entry("open", "open/1", b""))
LOG = [OPEN, turn(0), turn(1), Written("t", 1, 2), turn(2, epoch=2)]
GOOD = History([received(0), received(1), received(1), received(2)], {"s1": LOG, "s2": LOG, "gone": LOG[:3]}, STORES)


def complaints(history: History) -> str:
    return "\n".join(judge(history, bodies))


def test_a_history_in_which_all_is_well_has_no_complaint():
    assert judge(GOOD, bodies) == []


def test_a_turn_that_was_received_and_is_in_no_log_is_found():
    assert "k7, received in attempt 1, is there 0 times" in complaints(replace(GOOD, received=[received(7)]))


def test_a_turn_that_one_replica_lost_is_found():
    said = complaints(replace(GOOD, written={"s1": LOG, "s2": LOG[:-1]}))
    assert "s1 and s2 have different logs" in said
    assert "in s2: turn k2" in said


def test_a_turn_that_was_committed_twice_is_found():
    twice = [*LOG, turn(2, epoch=2)]
    assert "turn 1/k2 is there 2 times" in complaints(replace(GOOD, written=dict.fromkeys(STORES, twice)))


def test_a_turn_under_another_lineage_counts_as_a_second_time():
    again = [*LOG, Written("t", 1, 2, Entry("turn", "2/k2", b"2"))]
    assert "k2, received in attempt 1, is there 2 times" in complaints(replace(GOOD, written=dict.fromkeys(STORES, again)))


def test_a_byte_that_differs_is_found():
    assert "was received as b'reply x'" in complaints(replace(GOOD, received=[replace(received(1), body=b"reply x")]))


@pytest.mark.parametrize("late", [turn(3, epoch=1), turn(3, attempt=0, epoch=9)])
def test_a_commit_of_the_past_is_found_in_any_store(late: Written):
    said = complaints(replace(GOOD, written={**GOOD.written, "gone": [*LOG, late]}))
    assert f"gone: t: turn 1/k3 was taken from {(late.attempt, late.owner_epoch)} after (1, 2)" in said


def test_a_fence_that_comes_late_is_no_commit():
    assert judge(replace(GOOD, written={**GOOD.written, "gone": [*LOG, Written("t", 1, 1)]}), bodies) == []


def test_no_store_at_all_is_a_complaint():
    assert "no store is left" in complaints(History([], {}, []))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, len(LOG) - 1), st.sampled_from(STORES), st.sampled_from(["drop", "double", "change"]))
def test_no_change_of_a_received_turn_in_a_replica_goes_unseen(at: int, store: str, what: str):
    entry = LOG[at].entry
    if entry is None:
        return
    changed = {"drop": [], "double": [LOG[at]] * 2, "change": [replace(LOG[at], entry=replace(entry, payload=b"other"))]}[what]
    assert judge(replace(GOOD, written={**GOOD.written, store: [*LOG[:at], *changed, *LOG[at + 1 :]]}), bodies)
