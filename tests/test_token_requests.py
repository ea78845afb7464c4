"""Requests in tokens, and prompts that leave out tokens of the path before them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import ask, ask_tokens, assistant, begin, commit, make_session, play, turn_of, user
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.errors import BadRequest
from rollout_ft.samples.trajectory import metadata, trajectory
from rollout_ft.session.session import Attach, Replay, Session
from rollout_ft.session.tree import Node, Tree, ids_of, path_ids
from rollout_ft.testing.plain import START, STOP, PlainTemplate
from rollout_ft.types import JSON, Opened, Turn

P = [1, 2, 3]


def tokens(node: Node) -> list[int]:
    return ids_of(path_ids(node))


def sent(flight: Any) -> list[int]:
    """What an engine is given."""
    return [int(i) for i in bytes(flight.input_json).split(b",")]


def test_a_request_that_starts_with_a_paths_tokens_extends_it(session: Session):
    node = play(session, ask_tokens(P), "x", delivered=False)
    whole = [*P, *b"x", STOP, 7, 8]
    flight = begin(session, ask_tokens(whole))
    assert (flight.parent, flight.trim, ids_of(flight.prompt_ids)) == (node, 0, [7, 8])
    assert sent(flight) == whole
    assert node.turn.key in session.evidence.acknowledged


def test_the_token_that_stopped_a_turn_may_be_left_out(session: Session):
    node = play(session, ask_tokens(P), "xy")
    whole = [*P, *b"xy", 7, 8]
    flight = begin(session, ask_tokens(whole))
    assert (flight.parent, flight.trim, ids_of(flight.prompt_ids)) == (node, 1, [7, 8])
    assert sent(flight) == whole
    assert tokens(commit(session, flight, "z")) == [*whole, *b"z", STOP]


def test_another_last_token_is_another_conversation(session: Session):
    play(session, ask_tokens(P), "xy")
    assert begin(session, ask_tokens([*P, *b"x", 7])).parent is None


def test_a_turn_that_said_nothing_is_not_taken_for_the_prompt_again(session: Session):
    node = play(session, ask_tokens(P), "")
    assert begin(session, ask_tokens(P)).base == node.base
    assert begin(session, ask_tokens([*P, 7])).parent is None


def test_a_repeat_in_tokens_follows_the_same_table(session: Session):
    request = ask_tokens(P)
    flight = begin(session, request)
    assert session.decide(ask_tokens(P, retry=True)) == Attach(flight)
    node = commit(session, flight, "x")
    assert session.decide(ask_tokens(P)) == Replay(node, first=False)
    session.delivered(request.request_id)
    assert session.decide(ask_tokens(P, retry=True)) == Replay(node, first=False)
    assert begin(session, ask_tokens(P)).number == 1


def test_a_request_in_tokens_extends_a_turn_made_by_messages_and_the_other_way_is_a_branch(session: Session):
    first = play(session, ask(user("a")), "x")
    whole = [*tokens(first), 7, 8]
    second = play(session, ask_tokens(whole), "y")
    assert second.parent is first
    third = begin(session, ask(user("a"), assistant("x"), user("b")))
    assert third.parent is first
    assert tokens(play(session, ask_tokens([*tokens(second), 9]), "z"))[: second.tokens] == tokens(second)


def test_of_turns_with_equal_tokens_the_delivered_one_is_extended(session: Session):
    got = play(session, ask_tokens(P), "x")
    play(session, ask_tokens(P), "x", delivered=False)
    assert begin(session, ask_tokens([*P, *b"x", STOP, 7])).parent is got


def test_a_prompt_without_tokens_is_refused(session: Session):
    with pytest.raises(BadRequest, match="at least one token"):
        session.decide(ask_tokens([]))


def test_a_session_in_tokens_is_the_same_for_its_next_owner(session: Session):
    one = play(session, ask_tokens(P), "xy")
    two = play(session, ask_tokens([*P, *b"xy", 7]), "z")
    again = make_session()
    again.restore([Opened(again.spec, 1, False, 1), one.turn, two.turn], [])
    node = again.tree.nodes[two.turn.key]
    assert (tokens(node), node.token_digest, node.base) == (tokens(two), two.token_digest, two.base)
    assert isinstance(again.decide(ask_tokens([*P, *b"xy", 7], retry=True)), Replay)


def naive(nodes: list[Node], ids: list[int]) -> int:
    """The length of the longest path that the ids start with, a stop token that they lack left out."""
    best = 0
    for node in nodes:
        path, said = tokens(node), len(node.turn.output_ids) // 4
        for missing in (0, 1):
            if not said or (missing and (said < 2 or node.last_id != STOP)):
                continue
            kept = path[: len(path) - missing]
            if ids[: len(kept)] == kept:
                best = max(best, len(kept))
    return best


SMALL = st.integers(0, 2)


@given(st.data())
def test_the_search_finds_what_comparing_every_path_finds(data: st.DataObject):
    tree, nodes, paths = Tree(), list[Node](), dict[str, list[int]]()
    for i in range(data.draw(st.integers(1, 8))):
        parent = data.draw(st.none() | st.sampled_from(nodes)) if nodes else None
        output = data.draw(st.lists(SMALL, max_size=3)) + [STOP] * data.draw(st.booleans())
        prompt = data.draw(st.lists(SMALL, min_size=0 if parent else 1, max_size=3))
        trim = data.draw(st.integers(0, parent.tokens)) if parent else 0
        nodes.append(tree.add(turn(f"{i}", parent, prompt, output, trim)))
        before = paths[parent.turn.key] if parent else []
        paths[f"{i}"] = before[: len(before) - trim] + prompt + output
        assert (tokens(nodes[-1]), nodes[-1].tokens) == (paths[f"{i}"], len(paths[f"{i}"]))
    start = tokens(data.draw(st.sampled_from(nodes)))
    kept = data.draw(st.integers(0, len(start)))
    ids = start[:kept] + data.draw(st.lists(SMALL, min_size=0 if kept else 1, max_size=4))
    found, missing = tree.deepest_in_tokens(ids_bytes_of(ids), lambda node: 0, frozenset({STOP}))
    kept = tokens(found)[: found.tokens - missing] if found else []
    assert (ids[: len(kept)], len(kept)) == (kept, naive(nodes, ids))


def ids_bytes_of(ids: list[int]) -> bytes:
    return b"".join(i.to_bytes(4, "little") for i in ids)


def turn(key: str, parent: Node | None, prompt: list[int], output: list[int], trim: int) -> Turn:
    return Turn(
        key=key, parent=parent.turn.key if parent else "", sample=0, depth=1, request_id=key, messages=b"", tools=b"",
        prompt_ids=ids_bytes_of(prompt), output_ids=ids_bytes_of(output), logprobs=b"\0" * 4 * len(output), version_spans=(),
        sampling=b"{}", finish_reason="stop", reply=b"{}", created=1, generations=1, trim=trim,
    )  # fmt: skip


# Templates that drop tokens of the turn before.


class Opens(PlainTemplate):
    """The token that ends a turn belongs to the next message, as GLM's do: `append` drops it."""

    def append(self, reply: JSON, last_id: int, messages: list[JSON], tools: list[Any] | None, kwargs: JSON | None = None) -> Any:
        from rollout_ft.session.render import Suffix

        return Suffix(1 if last_id == STOP else 0, self._render(messages))


