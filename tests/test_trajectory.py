"""Committed turns to what is trained on: what is in it, and what is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from conftest import ask, assistant, begin, commit, make_session, play, turn_of, user
from safetensors import safe_open

from rollout_ft.engine.http import dump
from rollout_ft.samples.export import write_trajectory
from rollout_ft.samples.trajectory import metadata, records, trajectory
from rollout_ft.session.session import Session
from rollout_ft.session.tree import Node, ids_of, path
from rollout_ft.types import Opened, SessionSpec, VersionSpan


def turns_of(made: dict[str, Any]) -> list[list[str]]:
    return [[t["turn"] for t in p["turns"]] for p in made["paths"]]


def conversation(session: Session, count: int, start: str = "a") -> tuple[list[dict[str, Any]], list[Node]]:
    """`count` turns, one on the other; the messages up to the last reply and the turns."""
    messages, nodes = [user(start)], []
    for i in range(count):
        nodes.append(play(session, ask(*messages), f"r{i}"))
        messages += [assistant(f"r{i}"), user(f"u{i}")]
    return messages[:-1], nodes


def tree(session: Session) -> list[Node]:
    """Two branches behind a common beginning, a root of its own, a phantom, and a sample that was thrown away."""
    messages, nodes = conversation(session, 3)
    other = play(session, ask(*messages[:2], user("other way")), "o")
    root = play(session, ask(user("summary")), "s")
    play(session, ask(user("summary"), assistant("s"), user("lost")), "p", delivered=False)
    play(session, ask(user("summary"), assistant("s"), user("again")), "thrown away")
    last = play(session, ask(user("summary"), assistant("s"), user("again")), "kept")
    return [*nodes, other, root, last]


def test_a_session_without_turns_has_no_paths(session: Session):
    assert trajectory(session)["paths"] == []


def test_a_path_is_all_tokens_from_the_root_with_what_was_sampled_marked(session: Session):
    _, nodes = conversation(session, 3)
    (only,) = trajectory(session)["paths"]
    assert only["token_ids"].tolist() == [i for n in nodes for i in ids_of(n.turn.prompt_ids) + ids_of(n.turn.output_ids)]
    lengths = [(len(n.turn.prompt_ids) // 4, len(n.turn.output_ids) // 4) for n in nodes]
    assert only["loss_mask"].tolist() == [m for asked, said in lengths for m in [0] * asked + [1] * said]
    assert len(only["logprobs"]) == len(only["token_ids"])
    assert (only["token_ids"].dtype, only["loss_mask"].dtype, only["logprobs"].dtype) == (np.int32, np.int8, np.float32)


def test_the_span_of_a_turn_is_exactly_its_sampled_tokens(session: Session):
    _, nodes = conversation(session, 3)
    (only,) = trajectory(session)["paths"]
    found = [only["token_ids"][t["start"] : t["end"]].tolist() for t in only["turns"]]
    assert found == [ids_of(n.turn.output_ids) for n in nodes]


def test_logprobs_stand_at_their_tokens_and_are_zero_elsewhere(session: Session):
    flight = begin(session, ask(user("a")))
    turn = turn_of(flight, "xyz", session)
    turn = replace(turn, logprobs=np.array([-1, -2, -3, -4], "<f4").tobytes())
    session.committed(turn)
    session.delivered(turn.request_id)
    (only,) = trajectory(session)["paths"]
    assert only["logprobs"].tolist() == [0.0] * (len(turn.prompt_ids) // 4) + [-1, -2, -3, -4]


def test_version_spans_count_from_the_start_of_the_path(session: Session):
    _, (first, second) = conversation(session, 2)
    (only,) = trajectory(session)["paths"]
    starts = [t["start"] for t in only["turns"]]
    assert only["version_spans"] == [
        {"version": "v0", "start": start, "end": start + len(n.turn.output_ids) // 4}
        for start, n in zip(starts, (first, second), strict=True)
    ]


def test_a_turn_sampled_under_two_versions_has_a_span_for_each(session: Session):
    turn = turn_of(begin(session, ask(user("a"))), "xyz", session)
    session.committed(replace(turn, version_spans=(VersionSpan("v0", 0, 1), VersionSpan("v1", 1, 4))))
    (only,) = trajectory(session)["paths"]
    at = len(turn.prompt_ids) // 4
    assert only["version_spans"] == [{"version": "v0", "start": at, "end": at + 1}, {"version": "v1", "start": at + 1, "end": at + 4}]


def test_every_branch_is_a_path_with_the_common_turns_in_each(session: Session):
    messages, nodes = conversation(session, 2)
    other = play(session, ask(*messages[:2], user("other way")), "o")
    play(session, ask(*messages[:2], user("other way"), assistant("o"), user("on")), "end")
    session.decide(ask(*messages, user("on")))
    made = turns_of(trajectory(session))
    assert [p[0] for p in made] == [nodes[0].turn.key] * 2
    assert {p[1] for p in made} == {nodes[1].turn.key, other.turn.key}


def test_each_sampled_token_is_trained_in_exactly_one_path(session: Session):
    messages, nodes = conversation(session, 3)
    session.decide(ask(*messages, user("on")))
    for i in range(3):
        branch = [*messages[:2], user(f"way {i}")]
        play(session, ask(*branch), "b")
        session.decide(ask(*branch, assistant("b"), user("on")))
    made = trajectory(session)
    assert len(made["paths"]) == 4
    trained: dict[str, int] = {}
    for p in made["paths"]:
        for t in p["turns"]:
            trained[t["turn"]] = trained.get(t["turn"], 0) + int(p["loss_mask"][t["start"] : t["end"]].sum())
    assert trained == {k: len(session.tree.nodes[k].turn.output_ids) // 4 for k in trained}
    assert {n.turn.key for n in nodes} <= set(trained)


def test_a_phantom_that_nobody_asked_for_again_is_left_out(session: Session):
    first = play(session, ask(user("a")), "x")
    phantom = play(session, ask(user("a"), assistant("x"), user("b")), "lost", delivered=False)
    last = play(session, ask(user("a"), assistant("x"), user("c")), "y")
    assert turns_of(trajectory(session)) == [[first.turn.key, last.turn.key]]
    assert phantom.turn.key in session.tree.nodes
    assert metadata(session)["phantoms"] == 1


def test_a_phantom_that_was_served_later_is_in(session: Session):
    phantom = play(session, ask(user("a")), "x", delivered=False)
    play(session, ask(user("a"), assistant("x"), user("b")), "y")
    (only,) = trajectory(session)["paths"]
    assert (only["turns"][0]["turn"], only["turns"][0]["evidence"]) == (phantom.turn.key, "acknowledged")


def test_the_last_answer_is_uncertain_while_its_delivery_is_unproven(session: Session):
    play(session, ask(user("a")), "x")
    request = ask(user("a"), assistant("x"), user("b"))
    play(session, request, "y", delivered=False)
    (only,) = trajectory(session)["paths"]
    assert [t["evidence"] for t in only["turns"]] == ["acknowledged", "uncertain"]
    session.delivered(request.request_id)
    (only,) = trajectory(session)["paths"]
    assert [t["evidence"] for t in only["turns"]] == ["acknowledged", "delivered"]


def test_samples_that_were_thrown_away_are_left_out(session: Session):
    thrown = [play(session, ask(user("a")), text) for text in ("one", "two")]
    kept = play(session, ask(user("a")), "three")
    session.decide(ask(user("a"), assistant("three"), user("b")))
    assert turns_of(trajectory(session)) == [[kept.turn.key]]
    assert metadata(session)["tokens_wasted"] == sum(len(n.turn.output_ids) // 4 for n in thrown)


def test_a_sample_that_was_lost_after_another_arrived_is_not_the_last_answer(session: Session):
    got = play(session, ask(user("a")), "got")
    play(session, ask(user("a")), "lost", delivered=False)
    assert turns_of(trajectory(session)) == [[got.turn.key]]


def test_only_what_the_final_attempt_asked_for_is_in(session: Session):
    _, nodes = conversation(session, 3)
    spec = SessionSpec("t1")
    again = make_session()
    again.restore([Opened(spec, 1, False, 1), *(n.turn for n in nodes), Opened(spec, 2, True, 2)], [])
    assert trajectory(again)["paths"] == []
    request = ask(user("a"))
    decision = again.decide(request)
    again.replayed(decision.node, request)  # type: ignore[union-attr]
    assert turns_of(trajectory(again)) == [[nodes[0].turn.key]]


def test_tokens_generated_are_those_in_the_trajectory_and_those_wasted(session: Session):
    tree(session)
    flight = begin(session, ask(user("another root")))
    session.committed(replace(turn_of(flight, "long", session), tokens_wasted=7, tokens_reused=2, generations=3))
    made = trajectory(session)
    m, trained = made["metadata"], sum(int(p["loss_mask"].sum()) for p in made["paths"])
    total = sum(len(n.turn.output_ids) // 4 for n in session.tree.nodes.values())
    assert m["tokens_generated"] == total + 7 == trained + m["tokens_wasted"]
    assert (m["tokens_reused"], m["turns_committed"]) == (2, len(session.tree.nodes))
    assert m["generations"] == len(session.tree.nodes) + 2
    assert m["turns_in_trajectory"] == len({t for p in turns_of(made) for t in p}) < m["turns_committed"]


def test_records_are_the_requests_and_replies_of_the_last_path(session: Session):
    messages, nodes = conversation(session, 3)
    made = records(session)
    assert [r["turn"] for r in made["records"]] == [n.turn.key for n in nodes]
    assert [r["request"]["messages"] for r in made["records"]] == [messages[:1], messages[:3], messages[:5]]
    assert [r["response"]["message"]["content"] for r in made["records"]] == ["r0", "r1", "r2"]


# Evidence decides, never the order of commits.


def test_a_phantom_root_is_left_out(session: Session):
    play(session, ask(user("a")), "phantom", delivered=False)
    served = play(session, ask(user("a, changed")), "x")
    assert turns_of(trajectory(session)) == [[served.turn.key]]


@pytest.mark.parametrize("report", [True, False])
def test_a_phantom_that_is_committed_after_the_served_retry_is_left_out(session: Session, report: bool):
    slow = begin(session, ask(user("a")))
    served = play(session, ask(user("a")), "served", delivered=report)
    late = commit(session, slow, "late")
    assert turns_of(trajectory(session)) == [[served.turn.key]]
    play(session, ask(user("a"), assistant("served"), user("b")), "y")
    assert late.turn.key not in {t for p in turns_of(trajectory(session)) for t in p}
    assert metadata(session)["phantoms"] == 1


@pytest.mark.parametrize("report", [True, False])
@pytest.mark.parametrize("changed", [True, False])
def test_a_phantom_that_is_committed_after_the_served_final_turn_is_left_out(session: Session, report: bool, changed: bool):
    first = play(session, ask(user("a")), "x")
    history = [user("a"), assistant("x")]
    slow = begin(session, ask(*history, user("b, as it was") if changed else user("b")))
    final = play(session, ask(*history, user("b")), "final", delivered=report)
    commit(session, slow, "late")
    (only,) = trajectory(session)["paths"]
    assert [t["turn"] for t in only["turns"]] == [first.turn.key, final.turn.key]
    assert only["evidence"] == ("delivered" if report else "uncertain")


def test_a_phantom_root_that_is_committed_last_is_left_out(session: Session):
    slow = begin(session, ask(user("old")))
    final = play(session, ask(user("new")), "final")
    commit(session, slow, "late")
    assert turns_of(trajectory(session)) == [[final.turn.key]]


def test_the_last_turn_of_a_sub_agent_is_in(session: Session):
    _, nodes = conversation(session, 2)
    sub = play(session, ask(user("find it")), "found")
    last = play(session, ask(user("a"), assistant("r0"), user("u0"), assistant("r1"), user("found")), "done")
    made = trajectory(session)
    assert {p["turns"][-1]["turn"]: p["evidence"] for p in made["paths"]} == {sub.turn.key: "delivered", last.turn.key: "delivered"}
    assert made["metadata"]["turns_in_trajectory"] == len(nodes) + 2


def test_every_path_says_what_shows_that_a_client_has_it(session: Session):
    messages, _ = conversation(session, 2)
    play(session, ask(*messages, user("lost")), "p", delivered=False)
    play(session, ask(user("other")), "o")
    play(session, ask(user("last")), "l", delivered=False)
    assert [p["evidence"] for p in trajectory(session)["paths"]] == ["acknowledged", "delivered", "uncertain"]


def thrown_away(resampled: str = "drop") -> tuple[Session, Node, Node, Node]:
    session = make_session(resampled=resampled)
    first = play(session, ask(user("a")), "x")
    again = [user("a"), assistant("x"), user("b")]
    thrown = play(session, ask(*again), "unreadable")
    kept = play(session, ask(*again), "kept")
    play(session, ask(*again, assistant("kept"), user("c")), "end")
    return session, first, thrown, kept


def test_what_was_thrown_away_and_asked_for_again_is_counted_and_dropped():
    session, _, thrown, _ = thrown_away()
    assert all(thrown.turn.key not in p for p in turns_of(trajectory(session)))
    assert metadata(session)["resampled"] == 1


def test_what_was_thrown_away_and_asked_for_again_can_be_exported_with_a_mark():
    session, first, thrown, _ = thrown_away("export")
    kept, marked = trajectory(session)["paths"]
    assert ([p["resampled"] for p in (kept, marked)], marked["evidence"]) == ([False, True], "delivered")
    assert [t["turn"] for t in marked["turns"]] == [first.turn.key, thrown.turn.key]
    trained = [int(marked["loss_mask"][t["start"] : t["end"]].sum()) for t in marked["turns"]]
    assert trained == [0, len("unreadable") + 1], "what paths share is trained by those that are always there"
    assert metadata(session)["resampled"] == 1


def test_votes_that_were_not_built_upon_are_resampled(session: Session):
    votes = [begin(session, ask(user("a"))) for _ in range(3)]
    for i, flight in enumerate(votes):
        (request_id,) = flight.joined
        commit(session, flight, f"v{i}")
        session.delivered(request_id)
    after = play(session, ask(user("a"), assistant("v0"), user("b")), "x", delivered=False)
    assert turns_of(trajectory(session)) == [[votes[0].key, after.turn.key]]
    assert metadata(session)["resampled"] == 2


def test_the_last_sample_is_kept_where_an_earlier_one_was_built_upon_first(session: Session):
    play(session, ask(user("a")), "x")
    on = play(session, ask(user("a"), assistant("x"), user("b")), "y")
    last = play(session, ask(user("a")), "z")
    assert {p[-1] for p in turns_of(trajectory(session))} == {on.turn.key, last.turn.key}
    assert metadata(session)["resampled"] == 0


@pytest.mark.parametrize("resampled", ["drop", "export"])
def test_every_committed_turn_is_in_the_trajectory_a_phantom_or_resampled(resampled: str):
    session = make_session(resampled=resampled)
    tree(session)
    m = metadata(session)
    left_out = m["resampled"] if resampled == "drop" else 0
    assert m["turns_committed"] == m["turns_in_trajectory"] + m["phantoms"] + left_out
    assert (m["phantoms"], m["resampled"]) == (1, 1)


# Files.


def read(file: Path) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """As a trainer without this package reads it."""
    with safe_open(file, framework="numpy") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a dict
        return tensors, orjson.loads(f.metadata()["trial"])


@pytest.mark.parametrize("reward", [None, 0.0, 1.5])
def test_a_file_holds_the_whole_trajectory(tmp_path: Path, session: Session, reward: float | None):
    tree(session)
    made = trajectory(session)
    write_trajectory(tmp_path / "t.1.safetensors", made, reward)
    tensors, rest = read(tmp_path / "t.1.safetensors")
    assert rest.pop("reward") == reward
    for i, p in enumerate(made["paths"]):
        for name in ("token_ids", "loss_mask", "logprobs"):
            assert (tensors.pop(f"{i}.{name}") == p.pop(name)).all()
    assert tensors == {}
    assert rest == orjson.loads(orjson.dumps(made))


def test_the_tensors_have_the_types_that_trainers_expect(tmp_path: Path, session: Session):
    conversation(session, 1)
    write_trajectory(tmp_path / "t.safetensors", trajectory(session), 1.0)
    tensors, _ = read(tmp_path / "t.safetensors")
    assert {k: v.dtype.name for k, v in tensors.items()} == {"0.token_ids": "int32", "0.loss_mask": "int8", "0.logprobs": "float32"}


def test_a_trajectory_as_it_came_over_http_is_the_same_file(tmp_path: Path, session: Session):
    tree(session)
    made = trajectory(session)
    write_trajectory(tmp_path / "here.safetensors", made, 1.0)
    write_trajectory(tmp_path / "there.safetensors", orjson.loads(orjson.dumps(made, option=orjson.OPT_SERIALIZE_NUMPY)), 1.0)
    (here, rest), (there, other) = read(tmp_path / "here.safetensors"), read(tmp_path / "there.safetensors")
    assert rest == other
    assert {k: v.tobytes() for k, v in here.items()} == {k: v.tobytes() for k, v in there.items()}


def test_a_trial_without_turns_is_a_file_too(tmp_path: Path, session: Session):
    write_trajectory(tmp_path / "t.safetensors", trajectory(session), None)
    tensors, rest = read(tmp_path / "t.safetensors")
    assert (tensors, rest["paths"], rest["reward"]) == ({}, [], None)


def test_a_file_replaces_an_older_one_and_leaves_nothing_beside_it(tmp_path: Path, session: Session):
    file = tmp_path / "t.safetensors"
    write_trajectory(file, trajectory(session), None)
    conversation(session, 1)
    write_trajectory(file, trajectory(session), 1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    assert read(file)[1]["reward"] == 1.0


def test_the_leaves_of_a_branching_session_are_its_ends(session: Session):
    nodes = tree(session)
    made = turns_of(trajectory(session))
    assert all([n.turn.key for n in reversed(list(path(session.tree.nodes[p[-1]])))] == p for p in made)
    assert nodes[-1].turn.key in {p[-1] for p in made}


@pytest.mark.parametrize("asked", [[user("a")], [user("a"), assistant("x"), user("b")]], ids=["first", "later"])
def test_a_reply_that_a_harness_rejects_with_a_note_is_resampled(session: Session, asked: list[dict[str, Any]]):
    """It leaves the reply out of the history, says what was wrong, and asks again."""
    if len(asked) > 1:
        play(session, ask(user("a")), "x")
    rejected = play(session, ask(*asked), "no call at all")
    kept = play(session, ask(*asked, user("no tool call found: try again")), "fine")
    (only,) = turns_of(trajectory(session))
    assert only[-1] == kept.turn.key
    assert rejected.turn.key not in only
    assert metadata(session)["resampled"] == 1


def test_what_was_asked_beside_it_does_not_reject_a_reply(session: Session):
    one, two = play(session, ask(user("a")), "x"), play(session, ask(user("b")), "y")
    assert sorted(turns_of(trajectory(session))) == sorted([[one.turn.key], [two.turn.key]])


@pytest.mark.parametrize("length", [0, 1, 8191, 8192, 8193, 20_000])
def test_an_array_that_is_written_bit_by_bit_is_the_same(length: int):
    values = {"a": np.arange(length, dtype=np.int32), "b": np.linspace(-9, 0, length, dtype=np.float32)}
    assert orjson.loads(dump(values)) == orjson.loads(orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY))
