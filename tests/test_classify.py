"""DESIGN section 5, row by row, on a session without an engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import ask, assistant, begin, commit, make_session, owner_after, play, turn_of, user

from rollout_ft.config import SessionConfig
from rollout_ft.errors import BadRequest, SessionClosed, TrialFault
from rollout_ft.samples.selection import last_answered
from rollout_ft.session.session import MAX_PARTIALS, Attach, Begin, Diverged, Replay, Session
from rollout_ft.session.tree import ids_of
from rollout_ft.testing.plain import STOP
from rollout_ft.types import Answered, Ended, Opened, Outcome, Partial, Recovery, SessionSpec


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
    assert session.leave(flight, first.request_id)
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
    assert session.decide(ask(user("a"), idempotency_key="k")) == Replay(node, first=True)


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


@pytest.mark.parametrize("keep", [0, 1, 17, 22, 198, 199])
def test_a_rollback_of_any_depth_branches_at_the_deepest_common_turn(keep: int):
    session = make_session(context_tokens=100_000)
    history = [user("start")]
    nodes = []
    for i in range(200):
        nodes.append(play(session, ask(*history), f"r{i}"))
        history += [assistant(f"r{i}"), user(f"u{i}")]
    rolled = history[: 1 + 2 * keep]
    rolled[-1] = user("something else")
    flight = begin(session, ask(*rolled))
    assert flight.parent is (nodes[keep - 1] if keep else None)
    assert len(session.tree.nodes) == 200


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
    session.leave(flight, request.request_id)
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


# Repeats, as clients make them.


def test_litellms_counts_0_1_2_0_0_are_one_turn_and_at_most_two_more_samples(session: Session):
    node = play(session, ask(user("a")), "x")
    for _ in (1, 2):
        retry = ask(user("a"), retry=True)
        assert session.decide(retry) == Replay(node, first=False)
        session.replayed(node, retry)
    assert [play(session, ask(user("a")), "y").turn.sample for _ in (0, 0)] == [1, 2]


def test_thirty_repeats_of_a_reply_that_never_arrives_are_one_turn(session: Session):
    node = play(session, ask(user("a")), "x", delivered=False)
    for i in range(30):
        again = ask(user("a"), retry=i % 3 > 0)
        assert session.decide(again) == Replay(node, first=False)
        session.replayed(node, again)
    assert len(session.tree.nodes) == 1


def test_a_client_that_chokes_on_a_reply_is_not_fed_it_for_ever():
    session = make_session(SessionConfig(max_replays=3))
    node = play(session, ask(user("a")), "x")
    for _ in range(3):
        retry = ask(user("a"), retry=True)
        assert session.decide(retry) == Replay(node, first=False)
        session.replayed(node, retry)
    assert begin(session, ask(user("a"), retry=True)).number == 1


def test_replays_of_a_reply_that_did_not_arrive_do_not_count(session: Session):
    node = play(session, ask(user("a")), "x", delivered=False)
    for _ in range(5):
        again = ask(user("a"))
        session.replayed(node, again)
    session.delivered(again.request_id)
    assert session.decide(ask(user("a"), retry=True)) == Replay(node, first=False)


def test_a_reply_that_breaks_its_connection_every_time_is_not_sent_for_ever():
    session = make_session(SessionConfig(max_vain_replays=3))
    node = play(session, ask(user("a")), "x", delivered=False)
    for _ in range(3):
        again = ask(user("a"))
        assert session.decide(again) == Replay(node, first=False)
        session.replayed(node, again)
    assert begin(session, ask(user("a"))).number == 1


def test_an_idempotency_key_that_was_answered_with_a_replay_means_that_turn_from_then_on(session: Session):
    node = play(session, ask(user("a")), "x", delivered=False)
    first = ask(user("a"), idempotency_key="k")
    assert session.decide(first) == Replay(node, first=True)
    session.replayed(node, first)
    session.delivered(first.request_id)
    assert session.decide(ask(user("a"), idempotency_key="k")) == Replay(node, first=False)


def test_one_of_two_attached_callers_leaving_changes_nothing(session: Session):
    first, second = ask(user("a")), ask(user("a"), retry=True)
    flight = begin(session, first)
    session.join(flight, second)
    assert not session.leave(flight, first.request_id)
    assert session.decide(ask(user("a"), retry=True)) == Attach(flight)
    assert session.leave(flight, second.request_id)


def test_two_clients_that_race_are_two_branches(session: Session):
    play(session, ask(user("a")), "x")
    history = [user("a"), assistant("x")]
    one, two = begin(session, ask(*history, user("one"))), begin(session, ask(*history, user("two")))
    commit(session, two, "2")
    commit(session, one, "1")
    assert begin(session, ask(*history, user("one"), assistant("1"), user("on"))).parent is session.tree.nodes[one.key]
    assert begin(session, ask(*history, user("two"), assistant("2"), user("on"))).parent is session.tree.nodes[two.key]
    assert session.counts["branched"] == 1


def test_sub_agents_have_histories_of_their_own_in_one_session(session: Session):
    histories = {name: [user(name)] for name in ("main", "scout", "critic")}
    last: dict[str, object] = dict.fromkeys(histories)
    for i in range(6):
        for name, history in histories.items():
            flight = begin(session, ask(*history))
            assert flight.parent is last[name]
            last[name] = commit(session, flight, f"{name} {i}")
            history += [assistant(f"{name} {i}"), user("on")]


def test_a_late_commit_is_not_mistaken_for_the_state_that_was_rolled_back(session: Session):
    play(session, ask(user("a")), "x")
    history = [user("a"), assistant("x"), user("b")]
    slow = begin(session, ask(*history))
    served = play(session, ask(*history), "served")
    retried = begin(session, ask(*history))
    late = commit(session, slow, "late")
    assert len({late.turn.key, served.turn.key, retried.key}) == 3
    assert begin(session, ask(*history, assistant("served"), user("c"))).parent is served


def test_a_turn_that_was_cut_by_its_length_is_closed_and_extended(session: Session):
    flight = begin(session, ask(user("a")))
    output = flight.prompt_ids[:0] + bytes.fromhex("78000000")
    session.committed(replace(turn_of(flight, "x", session), output_ids=output, logprobs=b"\0" * 4, finish_reason="length"))
    extended = begin(session, ask(user("a"), assistant("x"), user("b")))
    assert extended.parent is session.tree.nodes[flight.key]
    assert ids_of(extended.prompt_ids)[0] == STOP


def test_the_same_history_again_with_the_reply_is_one_more_turn(session: Session):
    node = play(session, ask(user("a")), "x")
    flight = begin(session, ask(user("a"), assistant("x")))
    assert (flight.parent, flight.new_from) == (node, 2)
    commit(session, flight, "y")
    assert len(session.tree.nodes) == 2


def test_an_assistant_that_the_client_made_up_is_prompt(session: Session):
    shots = [user("q"), assistant("made up"), user("a")]
    flight = begin(session, ask(*shots))
    assert (flight.parent, flight.new_from) == (None, 0)
    node = commit(session, flight, "x")
    assert begin(session, ask(*shots, assistant("x"), assistant("injected"), user("b"))).parent is node


# What is refused changes nothing.


def state(session: Session) -> object:
    ev = session.evidence
    marks = (set(ev.acknowledged), set(ev.delivered), dict(ev.asked), list(ev._unsaved_acks), dict(ev.replays), set(ev.unheard))
    return (
        marks,
        set(session.tree.nodes),
        set(session.flights),
        dict(session.counts),
        dict(session.leniencies),
        session.fault,
        session._order,
    )


@pytest.mark.parametrize(
    "refused",
    [
        {"message": user("b" * 5000)},
        {"message": {"role": "user", "content": "b"}, "idempotency_key": "used"},
        {"message": user("b"), "full": True},
    ],
)
def test_a_request_that_is_refused_leaves_everything_as_it_was(refused: dict[str, Any]):
    session = make_session(SessionConfig(max_in_flight=1 if refused.get("full") else 8))
    play(session, ask(user("a"), idempotency_key="used"), "x", delivered=False)
    if refused.get("full"):
        begin(session, ask(user("another")))
    before = state(session)
    request = ask(user("a"), assistant("x "), refused["message"], idempotency_key=refused.get("idempotency_key", ""))
    with pytest.raises(BadRequest):
        session.decide(request)
    assert state(session) == before
    assert session.known.turn(request.request_id) is None


# Owners.


def test_counters_outlive_an_owner_as_far_as_the_store_knows(session: Session):
    first = play(session, ask(user("a")), "x")
    other = play(session, ask(user("b")), "y", delivered=False)
    again = owner_after(session, first.turn, other.turn)
    assert dict(again.counts) == dict(session.counts) == {"turns_served": 2, "branched": 1}


def test_the_order_of_asking_outlives_an_owner(session: Session):
    slow, quick = begin(session, ask(user("slow"))), begin(session, ask(user("quick")))
    two, one = commit(session, quick, "2"), commit(session, slow, "1")
    assert last_answered(session) is two
    again = owner_after(session, two.turn, one.turn)
    assert last_answered(again) is again.tree.nodes[two.turn.key]
    assert begin(again, ask(user("next"))).order == 3


def test_a_retry_behind_equal_texts_means_what_it_is_a_retry_of(session: Session):
    """Two samples say the same; what was asked behind one of them stays there, whichever is delivered meanwhile."""
    first = play(session, ask(user("a")), "same", delivered=False)
    asked = [user("a"), assistant("same"), user("b")]
    flight = begin(session, ask(*asked))
    assert flight.parent is first
    second = ask(user("a"), retry=False)
    session.evidence.deliver(first.turn.key)
    other = play(session, second, "same")
    session.evidence.acknowledge(other)
    assert session.evidence.rank(other) >= session.evidence.rank(first)
    assert session.decide(ask(*asked, retry=True)) == Attach(flight)
    assert session.failed(ask(*asked)) == flight.base


def test_an_agent_that_begins_anew_may_use_its_idempotency_keys_anew(session: Session):
    request = ask(user("a"), idempotency_key="step-1")
    node = play(session, request, "x")
    again = owner_after(session, node.turn, Opened(session.spec, 2, True, 2))
    other = ask(user("other"), idempotency_key="step-1")
    left = again.decide(other)
    assert isinstance(left, Diverged)
    again.diverge(left.divergence)
    assert isinstance(again.decide(other), Begin)


def test_unfinished_generations_of_a_session_are_kept_up_to_a_limit(session: Session):
    for i in range(MAX_PARTIALS + 3):
        flight = begin(session, ask(user(f"{i}")))
        session.give_up(flight, Partial(flight.key, "r", "q", flight.prompt_digest, b"", b"", (), 1))
    assert len(session.partials) == MAX_PARTIALS
    assert not session.flights
