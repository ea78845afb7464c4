"""The memory of recent events, for a reader that comes again and again; and what is made of them about recoveries."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.telemetry.recent import KEPT, Recent
from rollout_ft.telemetry.recoveries import KEPT as LOSSES
from rollout_ft.telemetry.recoveries import Recoveries
from rollout_ft.types import JSON

names = st.sampled_from(["trial.opened", "session.moved", "engine.dead", "view.opened"])
batches = st.lists(st.lists(names, max_size=5), max_size=12)


def numbered(batch: list[str], first: int) -> list[JSON]:
    return [{"event": name, "time": float(first + i), "n": first + i} for i, name in enumerate(batch)]


def of_trials(event: JSON) -> bool:
    return event["event"].startswith(("trial.", "session."))


@given(batches, st.integers(1, 4))
def test_a_reader_that_comes_again_gets_every_event_once_and_in_order(told: list[list[str]], limit: int):
    recent, read, cursor, count = Recent("00000001"), list[int](), "00000001-0", 0
    for batch in told:
        recent.add(numbered(batch, count))
        count += len(batch)
        answer = recent.since(cursor, limit)
        assert len(answer["events"]) <= limit
        read += [event["n"] for event in answer["events"]]
        cursor = answer["next"]
    while (answer := recent.since(cursor, limit))["events"]:
        read += [event["n"] for event in answer["events"]]
        cursor = answer["next"]
    assert read == list(range(count))
    assert not answer["missed"]


@given(batches, st.integers(1, 4))
def test_who_wants_the_newest_gets_them_and_is_told_when_others_were_left_out(told: list[list[str]], limit: int):
    recent, cursor, count = Recent("00000001"), "00000001-0", 0
    for batch in told:
        recent.add(numbered(batch, count))
        count += len(batch)
        answer = recent.since(cursor, limit, newest=True)
        new = numbered(batch, count - len(batch))
        assert len(answer["events"]) == min(len(new), limit)
        assert answer["events"] == sorted(answer["events"], key=lambda event: event["n"])
        for kind in (True, False):
            told_of, new_of = ([e for e in some if of_trials(e) is kind] for some in (answer["events"], new))
            assert told_of == new_of[len(new_of) - len(told_of) :]
        assert answer["missed"] == (len(batch) > limit)
        cursor = answer["next"]
    assert recent.since(cursor, limit, newest=True)["events"] == []


@given(st.lists(names, max_size=40), st.integers(1, 12), st.booleans())
def test_an_event_of_the_run_is_never_pushed_out_by_events_of_trials(told: list[str], limit: int, knows: bool):
    recent = Recent("00000001")
    recent.add(numbered(told, 0))
    answer = recent.since("00000001-0" if knows else "", limit, newest=True)
    happened, shown = ([e for e in some if not of_trials(e)] for some in (numbered(told, 0), answer["events"]))
    assert happened[-(limit - limit // 2) :] == shown[-(limit - limit // 2) :]
    assert len(answer["events"]) == min(limit, len(told))


def test_thousands_of_trials_do_not_push_out_why_an_engine_was_lost():
    recent = Recent("00000001")
    recent.add(numbered(["engine.dead"], 0))
    recent.add(numbered(["trial.opened"] * (3 * KEPT), 1))
    kept = recent.since("", 3 * KEPT)["events"]
    assert (kept[0]["event"], len(kept)) == ("engine.dead", KEPT + 1)


def test_a_reader_that_comes_too_late_is_told_that_something_is_missing():
    recent = Recent("00000001")
    recent.add(numbered(["trial.opened"] * (KEPT + 1), 0))
    assert recent.since("00000001-0", 10)["missed"]
    assert not recent.since("00000001-1", 10)["missed"]


def test_a_cursor_of_another_supervisor_gets_the_newest_and_is_told_so():
    recent = Recent("00000002")
    recent.add(numbered(["engine.dead"] * 5, 0))
    answer = recent.since("00000001-3", 2)
    assert ([event["n"] for event in answer["events"]], answer["missed"], answer["next"]) == ([3, 4], True, "00000002-5")
    assert recent.since("", 2)["missed"] is False
    assert recent.since(answer["next"], 2) == {"events": [], "next": "00000002-5", "missed": False}


def dead(engine: str, incarnation: int, time: float) -> JSON:
    return {"event": "engine.dead", "engine": engine, "incarnation": incarnation, "time": time, "reason": "killed by SIGKILL"}


def moved(sid: str, source: str, time: float, epoch: int = 2) -> JSON:
    return {"event": "session.moved", "session": sid, "source_engine": source, "engine": "e9", "time": time, "epoch": epoch}


def resumed(sid: str, seconds: float, time: float, epoch: int = 2) -> JSON:
    return {"event": "session.resumed", "session": sid, "engine": "e9", "seconds": seconds, "time": time, "epoch": epoch}


def test_a_recovery_has_the_sessions_that_moved_since_and_those_that_go_on():
    recoveries = Recoveries()
    recoveries.add([dead("e1", 1, 10.0)])
    # another actor's events of the same second come first
    recoveries.add([resumed("a~1", 0.5, 11.0), moved("a~1", "e1", 10.5), moved("b~1", "e1", 10.6), moved("c~1", "", 10.7)])
    recoveries.add([resumed("b~1", 2.5, 13.0), resumed("z~1", 9.0, 13.0)])
    recoveries.add([{"event": "engine.up", "engine": "e1", "incarnation": 1, "time": 13.0, "state": "healthy"}])
    (told,) = recoveries.describe()
    assert (told["moved"], told["resumed"], told["slowest_s"], told["replaced_s"]) == (2, 2, 2.5, None)
    recoveries.add([{"event": "engine.up", "engine": "e1", "incarnation": 2, "time": 18.0, "state": "healthy"}])
    assert recoveries.describe()[0]["replaced_s"] == 8.0


@pytest.mark.parametrize("together", [True, False])
def test_a_next_token_is_counted_though_the_clock_of_its_engine_is_behind(together: bool):
    recoveries = Recoveries()
    recoveries.add([dead("e1", 1, 10.0)])
    early = [resumed("a~1", 0.5, 9.9), resumed("b~1", 0.5, 9.9), resumed("b~1", 0.5, 9.9, epoch=3)]
    after = [moved("a~1", "e1", 10.4), moved("b~1", "e1", 10.4), moved("b~1", "", 10.5, epoch=3)]
    for events in ([*early, *after],) if together else (early, after):
        recoveries.add(events)
    (told,) = recoveries.describe()
    assert (told["moved"], told["resumed"]) == (2, 2)


def test_the_newest_recovery_is_first_and_old_ones_are_forgotten():
    recoveries = Recoveries()
    recoveries.add([dead("e1", i, float(i)) for i in range(LOSSES + 5)])
    told = recoveries.describe()
    assert (len(told), told[0]["incarnation"], told[-1]["incarnation"]) == (LOSSES, LOSSES + 4, 5)


def test_an_engine_that_is_not_replaced_is_told_as_retired():
    recoveries = Recoveries()
    recoveries.add([dead("e1", 1, 1.0), {"event": "engine.retired", "engine": "e1", "time": 1.0, "reason": "too often"}])
    assert recoveries.describe()[0]["retired"]
