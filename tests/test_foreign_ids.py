"""Ids that the model does not have end a real engine: none of them gets there, whatever a checkpoint says."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import ask, ask_tokens, begin, make_session, owner_after, turn_of, user
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.errors import BadRequest
from rollout_ft.session.session import Replay
from rollout_ft.session.tree import ids_bytes, outside
from rollout_ft.testing.plain import VOCAB_SIZE
from rollout_ft.types import Partial, Turn, VersionSpan

FOREIGN = [VOCAB_SIZE, 99_999, 2**31 - 1, -1]


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20))
def test_outside_is_what_no_row_of_the_embedding_has(ids: list[int]):
    assert outside(ids_bytes(ids), VOCAB_SIZE) == any(not 0 <= i < VOCAB_SIZE for i in ids)


def first_turn() -> Turn:
    session = make_session()
    return turn_of(begin(session, ask(user("a"))), "b", session)


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("where", ["prompt_ids", "output_ids"])
def test_a_checkpoint_of_another_model_generates_nothing_and_still_tells_what_it_has(where: str, foreign: int):
    turn = first_turn()
    turn = dataclasses.replace(turn, **{where: ids_bytes([5, foreign])})
    session = owner_after(make_session(), turn)
    for request in (ask(user("a"), {"role": "assistant", "content": "b"}, user("c")), ask(user("new")), ask_tokens([1, 2])):
        with pytest.raises(BadRequest, match="another model") as e:
            session.decide(request)
        assert e.value.code == "foreign_tokens"
    assert isinstance(session.decide(ask(user("a"))), Replay)


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_partial_with_such_an_id_is_not_continued(foreign: int):
    session = make_session()
    flight = begin(session, ask(user("a")))
    for ids, used in (([7, 8], True), ([7, foreign], False)):
        spans = (VersionSpan("v0", 0, 2),)
        partial = Partial(session.entry_key(flight.key), "rid", "r", flight.prompt_digest, ids_bytes(ids), b"\0" * 8, spans, 1, 0)
        again = make_session()
        again.restore([], [partial])
        assert (begin(again, ask(user("a"))).partial is not None) == used
