"""Which engine takes a session."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.fleet.placement import LEAST_SHARE, Candidate, place, share

few = settings(max_examples=300, deadline=None)

NAMES = ["e0", "e1", "e2", "e3"]
SHARES = st.sampled_from([LEAST_SHARE, 0.5, 1.0])
ONE = st.builds(Candidate, st.sampled_from(NAMES), st.booleans(), st.integers(0, 20), st.booleans(), st.booleans(), SHARES)
FLEETS = st.lists(ONE, unique_by=lambda c: c.engine_id)
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


def able(fleet: list[Candidate], exclude: set[str]) -> list[Candidate]:
    return [c for c in fleet if c.serves and not c.draining and c.engine_id not in exclude]


@few
@given(FLEETS, st.sampled_from(["", *NAMES]), SOME)
def test_a_place_serves_does_not_drain_and_is_not_excluded(fleet: list[Candidate], prefer: str, exclude: set[str]):
    chosen, fit = place(fleet, prefer=prefer, exclude=exclude), {c.engine_id for c in able(fleet, exclude)}
    assert chosen in fit if fit else chosen is None


@few
@given(FLEETS, st.sampled_from(["", *NAMES]), SOME)
def test_one_in_doubt_is_taken_only_when_no_other_is_there(fleet: list[Candidate], prefer: str, exclude: set[str]):
    chosen, fit = place(fleet, prefer=prefer, exclude=exclude), able(fleet, exclude)
    assert all(c.suspect for c in fit) or not next(c for c in fit if c.engine_id == chosen).suspect


@few
@given(FLEETS, SOME)
def test_without_a_preference_no_other_engine_has_fewer_sessions_for_its_share(fleet: list[Candidate], exclude: set[str]):
    chosen, fit = place(fleet, exclude=exclude), able(fleet, exclude)
    fit = [c for c in fit if not c.suspect] or fit
    loads = {c.engine_id: (c.sessions + 1) / c.share for c in fit}
    assert chosen is None or loads[chosen] == min(loads.values())


@few
@given(FLEETS, st.sampled_from(NAMES))
def test_a_session_stays_where_it_was_unless_that_engine_is_unfit(fleet: list[Candidate], prefer: str):
    stays = any(c.engine_id == prefer and c.serves and not c.draining and not c.suspect for c in fleet)
    assert not stays or place(fleet, prefer=prefer) == prefer


@few
@given(FLEETS.flatmap(lambda fleet: st.tuples(st.just(fleet), st.permutations(fleet))))
def test_the_order_of_the_candidates_does_not_matter(fleets: tuple[list[Candidate], list[Candidate]]):
    assert place(fleets[0]) == place(fleets[1])


@pytest.mark.parametrize(("up_s", "expected"), [(0.0, LEAST_SHARE), (1.0, LEAST_SHARE), (15.0, 0.5), (30.0, 1.0), (1e6, 1.0)])
def test_a_new_engines_share_grows_to_that_of_the_others(up_s: float, expected: float):
    assert share(up_s, 30.0) == expected


class Fleet:
    """Engines and sessions as the supervisor counts them: a session moves when it is asked for, and ends some day."""

    WARMUP_S = 30.0

    def __init__(self, engines: int):
        self.up = {f"engine-{i}": float("-inf") for i in range(engines)}
        self.at: dict[int, str] = {}
        self.now, self._next = 0.0, 0

    def loads(self) -> Counter[str]:
        return Counter({name: 0 for name in self.up} | Counter(self.at.values()))

    def choose(self, prefer: str = "") -> str:
        loads = self.loads()
        found = [Candidate(name, True, loads[name], share=share(self.now - at, self.WARMUP_S)) for name, at in self.up.items()]
        chosen = place(found, prefer=prefer)
        assert chosen is not None
        return chosen

    def open(self) -> None:
        self.at[self._next] = self.choose()
        self._next += 1

    def ask(self, session: int) -> None:
        if self.at[session] not in self.up:
            self.at[session] = self.choose(prefer=self.at[session])

    def run(self, seconds: int, rng: random.Random, *, life_s: float, asks_s: float) -> None:
        """As many sessions throughout: each that ends makes room for another."""
        for _ in range(seconds):
            self.now += 1
            for session in list(self.at):
                if rng.random() < 1 / life_s:
                    del self.at[session]
                    self.open()
                elif rng.random() < 1 / asks_s:
                    self.ask(session)


@pytest.mark.parametrize("seed", range(3))
def test_33_engines_of_which_8_fail_at_once_stay_evenly_loaded_and_fill_again(seed: int):
    rng, fleet = random.Random(seed), Fleet(33)
    for _ in range(528):
        fleet.open()
    assert set(fleet.loads().values()) == {16}

    lost = [f"engine-{i}" for i in rng.sample(range(33), 8)]
    for name in lost:
        del fleet.up[name]
    for session in list(fleet.at):
        fleet.ask(session)
    spread = fleet.loads().values()
    assert max(spread) - min(spread) <= 1  # 528 on 25: the herd was spread evenly

    fleet.up |= {name: fleet.now for name in lost}
    fleet.run(20, rng, life_s=1800, asks_s=5)
    loads = fleet.loads()
    assert max(loads[name] for name in lost) <= 2  # nothing is moved back, and what is new does not go there all at once

    fleet.run(2 * 1800, rng, life_s=1800, asks_s=30)
    spread = fleet.loads().values()
    assert max(spread) - min(spread) <= 6, sorted(spread)


def test_a_herd_that_comes_while_new_engines_warm_up_does_not_all_go_there():
    fleet = Fleet(33)
    for _ in range(250):
        fleet.open()
    fleet.up |= {f"engine-{i}": fleet.now for i in range(8)}
    for session in [s for s, at in fleet.at.items() if int(at.split("-")[1]) < 8]:
        del fleet.at[session]
    for _ in range(100):
        fleet.open()
    assert max(fleet.loads()[f"engine-{i}"] for i in range(8)) <= 2
