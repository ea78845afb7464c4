"""DESIGN section 5, row by row, on a session without an engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import ask, assistant, begin, commit, make_session, play, turn_of, user

from rollout_ft.config import SessionConfig
from rollout_ft.errors import BadRequest, SessionClosed, TrialFault
from rollout_ft.samples.selection import last_answered
from rollout_ft.session.session import Attach, Begin, Replay, Session
from rollout_ft.types import Answered, Ended, Opened, Outcome, Recovery, SessionSpec


def test_a_request_that_contains_the_reply_acknowledges_it_and_generates_the_next(session: Session):
    first = play(session, ask(user("a")), "x", delivered=False)
    flight = begin(session, ask(user("a"), assistant("x"), user("b")))
    assert flight.parent is first
    assert first.turn.key in session.evidence.acknowledged


def test_a_retry_of_what_is_in_flight_attaches(session: Session):
    flight = begin(session, ask(user("a")))
    assert session.decide(ask(user("a"), retry=True)) == Attach(flight)


def test_a_repeat_attaches_when_every_earlier_caller_is_gone(session: Session):
    first = ask(user("a"))
    flight = begin(session, first)
    assert session.leave(flight, first)
    assert session.decide(ask(user("a"))) == Attach(flight)


def test_two_live_callers_without_a_mark_are_two_samples(session: Session):
    flight = begin(session, ask(user("a")))
    other = begin(session, ask(user("a")))
    assert (other.number, other.base, other.seed == flight.seed) == (1, flight.base, False)


def test_two_live_callers_attach_where_the_config_says_so():
    session = make_session(SessionConfig(on_concurrent="attach"))
    flight = begin(session, ask(user("a")))
    assert session.decide(ask(user("a"))) == Attach(flight)


def test_the_same_request_id_is_the_same_turn_wherever_it_arrives(session: Session):
    request = ask(user("a"))
    flight = begin(session, request)
    assert session.decide(request) == Attach(flight)
    node = commit(session, flight, "x")
    assert session.decide(request) == Replay(node, first=False)


def test_a_phantom_is_served_whatever_the_headers(session: Session):
    node = play(session, ask(user("a")), "x", delivered=False)
    assert session.decide(ask(user("a"))) == Replay(node, first=False)
    assert session.decide(ask(user("a"), retry=True)) == Replay(node, first=False)
    assert session.decide(ask(user("a"), idempotency_key="k")) == Replay(node, first=False)


def test_a_marked_repeat_of_a_delivered_turn_replays_the_newest_sample(session: Session):
    play(session, ask(user("a")), "x")
    newest = play(session, ask(user("a")), "y")
    assert session.decide(ask(user("a"), retry=True)) == Replay(newest, first=False)


def test_an_unmarked_repeat_of_a_delivered_turn_is_another_sample(session: Session):
    node = play(session, ask(user("a")), "x")
    sibling = begin(session, ask(user("a")))
    assert (sibling.base, sibling.number) == (node.base, 1)


def test_a_new_idempotency_key_on_a_delivered_turn_is_another_sample_even_when_marked(session: Session):
    play(session, ask(user("a")), "x")
    assert isinstance(session.decide(ask(user("a"), retry=True, idempotency_key="new")), Begin)


def test_a_repeat_is_replayed_once_where_the_config_says_so():
    session = make_session(SessionConfig(on_repeat="replay_once"))
    node = play(session, ask(user("a")), "x")
    again = ask(user("a"))
    assert session.decide(again) == Replay(node, first=False)
    session.replayed(node, again)
    assert isinstance(session.decide(ask(user("a"))), Begin)


def test_the_same_idempotency_key_gives_the_same_turn(session: Session):
    request = ask(user("a"), idempotency_key="k")
    node = play(session, request, "x")
    assert session.decide(ask(user("a"), idempotency_key="k")) == Replay(node, first=False)


def test_the_same_idempotency_key_with_another_body_is_422_and_changes_nothing(session: Session):
    play(session, ask(user("a"), idempotency_key="k"), "x")
    before = dict(session.tree.nodes)
    with pytest.raises(BadRequest) as e:
        session.decide(ask(user("b"), idempotency_key="k"))
    assert e.value.status == 422
    assert session.tree.nodes == before


@pytest.mark.parametrize("keep", [0, 1, 17, 99])
def test_a_rollback_of_any_depth_branches_at_the_deepest_common_turn(session: Session, keep: int):
    history = [user("start")]
    nodes = []
    for i in range(100):
        nodes.append(play(session, ask(*history), f"r{i}"))
        history += [assistant(f"r{i}"), user(f"u{i}")]
    rolled = history[: 1 + 2 * keep]
    rolled[-1] = user("something else")
    flight = begin(session, ask(*rolled))
    assert flight.parent is (nodes[keep - 1] if keep else None)
    assert len(session.tree.nodes) == 100


def test_a_compacted_history_is_a_new_root(session: Session):
    play(session, ask(user("a")), "x")
    flight = begin(session, ask(user("summary of all that was said")))
    assert flight.parent is None


def test_of_turns_with_equal_text_the_delivered_one_is_extended(session: Session):
    first = play(session, ask(user("a")), "x")
    twin = play(session, ask(user("a")), "x", delivered=False)
    extended = begin(session, ask(user("a"), assistant("x"), user("b")))
    assert (extended.parent, twin.turn.sample) == (first, 1)


def test_an_ended_session_is_closed_for_good(session: Session):
    session.restore([Ended(Outcome.COMPLETED, 1.0, "", 1)], [])
    with pytest.raises(SessionClosed):
        session.decide(ask(user("a")))


def test_in_a_new_attempt_the_kth_request_gets_the_kth_recorded_sample(session: Session):
    one = play(session, ask(user("a")), "x")
    two = play(session, ask(user("a")), "y")
    again = make_session()
    spec = SessionSpec("t1")
    again.restore([Opened(spec, 1, False, 1), one.turn, two.turn, Opened(spec, 2, True, 2)], [])
    for node in (one, two):
        request = ask(user("a"))
        decision = again.decide(request)
        assert isinstance(decision, Replay)
        assert (decision.node.turn, decision.first) == (node.turn, True)
        again.replayed(decision.node, request)
        again.delivered(request.request_id)
    assert begin(again, ask(user("a"))).number == 2


def test_an_attempt_from_nothing_knows_no_recorded_turn(session: Session):
    node = play(session, ask(user("a")), "x")
    again = make_session()
    spec = SessionSpec("t1")
    again.restore([Opened(spec, 1, False, 1), node.turn, Opened(spec, 2, False, 2)], [])
    assert isinstance(again.decide(ask(user("a"))), Begin)


def test_a_turn_that_ended_in_a_5xx_taints_until_it_is_answered(session: Session):
    request = ask(user("a"))
    flight = begin(session, request)
    assert session.failed(request) == flight.base
    assert session.unanswered() == [flight.base]
    commit(session, flight, "x")
    assert session.unanswered() == [flight.base]
    retry = ask(user("a"), retry=True)
    decision = session.decide(retry)
    assert isinstance(decision, Replay)
    session.replayed(decision.node, retry)
    session.delivered(retry.request_id)
    assert session.unanswered() == []


def test_the_taint_survives_the_owner(session: Session):
    again = make_session()
    again.restore([Opened(SessionSpec("t1"), 1, False, 1), Answered(failed="base")], [])
    assert again.unanswered() == ["base"]


@pytest.mark.parametrize("recovery", [Recovery.ABANDON, Recovery.RESTART])
def test_without_a_checkpoint_a_lost_reply_ends_the_attempt(recovery: Recovery):
    session = make_session(recovery=recovery)
    play(session, ask(user("a")), "x", delivered=False)
    with pytest.raises(TrialFault):
        session.decide(ask(user("a")))


def test_the_seed_of_a_turn_is_a_function_of_the_trial_and_the_turn_alone(session: Session):
    first = begin(session, ask(user("a")))
    second = begin(make_session(), ask(user("a")))
    other = begin(make_session(seed=5), ask(user("a")))
    assert first.seed == second.seed != other.seed


def test_a_prompt_over_the_context_is_refused_with_the_words_that_clients_know(session: Session):
    with pytest.raises(BadRequest, match="This model's maximum context length is 4096 tokens") as e:
        session.decide(ask(user("x" * 5000)))
    assert e.value.code == "context_length_exceeded"


def test_a_turn_that_nobody_waited_for_is_a_phantom_until_somebody_is_given_it(session: Session):
    served = play(session, ask(user("a")), "x")
    request = ask(user("another"))
    flight = begin(session, request)
    session.leave(flight, request)
    phantom = session.committed(replace(turn_of(flight, "y", session), unheard=True))
    assert last_answered(session) is served
    again = ask(user("another"), retry=True)
    assert session.decide(again) == Replay(phantom, first=True)
    session.replayed(phantom, again)
    assert last_answered(session) is phantom


def test_a_fault_that_ended_the_attempt_is_remembered_by_every_later_owner_and_by_no_later_attempt():
    again = make_session(recovery=Recovery.RESTART)
    opened = Opened(again.spec, 1, False, 1)
    again.restore([opened, Answered(failed="fault:lost_reply")], [])
    assert again.fault == "lost_reply"
    again.restore([opened, Answered(failed="fault:lost_reply"), Opened(again.spec, 2, False, 2)], [])
    assert again.fault == ""
