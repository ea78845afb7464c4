"""What is held against an engine, and when that is enough."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.engine.canary import PARTS, Probe, due
from rollout_ft.engine.evidence import Doubt, Evidence, of_status, weigh
from rollout_ft.engine.gate import Closed

many = settings(max_examples=300, deadline=None)
PIECES = st.lists(st.tuples(st.sampled_from(Evidence), st.booleans()), max_size=30)
E = Evidence


def after(*evidence: Evidence, paused: bool = False) -> Doubt:
    doubt = Doubt()
    for each in evidence:
        doubt = weigh(doubt, each, paused=paused)
    return doubt


@pytest.mark.parametrize(
    ("evidence", "lost"),
    [
        ([E.EXITED], True),
        ([E.STALLED], True),
        ([E.STALLED, E.MOVED], False),
        ([E.EXITED, E.MOVED], True),
        ([E.PROBE_MISSED], False),
        ([E.PROBE_MISSED] * 3, True),
        ([E.PROBE_MISSED, E.PROBE_MISSED, E.PROBE_ANSWERED, E.PROBE_MISSED], False),
        ([E.BROKEN, E.FAILED, E.BROKEN], True),
        ([E.BROKEN, E.PROBE_ANSWERED, E.BROKEN, E.PROBE_ANSWERED, E.FAILED], True),
        ([E.BROKEN, E.BROKEN, E.MOVED, E.BROKEN, E.BROKEN], False),
        ([E.BROKEN, E.BROKEN, E.PROBE_MISSED, E.PROBE_MISSED], False),
        ([E.STALLED_ALONE] * 100, False),
        ([E.REFUSED] * 100, False),
    ],
)
def test_an_engine_is_lost_by_its_end_a_standstill_or_three_failures_of_one_kind_in_a_row(evidence: list[Evidence], lost: bool):
    assert after(*evidence).lost(3) is lost


@pytest.mark.parametrize("status", [None, 400, 404, 408, 422, 429, 503])
def test_what_an_engine_refuses_on_purpose_says_nothing(status: int | None):
    assert of_status(status) is E.REFUSED


@pytest.mark.parametrize("status", [500, 502, 504])
def test_an_answer_that_is_a_fault_is_a_failed_request(status: int):
    assert of_status(status) is E.FAILED


@many
@given(PIECES)
def test_one_probe_alone_never_loses_an_engine(pieces: list[tuple[Evidence, bool]]):
    doubt = Doubt()
    for each, paused in pieces:
        before, doubt = doubt, weigh(doubt, each, paused=paused)
        if each is E.PROBE_MISSED and doubt.lost(3) and not before.lost(3):
            assert before.probes == 2


@many
@given(PIECES)
def test_a_paused_engine_is_lost_by_its_end_alone(pieces: list[tuple[Evidence, bool]]):
    doubt = Doubt()
    for each, _ in pieces:
        doubt = weigh(doubt, each, paused=True)
    assert doubt.lost(2) is any(each is E.EXITED for each, _ in pieces)


@many
@given(PIECES)
def test_a_token_clears_everything_but_the_end_of_the_process(pieces: list[tuple[Evidence, bool]]):
    doubt = Doubt()
    for each, paused in pieces:
        doubt = weigh(doubt, each, paused=paused)
    assert weigh(doubt, E.MOVED) == Doubt(exited=any(each is E.EXITED for each, _ in pieces))


@many
@given(PIECES, st.integers(1, 5))
def test_answered_probes_never_hide_failing_requests(pieces: list[tuple[Evidence, bool]], dead_after: int):
    doubt, plain = Doubt(), Doubt()
    for each, paused in pieces:
        doubt = weigh(weigh(doubt, each, paused=paused), E.PROBE_ANSWERED)
        plain = weigh(plain, each, paused=paused)
    assert doubt.requests == plain.requests
    assert not (plain.requests >= dead_after) or doubt.lost(dead_after)


CLOSED = st.sets(st.sampled_from(Closed)).map(frozenset)
IDLE_S = 10.0


def probe(idle_s: float, asked_s: float, closed: frozenset[Closed] = frozenset(), *, missed: bool = False) -> Probe | None:
    return due(idle_s=idle_s, asked_s=asked_s, canary_idle_s=IDLE_S, closed=closed, missed=missed)


@pytest.mark.parametrize(
    ("idle_s", "asked_s", "missed", "expected"),
    [
        (9.0, 99.0, False, None),
        (11.0, 9.0, False, None),
        (11.0, 11.0, False, Probe.GENERATE),
        (0.0, 99.0, False, None),
        (0.0, 99.0, True, None),
        (1.0, 2.1, True, Probe.GENERATE),
        (99.0, 1.9, True, None),
    ],
)
def test_an_idle_engine_is_asked_and_sooner_after_a_miss(idle_s: float, asked_s: float, missed: bool, expected: Probe | None):
    assert probe(idle_s, asked_s, missed=missed) is expected


@many
@given(st.floats(0, 100), st.floats(0, 100), CLOSED, st.booleans())
def test_nothing_is_generated_on_an_engine_that_is_closed_or_at_work(
    idle_s: float, asked_s: float, closed: frozenset[Closed], missed: bool
):
    found = probe(idle_s, asked_s, closed, missed=missed)
    assert found is not Probe.GENERATE or (not closed and idle_s > 0)
    assert found is not Probe.INFO or closed == {Closed.PAUSED}
    assert found is None or asked_s >= IDLE_S / PARTS


def test_a_paused_engine_is_asked_what_its_scheduler_answers_even_with_calls_that_wait():
    assert probe(0, 11, frozenset({Closed.PAUSED})) is Probe.INFO
