"""What readers of a run's events are told, whichever of their calls got through."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis.strategies import booleans, integers, lists, sampled_from

from rollout_ft.telemetry.events import MAX_BUFFERED, Events
from rollout_ft.telemetry.feed import Feed


def emitted(events: Events, count: int) -> None:
    for _ in range(count):
        events.emit("engine.up")


def told(feed: Feed, events: Events, *, heard: bool = True) -> list[int]:
    """One collection; without `heard` its answer is lost."""
    answer = events.unheard(feed.delivered("a"))
    return [event["seq"] for event in feed.tell(answer)] if heard else []


@given(lists(booleans()))
def test_each_event_is_collected_once_whichever_answers_are_lost(answers: list[bool]):
    feed, events = Feed(), Events("a")
    found: list[int] = []
    for heard in [*answers, True]:
        emitted(events, 2)
        found += told(feed, events, heard=heard)
    assert found == list(range(1, 2 * len(answers) + 3))


@given(lists(integers(0, 5)), lists(booleans()), integers(1, 4))
def test_a_reader_has_every_event_once_whichever_answers_are_lost(emits: list[int], answers: list[bool], most: int):
    feed, events, cursor = Feed(), Events("a"), ""
    found: list[int] = []
    for count, heard in zip(emits, [*answers, *[True] * len(emits)], strict=False):
        emitted(events, count)
        told(feed, events)
        news = feed.after(cursor, most)
        assert news.missed == 0
        if heard:
            found += [event["seq"] for event in news.events]
            cursor = news.cursor
    while (news := feed.after(cursor, most)).events:
        found += [event["seq"] for event in news.events]
        cursor = news.cursor
    assert found == list(range(1, sum(emits) + 1))


@given(lists(sampled_from(["emit", "collect", "read", "read in vain", "die"]), max_size=40))
def test_whenever_supervisors_die_the_owner_of_the_run_has_every_event_once(steps: list[str]):
    feed, events, cursor = Feed(), Events("a"), ""
    found: dict[int, None] = {}
    emits = 0
    for step in [*steps, "collect", "read"]:
        match step:
            case "emit":
                emitted(events, 1)
                emits += 1
            case "collect":
                told(feed, events)
            case "die":
                feed = Feed()
            case _:
                news = feed.after(cursor)
                if step == "read":
                    found |= dict.fromkeys(event["seq"] for event in news.events)
                    cursor = news.cursor
    assert list(found) == list(range(1, emits + 1))


def test_events_that_are_told_again_after_their_reader_was_replaced_are_new_to_the_next_one():
    events = Events("a")
    emitted(events, 3)
    assert told(Feed(), events) == told(Feed(), events) == [1, 2, 3]


def test_a_reader_that_comes_late_is_told_how_many_it_missed():
    feed, events = Feed(), Events("a")
    emitted(events, 1)
    told(feed, events)
    cursor = feed.after("").cursor
    for _ in range(2):
        emitted(events, MAX_BUFFERED)
        told(feed, events)
    news = feed.after(cursor)
    assert (news.missed, len(news.events)) == (MAX_BUFFERED, MAX_BUFFERED)


def test_the_cursor_of_another_feed_is_none():
    feed, events = Feed("one"), Events("a")
    emitted(events, 2)
    told(feed, events)
    for cursor in ("other:1", "one:x", "one:-1", "", ":", "one:99"):
        expected = [] if cursor == "one:99" else [1, 2]
        assert [event["seq"] for event in feed.after(cursor).events] == expected, cursor


def test_what_concerns_a_session_names_its_trial_and_attempt():
    events = Events("a")
    events.emit("session.moved", session="t-1~2", engine="engine-0")
    (event,) = events.take()
    assert (event["trial"], event["attempt"]) == ("t-1", 2)


def test_events_are_taken_once_by_a_reader_in_the_same_process():
    events = Events("a")
    emitted(events, 2)
    assert [len(events.take()), len(events.take())] == [2, 0]


def test_no_line_of_the_log_is_made_by_what_an_agent_said(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "rollout_ft")
    Events("a").emit("trial.restarted", trial="a", attempt=2, cause="\x1b[31mred\nengine.dead engine=engine-0\x85")
    assert [record.getMessage() for record in caplog.records] == [
        "trial.restarted trial=a attempt=2 cause=\\x1b[31mred\\nengine.dead engine=engine-0\\x85"
    ]
