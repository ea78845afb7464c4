"""The append rule: one trial, one log, whoever writes and however often."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.checkpoint.log import GENESIS, Accepted, Append, Entry, Head, Refused, TrialLog, mark
from rollout_ft.checkpoint.state import Export, StoreState
from rollout_ft.checkpoint.view import View
from rollout_ft.types import Partial

pytestmark = pytest.mark.timeout(60)

VIEW = View(1, ("a", "b"), 2)
entries = st.builds(Entry, st.sampled_from(["turn", "serve"]), st.sampled_from("abc"), st.sampled_from([b"1", b"2"]))
appends = st.builds(Append, st.just("t"), st.integers(0, 2), st.integers(0, 2), st.integers(0, 4), entries)


def member() -> StoreState:
    state = StoreState("a")
    assert state.install(VIEW) is None
    return state


def put(state: StoreState, seq: int, key: str = "", owner: tuple[int, int] = (1, 1), payload: bytes = b"p", view: int = 1):
    return state.append(view, Append("t", *owner, seq, Entry("turn", key or f"k{seq}", payload)))


def reason(outcome: object) -> str:
    assert isinstance(outcome, Refused), outcome
    return outcome.reason


def partial(key: str, length: int = 1, generations: int = 1) -> Partial:
    return Partial(key, "rid", "request", "digest", b"\0" * length, b"", (), generations)


@given(st.lists(appends, max_size=40))
def test_whatever_is_sent_the_log_only_grows_and_holds_each_key_once(sent: list[Append]) -> None:
    log, seen = TrialLog(), [GENESIS]
    for append in sent:
        before, outcome = log.head, log.append(append)
        stored = isinstance(outcome, Accepted) and outcome.stored
        assert log.head.length == before.length + stored
        assert log.fence >= (before.attempt, before.owner_epoch)
        if stored:
            assert append.seq == before.length
            assert (append.attempt, append.owner_epoch) == log.fence
            seen.append(log.head.chain)
        else:
            assert log.head == before
    names = [(each.kind, each.key) for each in log.marks()]
    assert len(names) == len(set(names))
    assert [log.chain_at(seq) for seq in range(len(seen))] == seen


@given(st.lists(appends, max_size=40))
def test_sending_everything_twice_gives_the_same_log_as_once(sent: list[Append]) -> None:
    once, twice = TrialLog(), TrialLog()
    for append in sent:
        first = once.append(append)
        again = twice.append(append)
        assert first == again
        repeated = twice.append(append)
        if isinstance(first, Accepted):
            assert isinstance(repeated, Accepted)
            assert not repeated.stored
        else:
            assert repeated == first
    assert once.head == twice.head


@given(st.lists(appends, max_size=40), st.integers(0, 3), st.integers(0, 3))
def test_after_a_fence_no_older_writer_gets_a_success(sent: list[Append], attempt: int, epoch: int) -> None:
    log = TrialLog()
    for append in sent[::2]:
        log.append(append)
    log.raise_fence(attempt, epoch)
    for append in sent:
        if (append.attempt, append.owner_epoch) < log.fence:
            assert reason(log.append(append)) in ("stale_attempt", "stale_owner")


@given(st.lists(entries, max_size=8), st.lists(entries, max_size=8))
def test_equal_chains_mean_equal_logs(mine: list[Entry], theirs: list[Entry]) -> None:
    def chain(some: list[Entry]) -> bytes:
        end = GENESIS
        for entry in some:
            end = mark(end, entry).chain
        return end

    assert (chain(mine) == chain(theirs)) == (mine == theirs)


def test_the_border_between_kind_and_key_is_part_of_the_chain() -> None:
    assert mark(GENESIS, Entry("ab", "c", b"")).chain != mark(GENESIS, Entry("a", "bc", b"")).chain


def test_a_repeated_entry_succeeds_and_another_payload_under_its_key_is_a_conflict() -> None:
    state = member()
    assert isinstance(put(state, 0), Accepted)
    assert isinstance(put(state, 0), Accepted)
    assert reason(put(state, 0, payload=b"other")) == "conflict"


def test_another_key_at_a_taken_place_is_a_conflict_and_a_place_beyond_the_end_a_gap() -> None:
    state = member()
    put(state, 0)
    assert reason(put(state, 0, key="other")) == "conflict"
    assert put(state, 2) == Refused("gap", 1)
    assert reason(state.append(1, Append("unknown", 1, 1, 1, Entry("turn", "k", b"")))) == "gap"
    assert "unknown" not in state.trials


def test_an_owner_that_has_not_fenced_cannot_write_behind_another() -> None:
    state = member()
    put(state, 0)
    assert reason(put(state, 1, owner=(1, 2))) == "unfenced"
    assert isinstance(state.fence(1, "t", 1, 2), Head)
    assert isinstance(put(state, 1, owner=(1, 2)), Accepted)


def test_a_fence_can_be_repeated_and_never_lowered() -> None:
    state = member()
    assert state.fence(1, "t", 2, 1) == state.fence(1, "t", 2, 1) == Head(2, 1, 0, GENESIS)
    assert state.fence(1, "t", 1, 9) == Refused("stale_attempt", 2)
    assert state.fence(1, "t", 2, 0) == Refused("stale_owner", 1)
    assert state.trials["t"].fence == (2, 1)


def test_only_the_installed_view_writes_and_nobody_while_frozen() -> None:
    state = member()
    assert reason(put(state, 0, view=2)) == reason(put(state, 0, view=0)) == "stale_view"
    assert state.freeze(3) is None
    assert reason(put(state, 0)) == "frozen"
    assert reason(state.fence(1, "t", 1, 1)) == "frozen"
    assert state.install(View(2, ("a",), 1)) == Refused("stale_view", 3)
    assert state.install(View(3, ("a",), 1)) is None
    assert isinstance(put(state, 0, view=3), Accepted)


def test_a_late_repetition_of_a_freeze_cannot_close_the_view_it_led_to() -> None:
    state = member()
    state.freeze(2)
    assert state.install(View(2, ("a",), 1)) is None
    assert reason(state.freeze(2)) == "stale_view"
    assert isinstance(put(state, 0, view=2), Accepted)


def test_a_store_outside_its_view_and_an_empty_learner_accept_no_commit() -> None:
    outside = StoreState("z")
    outside.install(VIEW)
    assert reason(put(outside, 0)) == "stale_view"
    assert reason(put(StoreState("learner"), 0, view=0)) == "stale_view"


def test_a_view_below_min_replicas_refuses_and_says_the_number() -> None:
    state = StoreState("a")
    state.install(View(1, ("a",), 2))
    assert put(state, 0) == Refused("under_replicated", 2)


def test_a_released_trial_forgets_its_entries_and_still_fences_the_past() -> None:
    state = member()
    put(state, 0, owner=(2, 1))
    assert state.release("t")
    assert state.release("t")
    assert not state.release("unknown")
    assert reason(put(state, 0, owner=(1, 1))) == "stale_attempt"
    assert reason(put(state, 0, owner=(2, 1))) == reason(state.fence(1, "t", 3, 1)) == "closed"
    assert state.trials["t"].fence == (2, 1)


def test_the_last_partial_of_a_turn_wins_until_the_turn_is_committed() -> None:
    state = member()
    put(state, 0)
    assert state.put_partial(1, "t", 1, 1, partial("k1", 1))
    assert state.put_partial(1, "t", 1, 1, partial("k1", 2))
    assert state.partials("t") == [partial("k1", 2)]
    put(state, 1)
    assert state.partials("t") == []
    assert not state.put_partial(1, "t", 1, 1, partial("k1", 3))


def test_a_fenced_writer_leaves_no_partial_and_the_new_owner_finds_the_old_ones() -> None:
    state = member()
    put(state, 0)
    state.put_partial(1, "t", 1, 1, partial("k1"))
    state.fence(1, "t", 1, 2)
    assert not state.put_partial(1, "t", 1, 1, partial("k2"))
    assert state.partials("t") == [partial("k1")]


def test_partials_are_bounded_and_the_oldest_goes_first() -> None:
    state = StoreState("a", max_partials_per_trial=2)
    state.install(VIEW)
    put(state, 0)
    for key in ("x", "y", "x", "z"):
        state.put_partial(1, "t", 1, 1, partial(key))
    assert [each.turn_key for each in state.partials("t")] == ["x", "z"]


def exported(state: StoreState, from_seq: int, some: list[Entry]) -> Export:
    log = state.trials["t"]
    prior = log.chain_at(from_seq)
    assert prior is not None
    return Export("t", from_seq, prior, tuple(some), log.head)


def test_a_copy_continues_a_prefix_and_anything_else_is_refused() -> None:
    source, target = member(), StoreState("b")
    log = [Entry("turn", f"k{seq}", b"p") for seq in range(3)]
    for seq in range(3):
        put(source, seq)
    assert reason(target.load(5, exported(source, 0, log))) == "stale_view"
    target.freeze(5)
    assert reason(target.load(5, exported(source, 1, log[1:]))) == "gap"
    assert target.load(5, exported(source, 0, log[:2])) == log[:2]
    assert target.load(5, exported(source, 0, log)) == log[2:]
    assert target.load(5, exported(source, 1, log[1:])) == []
    assert target.trials["t"].head == source.trials["t"].head
    forged = [*log[:2], Entry("turn", "k2", b"other")]
    assert reason(target.load(5, exported(source, 0, forged))) == "conflict"
    assert reason(target.load(5, replace(exported(source, 3, []), prior=GENESIS))) == "conflict"
