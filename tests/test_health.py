"""The states of an engine, and above all the transition that does not exist."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.fleet.health import Event, Health, State, step

few = settings(max_examples=50, deadline=None)

EVENTS = st.lists(st.tuples(st.sampled_from(Event), st.integers(-1, 1)), max_size=40)


def after(*events: Event, health: Health | None = None) -> Health:
    """The health after events that are all about the incarnation of their time; a start is one of the next."""
    health = health or Health()
    for event in events:
        health = step(health, event, incarnation=health.incarnation + (event is Event.STARTING))
    return health


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], State.RESTARTING),
        ([Event.UP], State.STALE),
        ([Event.UP, Event.WEIGHTS_LOADED], State.HEALTHY),
        ([Event.UP, Event.WEIGHTS_LOADED, Event.DOUBT], State.SUSPECT),
        ([Event.UP, Event.WEIGHTS_LOADED, Event.DOUBT, Event.PROGRESS], State.HEALTHY),
        ([Event.UP, Event.WEIGHTS_LOADED, Event.DOUBT, Event.LOST], State.DEAD),
        ([Event.LOST], State.DEAD),
        ([Event.LOST, Event.UP], State.DEAD),
        ([Event.LOST, Event.PROGRESS], State.DEAD),
        ([Event.LOST, Event.WEIGHTS_LOADED], State.DEAD),
        ([Event.LOST, Event.STARTING], State.RESTARTING),
        ([Event.LOST, Event.STARTING, Event.WEIGHTS_LOADED], State.RESTARTING),
        ([Event.LOST, Event.STARTING, Event.UP, Event.PROGRESS], State.STALE),
        ([Event.LOST, Event.STARTING, Event.UP, Event.WEIGHTS_LOADED], State.HEALTHY),
        ([Event.UP, Event.WEIGHTS_LOADED, Event.STARTING], State.HEALTHY),
        ([Event.RETIRE, Event.STARTING], State.RETIRED),
    ],
)
def test_events_lead_to_states(events: list[Event], state: State):
    assert after(*events).state is state


def test_healthy_and_suspect_serve_and_nothing_else_does():
    assert [s for s in State if Health(s).serves] == [State.HEALTHY, State.SUSPECT]


@few
@given(EVENTS, EVENTS)
def test_from_dead_it_serves_again_only_after_start_up_and_loaded_weights_in_this_order(
    before: list[tuple[Event, int]], then: list[tuple[Event, int]]
):
    health = Health()
    for event, offset in before:
        health = step(health, event, incarnation=health.incarnation + offset)
    health = step(health, Event.LOST, incarnation=health.incarnation)
    missing = [Event.STARTING, Event.UP, Event.WEIGHTS_LOADED]
    for event, offset in then:
        health = step(health, event, incarnation=health.incarnation + offset)
        if missing and event is missing[0]:
            missing.pop(0)
        assert not health.serves or not missing


@few
@given(EVENTS)
def test_the_shortest_way_back_is_open_to_every_engine_that_is_dead(events: list[tuple[Event, int]]):
    health = Health()
    for event, offset in events:
        health = step(health, event, incarnation=health.incarnation + offset)
    if step(health, Event.LOST, incarnation=health.incarnation).state is State.DEAD:
        assert after(Event.LOST, Event.STARTING, Event.UP, Event.WEIGHTS_LOADED, health=health).serves


@few
@given(EVENTS, st.sampled_from(Event), st.integers(1, 3))
def test_a_report_about_an_old_incarnation_changes_nothing(events: list[tuple[Event, int]], late: Event, age: int):
    health = Health(incarnation=5)
    for event, offset in events:
        health = step(health, event, incarnation=health.incarnation + max(0, offset))
    assert step(health, late, incarnation=health.incarnation - age, reason="late") == health


@few
@given(EVENTS, EVENTS)
def test_retired_is_final(before: list[tuple[Event, int]], then: list[tuple[Event, int]]):
    health = Health()
    for event, offset in before:
        health = step(health, event, incarnation=health.incarnation + offset)
    retired = step(health, Event.RETIRE, incarnation=health.incarnation)
    assert retired.state is State.RETIRED
    for event, offset in then:
        health = step(retired, event, incarnation=retired.incarnation + offset)
        assert health.state is State.RETIRED


def test_the_reason_of_a_loss_stays_while_the_engine_restarts():
    lost = step(after(Event.UP), Event.LOST, incarnation=1, reason="exited: -9")
    assert after(Event.STARTING, Event.UP, health=lost).reason == "exited: -9"
