"""Which weights a fleet has, where nobody tells."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.fleet.newest import Has, Newest


def fleet(*versions: str, paused: str = "") -> list[Has]:
    return [Has(f"e{i}", v, str(i) not in paused) for i, v in enumerate(versions)]


def found(*versions: str) -> Newest:
    newest = Newest(30)
    newest.among(fleet(*versions), 0)
    return newest


def test_engines_that_are_found_decide_among_themselves():
    assert found("5").version == "5"
    assert found("default", "5", "5").version == "5"


def test_a_version_that_arrives_is_the_fleets_however_few_have_it():
    newest = found("1", "1", "1")
    assert newest.arrived("2")
    assert not newest.among(fleet("2", "1", "1"), 1)
    assert newest.version == "2"


def test_a_version_that_was_there_before_does_not_arrive_again():
    newest = found("1", "1")
    newest.arrived("2")
    newest.arrived("3")
    assert not newest.arrived("2")
    assert newest.version == "3"


def test_what_an_engine_was_started_with_is_no_arrival():
    newest = found("7", "7", "7")
    newest.arrived("8")
    newest.among(fleet("default", "8", "8"), 1)
    assert newest.version == "8"
    assert not newest.arrived("default")


def test_versions_that_were_taken_back_hold_nothing_up_for_ever():
    newest = found("1", "1")
    newest.arrived("2")
    assert not newest.among(fleet("1", "1"), 10)
    assert not newest.among(fleet("1", "1"), 39)
    assert newest.among(fleet("1", "1"), 40)
    assert newest.version == "1"


def test_a_fleet_that_stands_still_is_not_one_without_its_version():
    newest = found("1", "1")
    newest.arrived("2")
    for now in range(10, 500, 10):
        assert not newest.among(fleet("2", "1", paused="01"), now)
    assert newest.version == "2"


def test_who_knows_may_say():
    newest = found("1", "1")
    newest.told("1b")
    newest.among(fleet("1", "1"), 1)
    assert newest.version == "1b"


VERSIONS = st.sampled_from(["1", "2", "3", "default"])


@given(
    st.lists(st.tuples(st.sampled_from(["arrived", "told", "look"]), VERSIONS, st.lists(st.tuples(VERSIONS, st.booleans()), max_size=4)))
)
def test_a_fleet_with_an_engine_that_is_ready_serves_within_the_grace(steps: list[tuple[str, str, list[tuple[str, bool]]]]):
    newest, now = Newest(30), 0.0
    for what, version, engines in steps:
        now += 7
        if what == "arrived":
            newest.arrived(version)
        elif what == "told":
            newest.told(version)
        newest.among([Has(str(i), v, r) for i, (v, r) in enumerate(engines)], now)
    last = fleet("default", "3")
    newest.among(last, now + 1)
    newest.among(last, now + 32)
    assert newest.version in ("default", "3")
