"""Which engine takes a session."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.fleet.placement import Candidate, place

few = settings(max_examples=50, deadline=None)

NAMES = ["e0", "e1", "e2", "e3"]
FLEETS = st.lists(st.builds(Candidate, st.sampled_from(NAMES), st.booleans(), st.integers(0, 3)), unique_by=lambda c: c.engine_id)
SOME = st.sets(st.sampled_from(NAMES))


@pytest.mark.parametrize(
    ("prefer", "exclude", "expected"),
    [
        ("", [], "e1"),
        ("e0", [], "e0"),
        ("e0", ["e0"], "e1"),
        ("e2", [], "e1"),
        ("unknown", [], "e1"),
        ("", ["e1"], "e3"),
        ("", ["e0", "e1", "e3"], None),
    ],
)
def test_a_session_stays_where_it_was_or_goes_where_there_is_least(prefer: str, exclude: list[str], expected: str | None):
    fleet = [Candidate("e3", True, 2), Candidate("e0", True, 3), Candidate("e1", True, 1), Candidate("e2", False, 0)]
    assert place(fleet, prefer=prefer, exclude=exclude) == expected


def test_an_empty_fleet_has_no_place():
    assert place([]) is None


@few
@given(FLEETS, st.sampled_from(["", *NAMES]), SOME)
def test_a_place_serves_and_is_not_excluded(fleet: list[Candidate], prefer: str, exclude: set[str]):
    chosen = place(fleet, prefer=prefer, exclude=exclude)
    fit = {c.engine_id for c in fleet if c.serves} - exclude
    assert chosen in fit if fit else chosen is None


@few
@given(FLEETS, SOME)
def test_without_a_preference_no_other_engine_has_fewer_sessions(fleet: list[Candidate], exclude: set[str]):
    chosen = place(fleet, exclude=exclude)
    fit = {c.engine_id: c.sessions for c in fleet if c.serves and c.engine_id not in exclude}
    assert chosen is None or fit[chosen] == min(fit.values())


@few
@given(FLEETS.flatmap(lambda fleet: st.tuples(st.just(fleet), st.permutations(fleet))))
def test_the_order_of_the_candidates_does_not_matter(fleets: tuple[list[Candidate], list[Candidate]]):
    assert place(fleets[0]) == place(fleets[1])