class Forgets(PlainTemplate):
    """Cannot be appended to: of what an assistant said it keeps the first letter."""

    splices = False

    def root(self, messages: list[JSON], tools: list[Any] | None, kwargs: JSON | None = None) -> list[int]:
        cut = [{**m, "content": m["content"][:1]} if m["role"] == "assistant" else m for m in messages]
        return super().root(cut, tools, kwargs)


def using(renderer: Any) -> Session:
    session = make_session()
    session._renderer = renderer
    return session


def conversation(session: Session, *replies: str) -> list[Node]:
    nodes, history = [], [user("a")]
    for i, reply in enumerate(replies):
        nodes.append(play(session, ask(*history), reply))
        history += [assistant(reply), user(f"u{i}")]
    return nodes


def trained(session: Session) -> dict[str, int]:
    found: dict[str, int] = {}
    for p in trajectory(session)["paths"]:
        for t in p["turns"]:
            found[t["turn"]] = found.get(t["turn"], 0) + int(p["loss_mask"][t["start"] : t["end"]].sum())
    return found


def test_a_stop_token_that_opens_the_next_message_is_not_in_the_path_that_goes_on():
    session = using(Opens())
    one, two = conversation(session, "xy", "z")
    assert two.turn.trim == 1
    assert tokens(two) == [*tokens(one)[:-1], *ids_of(two.turn.prompt_ids), *b"z", STOP]
    (only,) = trajectory(session)["paths"]
    assert only["token_ids"].tolist() == tokens(two)
    assert len(only["logprobs"]) == len(only["loss_mask"]) == two.tokens
    assert only["token_ids"][only["loss_mask"] == 1].tolist() == [*b"xy", *b"z", STOP]
    assert metadata(session)["retokenized"] == 0


def test_a_template_that_cannot_be_appended_to_keeps_what_it_renders_the_same():
    session = using(Forgets())
    one, two = conversation(session, "long", "z")
    kept = tokens(one)[: len(tokens(one)) - 4]
    assert (two.turn.trim, tokens(two)[: len(kept)]) == (4, kept)
    assert sent(begin(session, ask(user("a"), assistant("long"), user("u0"))))[: len(kept)] == kept
    whole = Forgets().root([user("a"), assistant("long"), user("u0")], None)
    assert tokens(two) == [*whole, *b"z", STOP]


def test_what_was_rendered_anew_is_a_path_of_its_own_and_each_sampled_token_is_trained_once():
    session = using(Forgets())
    nodes = conversation(session, "long", "longer", "z")
    made = trajectory(session)
    assert sorted(p["turns"][-1]["turn"] for p in made["paths"]) == sorted(n.turn.key for n in nodes)
    assert trained(session) == {n.turn.key: len(n.turn.output_ids) // 4 for n in nodes}
    assert metadata(session)["retokenized"] == 2
    assert metadata(session)["tokens_wasted"] == 0


def test_the_spans_of_a_turn_are_cut_with_its_tokens():
    session = using(Forgets())
    conversation(session, "long", "z")
    long = max(trajectory(session)["paths"], key=lambda p: len(p["turns"]))
    first = long["turns"][0]
    assert bytes(long["token_ids"][first["start"] : first["end"]].tolist()) == b"l"
    assert [s["end"] - s["start"] for s in long["version_spans"]] == [1, 2]


def test_the_partial_of_another_prompt_is_not_continued(session: Session):
    play(session, ask_tokens([*P, 4]), "xy")
    flight = begin(session, ask_tokens([*P, 4, *b"xy", 7]))
    appended = replace(turn_of(flight, "", session), trim=0)
    tree = Tree()
    for node in session.tree.nodes.values():
        tree.add(node.turn)
    assert tree.add(appended).token_digest != tree.add(replace(appended, key="other", trim=1)).token_digest


def test_a_message_marker_is_no_text():
    assert PlainTemplate().text([START, *b"a", STOP]) == "a"
