"""What an owner does, seen from outside: an engine that it closed stays closed until it opened it again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.engine.observer import Held, Look, Observed, Reach, Rules, aborted, cleared, looked, suspected, told

RULES = Rules(spread_s=3, others_s=5)
MEMORY = replace(RULES, takes_memory=True, settle_s=None)


def look(at: float, *, ready: bool = True, version: str = "1", load: int | None = 0, **fields: object) -> Look:
    return replace(Look(at, Reach.ANSWERED, ready, version, load), **fields)  # pyright: ignore[reportArgumentType]


def seen(*looks: Look, state: Observed | None = None, rules: Rules = RULES) -> Observed:
    state = state or Observed()
    for each in looks:
        state = looked(state, each, rules)
    return state


def shut(at: float = 10, version: str = "1", rules: Rules = RULES) -> Observed:
    return aborted(seen(look(at - 1), rules=rules), at, version)


def quiet(start: int, end: int, **fields: object) -> list[Look]:
    return [look(t, **fields) for t in range(start, end)]  # pyright: ignore[reportArgumentType]


def test_an_engine_that_nobody_touched_is_open():
    assert seen(*quiet(0, 5)).open


def test_an_abort_closes_until_something_says_otherwise():
    assert not seen(*quiet(10, 5000), state=shut()).open


def test_a_pause_that_was_seen_to_end_opens():
    assert not seen(look(11), look(12, ready=False), state=shut()).open
    assert seen(look(11), look(12, ready=False), look(13), state=shut()).open


def test_other_weights_while_ready_open_however_short_the_pause_was():
    assert seen(look(11, version="2"), state=shut()).open


def test_other_weights_while_paused_do_not_open():
    assert not seen(look(11, ready=False, version="2"), look(12, ready=False, version="2"), state=shut()).open


def test_weights_that_were_there_when_it_was_aborted_prove_nothing():
    state = aborted(seen(look(9)), 10, "2")  # the update was not seen yet
    assert not seen(*quiet(11, 100, version="2"), state=state).open


def test_a_look_that_began_before_the_abort_proves_nothing():
    assert not seen(look(9.9, version="2"), state=shut()).open
    assert not seen(look(9.9, ready=False), look(10.1), state=shut()).open


def test_who_knows_may_say_that_it_is_open():
    assert told(shut()).open


def test_being_told_does_not_open_what_is_seen_to_be_paused():
    state = told(seen(look(11, ready=False), state=shut()))
    assert not state.open
    assert seen(look(12), state=state).open


def test_requests_of_others_open_once_it_was_idle_and_they_stay():
    state = seen(look(11), *quiet(12, 17, load=2), state=shut())
    assert not state.open
    assert seen(look(17, load=2), state=state).open


def test_what_the_owner_is_still_aborting_is_not_others():
    assert not seen(*quiet(11, 100, load=2), state=shut()).open


def test_a_probe_now_and_then_is_not_others():
    assert not seen(*[look(t, load=t % 3 == 0) for t in range(11, 100)], state=shut()).open


def test_idleness_opens_only_where_the_config_says_so():
    rules = replace(RULES, reopen_idle_s=20.0)
    assert not seen(*quiet(11, 31), state=shut(), rules=rules).open
    assert seen(*quiet(11, 32), state=shut(), rules=rules).open
    assert not seen(*quiet(11, 25), look(25, load=1), *quiet(26, 40), state=shut(), rules=rules).open


def test_where_no_load_is_told_the_time_since_the_abort_counts():
    rules = replace(RULES, reopen_idle_s=20.0)
    assert seen(*quiet(11, 32, load=None), state=shut(), rules=rules).open


def test_an_engine_whose_turns_run_on_was_spared():
    state = suspected(seen(look(9)), 10, "engine-1")
    assert not seen(look(12, load=0, moved=12.0), state=state).open
    assert seen(look(13.5, load=0, moved=13.1), state=state).open


def test_an_aborted_engine_is_never_spared():
    assert not seen(look(14, moved=13.5), state=shut()).open


def test_a_suspicion_ends_with_the_engine_that_raised_it_and_an_abort_does_not():
    assert cleared(suspected(seen(look(9)), 10, "engine-1"), "").open
    assert not cleared(shut(), "").open


def test_a_suspicion_becomes_an_abort_and_not_the_other_way_round():
    state = aborted(suspected(seen(look(9)), 10, "engine-1"), 11, "1")
    assert state.held is Held.ABORTED
    assert suspected(state, 12, "engine-1") == state


def test_an_engine_whose_memory_may_be_away_opens_only_when_told():
    state = seen(look(11, ready=False), *quiet(12, 500, version="2"), state=shut(rules=MEMORY), rules=MEMORY)
    assert not state.open
    assert told(state).open


def test_an_engine_whose_memory_may_be_away_is_closed_by_any_pause():
    state = seen(look(1), look(2, ready=False), *quiet(3, 500, version="2"), rules=MEMORY)
    assert not state.open


def test_the_memory_is_there_as_long_after_the_weights_as_the_config_says():
    rules = replace(MEMORY, settle_s=5.0)
    state = shut(rules=rules)
    assert not seen(look(11, ready=False), look(12), look(16.9), state=state, rules=rules).open
    assert seen(look(11, ready=False), look(12), look(17), state=state, rules=rules).open


def test_nobody_listening_is_an_end_also_while_it_is_closed():
    gone = Look(11, Reach.REFUSED)
    assert not seen(gone, state=shut()).ended
    assert seen(gone, replace(gone, began=12), state=shut()).ended == "connection refused"
    assert not seen(gone, look(11.5), replace(gone, began=12), state=shut()).ended


def test_silence_is_an_end_only_while_it_should_serve():
    silent = [Look(t, Reach.SILENT) for t in (11, 12, 13)]
    assert seen(look(10), *silent).ended
    assert not seen(*silent, state=shut()).ended
    assert not seen(look(10, ready=False), *silent).ended


def test_another_start_is_the_end_of_this_one():
    assert seen(look(1, started="a"), look(2), look(3, started="b")).ended == "restarted by its owner"
    assert not seen(look(1, started="a"), look(2), look(3, started="a")).ended


@dataclass
class Owner:
    """An owner that does as it likes. `closed`: what it wants from now on is that nothing comes."""

    version: int = 1
    paused: bool = False
    closed: bool = False
    opened: float = 0.0
    looked: bool = True
    """Since it opened the engine there was a whole look."""

    def open(self, at: float) -> None:
        self.closed, self.looked, self.opened = False, False, at


Step = Literal["abort", "pause", "continue", "update", "look", "read", "finish", "silent"]


class Story:
    """An owner's deeds and our looks, whose two reads may come with deeds between them."""

    def __init__(self, rules: Rules = RULES):
        self.owner, self.state, self.rules = Owner(), seen(look(0)), rules
        self.now = 1.0
        self.reading: tuple[float, str] | None = None

    def step(self, what: Step) -> None:
        self.now += 0.1
        owner = self.owner
        match what:
            case "abort" if owner.closed or owner.looked:  # else: closed again before anybody could see it open
                if self.state.open:  # only then is anything of ours there to be aborted
                    self.state = aborted(self.state, self.now, str(owner.version))
                owner.closed = True
            case "pause":
                owner.paused = True
                owner.closed = True
            case "continue" if owner.paused:
                owner.paused = False
                owner.open(self.now)
            case "update":
                owner.version += 1
                if not owner.paused:
                    owner.open(self.now)
            case "read":
                self.reading = (self.now, str(owner.version))
            case "look" | "finish":
                if what == "look":
                    self.reading = (self.now, str(owner.version))
                if self.reading is not None:
                    self._finish(*self.reading)
                    self.reading = None
            case "silent":
                self.state = looked(self.state, Look(self.now, Reach.SILENT), self.rules)
                self.state = replace(self.state, ended="")
            case _:
                pass

    def _finish(self, began: float, version: str) -> None:
        held = self.state.held
        self.state = looked(self.state, look(began, ready=not self.owner.paused, version=version), self.rules)
        if held is not None and self.state.held is None:
            assert not self.owner.closed, "opened what its owner had closed"
        assert not (self.state.open and self.owner.paused and self.owner.closed)
        self.owner.looked = self.owner.looked or began >= self.owner.opened


