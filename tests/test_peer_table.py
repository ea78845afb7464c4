"""What happens to agents elsewhere, request by request, and what has to come of it here.

Each test is a way in which a session server without evidence loses a trial, a turn, or trains a reply that nobody got.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest
from conftest import ask, assistant, begin, commit, make_session, owner_after, play, turn_of, user

from rollout_ft.config import SessionConfig
from rollout_ft.errors import BadRequest, SessionClosed
from rollout_ft.samples.trajectory import metadata, trajectory
from rollout_ft.session.flight import Flight
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.session import Attach, Begin, Replay, Session
from rollout_ft.session.tree import Node
from rollout_ft.types import JSON, Ended, Outcome

TURNS = [1, 3]


def history_of(session: Session, turns: int) -> tuple[list[JSON], list[Node]]:
    """So many turns that went well, and the request for the next."""
    history, nodes = [user("start")], list[Node]()
    for i in range(turns):
        nodes.append(play(session, ask(*history), f"reply {i}"))
        history = [*history, assistant(f"reply {i}"), user(f"observed {i}")]
    return history, nodes


def trained(session: Session) -> list[list[str]]:
    """What the model said and is trained on, path by path."""
    found: list[list[str]] = []
    for path in trajectory(session)["paths"]:
        turns = [t for t in path["turns"] if path["loss_mask"][t["start"] : t["end"]].any()]
        found.append([orjson.loads(session.tree.nodes[t["turn"]].turn.reply)["content"] for t in turns])
    return found


def words(session: Session) -> list[str]:
    """The same, whatever the path."""
    return sorted(text for path in trained(session) for text in path)


def replayed(session: Session, request: TurnRequest) -> Node:
    decision = session.decide(request)
    assert isinstance(decision, Replay)
    session.replayed(decision.node, request)
    session.delivered(request.request_id)
    return decision.node


def time_out(session: Session, request: TurnRequest) -> Flight:
    """The client gives up; the generation goes on."""
    flight = begin(session, request)
    session.leave(flight, request.request_id)
    return flight


def finish(session: Session, flight: Flight, text: str) -> Node:
    return session.committed(replace(turn_of(flight, text, session), unheard=not flight.callers))


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("mark", [True, False])
def test_a_reply_that_was_stored_after_its_client_gave_up_is_what_the_retry_gets(session: Session, turn: int, mark: bool):
    history, nodes = history_of(session, turn - 1)
    phantom = finish(session, time_out(session, ask(*history)), "late")
    assert replayed(session, ask(*history, retry=mark)) is phantom
    play(session, ask(*history, assistant("late"), user("on")), "next")
    assert trained(session) == [[f"reply {i}" for i in range(len(nodes))] + ["late", "next"]]


@pytest.mark.parametrize("turn", TURNS)
def test_a_retry_while_the_first_still_runs_is_the_same_generation(session: Session, turn: int):
    history, _ = history_of(session, turn - 1)
    flight = begin(session, ask(*history))
    retry = ask(*history, retry=True)
    assert session.decide(retry) == Attach(flight)
    session.join(flight, retry)
    node = commit(session, flight, "one")
    session.delivered(retry.request_id)
    assert begin(session, ask(*history, assistant("one"), user("on"))).parent is node
    assert len(trained(session)) == 1


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("first", ["slow", "retry"])
def test_of_two_generations_the_one_that_was_served_is_trained_whichever_is_committed_first(session: Session, turn: int, first: str):
    history, _ = history_of(session, turn - 1)
    slow, served = ask(*history), ask(*history)
    flights = {"slow": begin(session, slow), "retry": begin(session, served)}
    for name in [first, *({"slow", "retry"} - {first})]:
        commit(session, flights[name], name)
        if name == "retry":
            session.delivered(served.request_id)
    next_turn = play(session, ask(*history, assistant("retry"), user("on")), "next")
    assert next_turn.parent is not None
    assert next_turn.parent.turn.key == flights["retry"].key
    assert trained(session) == [[f"reply {i}" for i in range(turn - 1)] + ["retry", "next"]]


def test_an_sdk_that_times_out_twice_costs_one_generation(session: Session):
    first = ask(user("a"))
    flight = begin(session, first)
    for _ in (1, 2):
        session.leave(flight, first.request_id)
        first = ask(user("a"), retry=True)
        assert session.decide(first) == Attach(flight)
        session.join(flight, first)
    commit(session, flight, "x")
    assert (len(session.tree.nodes), metadata(session)["generations"]) == (1, 1)


@pytest.mark.parametrize("keep", [0, 1])
def test_a_client_that_starts_again_or_falls_back_goes_on_from_there_and_the_old_line_lives(session: Session, keep: int):
    history, nodes = history_of(session, 3)
    back = [*history[: 2 * keep], user("another way")]
    assert play(session, ask(*back), "new").parent is (nodes[keep - 1] if keep else None)
    assert begin(session, ask(*history)).parent is nodes[-1]
    assert sum(len(p) for p in trained(session)) == 4


def test_a_client_that_compacts_its_context_begins_a_line_of_its_own(session: Session):
    history_of(session, 3)
    compact = [user("start"), user("summary of three turns"), user("go on")]
    assert play(session, ask(*compact), "new").parent is None
    assert trained(session) == [["reply 0", "reply 1", "reply 2"], ["new"]]


def test_a_phantom_that_the_client_rolled_back_behind_is_not_trained(session: Session):
    history, nodes = history_of(session, 2)
    finish(session, time_out(session, ask(*history)), "phantom")
    again = [*history[:2], user("turn two in another way")]
    assert play(session, ask(*again), "redone").parent is nodes[0]
    play(session, ask(*again, assistant("redone"), user("on")), "end")
    assert words(session) == ["end", "redone", "reply 0", "reply 1"]


def test_a_generation_that_broke_leaves_nothing_and_its_retry_begins(session: Session):
    history, nodes = history_of(session, 1)
    request = ask(*history)
    flight = begin(session, request)
    session.leave(flight, request.request_id)
    session.drop(flight)
    retried = begin(session, ask(*history, retry=True))
    assert (retried.key, retried.parent, len(session.tree.nodes)) == (flight.key, nodes[0], 1)


def test_a_thousand_clients_that_give_up_on_a_turn_hold_one_generation(session: Session):
    first = ask(user("a"))
    flight = begin(session, first)
    session.leave(flight, first.request_id)
    for _ in range(1030):
        again = ask(user("a"), retry=True)
        assert session.decide(again) == Attach(flight)
        session.join(flight, again)
        session.leave(flight, again.request_id)
    assert len(session.flights) == 1
    begin(session, ask(user("somebody else")))


def test_a_killed_server_loses_what_was_in_flight_and_no_turn(session: Session):
    history, nodes = history_of(session, 3)
    lost = begin(session, ask(*history))
    again = owner_after(session, *(n.turn for n in nodes))
    assert begin(again, ask(*history, retry=True)).key == lost.key
    assert trained(again)[-1][-1] == "reply 2"


def test_two_clients_with_other_observations_go_on_side_by_side(session: Session):
    history, _ = history_of(session, 1)
    lines = {name: [*history[:-1], user(name)] for name in ("a", "b")}
    flights = {name: begin(session, ask(*line)) for name, line in lines.items()}
    for name in ("b", "a"):
        commit(session, flights[name], f"to {name}")
    for name in ("a", "b"):
        node = play(session, ask(*lines[name], assistant(f"to {name}"), user("on")), f"end {name}")
        assert node.parent is session.tree.nodes[flights[name].key]
    assert words(session) == ["end a", "end b", "reply 0", "to a", "to b"]


def test_a_stale_commit_after_a_retry_of_the_same_state_takes_nobodys_place(session: Session):
    history, _ = history_of(session, 1)
    stale = begin(session, ask(*history))
    play(session, ask(*history), "served")
    retried = play(session, ask(*history), "served again")
    commit(session, stale, "stale")
    assert play(session, ask(*history, assistant("served again"), user("on")), "end").parent is retried
    assert trained(session) == [["reply 0", "served again", "end"]]


def test_a_turn_that_finishes_after_the_one_before_it_was_made_anew_is_a_branch(session: Session):
    history, _ = history_of(session, 2)
    stale = begin(session, ask(*history))
    again = [*history[:2], user("turn two anew")]
    redone = play(session, ask(*again), "redone")
    commit(session, stale, "stale")
    assert play(session, ask(*again, assistant("redone"), user("on")), "end").parent is redone
    assert words(session) == ["end", "redone", "reply 0", "reply 1"]


def test_a_request_that_is_refused_takes_no_turn_with_it(session: Session):
    history, nodes = history_of(session, 2)
    with pytest.raises(BadRequest, match="role"):
        session.digests(b"", [*history, {"role": "nobody", "content": "x"}])
    with pytest.raises(BadRequest):
        session.decide(ask(*history[:-1], user("x" * 5000)))
    assert begin(session, ask(*history)).parent is nodes[-1]


def test_a_request_after_the_session_was_closed_is_final(session: Session):
    flight = begin(session, ask(user("a")))
    session.restore([Ended(Outcome.CANCELLED, None, "", 1)], [])
    session.drop(flight)
    with pytest.raises(SessionClosed):
        session.decide(ask(user("a"), retry=True))


# Replies that come back in other words.


def call(arguments: Any, **fields: Any) -> JSON:
    return {"id": "call_0", "type": "function", "function": {"name": "run", "arguments": arguments}, **fields}


def said(i: int) -> JSON:
    arguments = orjson.dumps({"cmd": "ls", "n": i}, option=orjson.OPT_INDENT_2).decode()
    return {"role": "assistant", "content": f" thought {i}\n", "tool_calls": [call(arguments)]}


def stripped(message: JSON) -> JSON:
    return {**message, "content": message["content"].strip()}


def reserialised(message: JSON) -> JSON:
    (one,) = message["tool_calls"]
    arguments = orjson.loads(one["function"]["arguments"])
    return {**message, "tool_calls": [call(orjson.dumps(dict(reversed(arguments.items()))).decode())]}


def renamed(message: JSON) -> JSON:
    return {**message, "tool_calls": [{**message["tool_calls"][0], "id": "mine", "index": 0}], "provider_specific_fields": None}


def without_calls(message: JSON) -> JSON:
    return {"role": "assistant", "content": message["content"]}


def six_turns(session: Session, spelled: Any) -> None:
    history = [user("start")]
    for i in range(6):
        flight = begin(session, ask(*history, digests=session.digests(b"", history)))
        (request_id,) = flight.joined
        session.leave(flight, request_id)
        session.committed(replace(turn_of(flight, f"t{i}", session), reply=orjson.dumps(said(i))))
        session.delivered(request_id)
        history = [*history, spelled(said(i)), {"role": "tool", "tool_call_id": "x", "content": f"out {i}"}]


@pytest.mark.parametrize(
    ("spelled", "needed"),
    [
        (stripped, "whitespace"),
        (reserialised, "arguments_reformatted"),
        (renamed, "ids_renamed"),
    ],
)
def test_a_history_in_other_words_is_one_path_with_all_its_turns(session: Session, spelled: Any, needed: str):
    six_turns(session, spelled)
    (path,) = trajectory(session)["paths"]
    assert len(path["turns"]) == 6
    assert metadata(session)["leniencies"][needed] == 5


def test_a_history_whose_tool_calls_were_dropped_loses_no_turn(session: Session):
    six_turns(session, without_calls)
    assert sum(len(p) for p in trained(session)) == 6
    assert metadata(session)["turns_in_trajectory"] == 6


def role_and_content(message: JSON) -> bytes:
    return orjson.dumps([message["role"], message["content"]])


def test_a_history_whose_tool_calls_were_dropped_is_one_path_where_the_matcher_says_so():
    session = make_session(SessionConfig(matcher="test_peer_table:role_and_content"))
    six_turns(session, without_calls)
    assert len(trajectory(session)["paths"]) == 1


@pytest.mark.parametrize("arguments", ['{"cmd": "ls', "", "[1]", "null", '{"n": NaN}'])
def test_arguments_that_are_not_json_poison_nothing(session: Session, arguments: str):
    flight = begin(session, ask(user("a")))
    reply = {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}
    node = session.committed(replace(turn_of(flight, "x", session), reply=orjson.dumps(reply)))
    history = [user("a"), reply, {"role": "tool", "tool_call_id": "call_0", "content": "bad arguments"}]
    following = begin(session, ask(*history))
    assert following.parent is node
    commit(session, following, "y")
    assert isinstance(session.decide(ask(*history, assistant("y"), user("b"))), Begin)


def test_a_session_of_1030_turns_goes_on():
    session = make_session(context_tokens=10**6)
    history, nodes = history_of(session, 1030)
    assert begin(session, ask(*history)).parent is nodes[-1]
    assert len(trained(session)[0]) == 1030