STEPS = st.lists(st.sampled_from(["abort", "pause", "continue", "update", "look", "read", "finish", "silent"]), max_size=40)


@settings(max_examples=3000, deadline=None)
@given(STEPS)
def test_no_sequence_of_looks_opens_what_its_owner_closed(steps: list[Step]):
    story = Story()
    for step in steps:
        story.step(step)


@settings(max_examples=1500, deadline=None)
@given(STEPS, st.booleans())
def test_an_owner_that_opens_it_is_seen_to(steps: list[Step], updates: bool):
    story = Story()
    for step in steps:
        story.step(step)
    story.step("pause")
    story.step("update" if updates else "look")
    story.step("continue")
    story.step("look")
    assert story.state.open, story.state


@settings(max_examples=1500, deadline=None)
@given(STEPS)
def test_weights_that_come_without_a_pause_open_it(steps: list[Step]):
    story = Story()
    for step in [*steps, "continue", "update", "look"]:
        story.step(step)  # pyright: ignore[reportArgumentType]
    assert story.state.open, story.state


@settings(max_examples=500, deadline=None)
@given(STEPS)
def test_an_engine_whose_memory_may_be_away_never_opens_by_itself(steps: list[Step]):
    story = Story(MEMORY)
    story.state = aborted(story.state, story.now, "1")
    for step in steps:
        story.step(step)
        assert not story.state.open


def test_a_state_knows_why():
    assert "aborted" in shut().why
    assert seen(look(11, version="2"), state=shut()).why == "it has other weights"
