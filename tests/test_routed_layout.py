"""The rows of a path, out of turns that trimmed, branched, and lost theirs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson
import pytest
from conftest import ask_tokens, begin, make_session, play, turn_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from rollout_ft.engine.http import dump
from rollout_ft.samples.export import write_trajectory
from rollout_ft.samples.routed import Part, array_json, array_of, lay_out, routed_fields
from rollout_ft.samples.trajectory import routed_of, trajectory_of
from rollout_ft.session.entries import decode_entry, encode_entry
from rollout_ft.session.session import Session
from rollout_ft.types import RoutedExperts, Turn


def routed(start: int, rows: int, *substituted: tuple[int, int], dtype: str = "uint8", topk: int = 1) -> RoutedExperts:
    return RoutedExperts(start, rows, 1, topk, dtype, "digest", substituted)


def covered(ranges: Any) -> set[int]:
    return {i for a, b in ranges for i in range(a, b)}


@dataclass(frozen=True)
class Made:
    """A turn as it was made: all its path's tokens, each with the turn that added it, and its rows if it has some."""

    tokens: list[tuple[int, int]]
    rows: RoutedExperts | None


TURN = st.tuples(st.integers(1, 5), st.integers(0, 7), st.booleans(), st.tuples(st.integers(0, 9), st.integers(0, 9)))


@given(st.lists(TURN, min_size=1, max_size=8))
def test_each_row_is_of_the_first_turn_that_has_it_or_missing(script: list[Any]):
    made: list[Made] = []
    before: list[tuple[int, int]] = []
    for number, (added, trim, has, (a, b)) in enumerate(script):
        kept = before[: max(0, len(before) - trim)] if made else []
        tokens = [*kept, *((number, i) for i in range(added))]
        start = max(0, len(kept) - 1)
        again = [(start + min(a, b), start + max(a, b))] if a != b else []
        again = [(x, min(y, len(tokens) - 1)) for x, y in again if x < len(tokens) - 1]
        made.append(Made(tokens, routed(start, len(tokens) - 1 - start, *again) if has and len(tokens) - 1 > start else None))
        before = tokens
    final = made[-1].tokens
    parts = [Part(sum(owner <= n for owner, _ in final), m.rows) for n, m in enumerate(made)]
    layout = lay_out(parts)
    assert layout.rows == len(final) - 1
    source = {i: s.part for s in layout.stretches for i in range(s.start, s.end)}
    for i in range(layout.rows):
        has = [
            n for n, m in enumerate(made)
            if m.rows and m.rows.start <= i < m.rows.start + m.rows.rows and m.tokens[: i + 1] == final[: i + 1]
        ]  # fmt: skip
        assert source.get(i) == (has[0] if has else None)
        rows = made[has[0]].rows if has else None
        assert (i in covered(layout.substituted)) == (rows is not None and i in covered(rows.substituted))
    assert covered(layout.missing) == set(range(layout.rows)) - source.keys()


def test_turns_that_asked_for_what_is_new_make_a_whole_path():
    layout = lay_out([Part(5, routed(0, 4)), Part(9, routed(4, 4)), Part(12, routed(8, 3))])
    assert [(s.start, s.end, s.part) for s in layout.stretches] == [(0, 4, 0), (4, 8, 1), (8, 11, 2)]
    assert (layout.missing, layout.substituted) == ((), ())


def test_a_turn_without_rows_leaves_a_hole_that_is_named():
    layout = lay_out([Part(5, routed(0, 4)), Part(9, None), Part(12, routed(8, 3))])
    assert layout.missing == ((4, 8),)


@pytest.mark.parametrize("parts", [[], [Part(1, None)]], ids=["no turn", "one token"])
def test_a_path_of_no_rows_is_whole(parts: list[Part]):
    assert (lay_out(parts).rows, lay_out(parts).missing) == (0, ())


def test_missing_rows_are_zero_and_only_the_ranges_tell():
    fields = routed_fields([("a", 3, routed(0, 2)), ("b", 5, routed(2, 2)), ("c", 6, routed(4, 1))], {"a": b"\7\10", "c": b"\11"})
    assert fields["routed_experts"].reshape(-1).tolist() == [7, 8, 0, 0, 9]
    assert fields["routed_experts_missing"] == [[2, 4]]
    assert fields["routed_experts_partial"] is True


def test_a_path_whose_turns_have_no_rows_at_all_says_so():
    fields = routed_fields([("a", 3, None), ("b", 5, None)], {})
    assert (fields["routed_experts"], fields["routed_experts_missing"]) == (None, [[0, 4]])


def test_rows_of_another_model_are_missing():
    turns = [("a", 3, routed(0, 2)), ("b", 5, routed(2, 2, topk=2))]
    assert routed_fields(turns, {"a": b"\1\2", "b": b"\1\2\3\4"})["routed_experts_missing"] == [[2, 4]]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("shape", [(5, 3, 2), (0, 3, 2), (700_000, 1, 2)])
def test_an_array_goes_through_json_and_back(dtype: str, shape: tuple[int, ...]):
    array = (np.arange(np.prod(shape)) % 251).astype(dtype).reshape(shape)
    told = orjson.loads(orjson.dumps({"x": array_json(array)}))["x"]
    assert (told["dtype"], told["shape"]) == (dtype, list(shape))
    again = array_of(told)
    assert (again.dtype, again.shape) == (array.dtype, shape)
    assert np.array_equal(again, array)


def conversation() -> tuple[Session, dict[str, bytes]]:
    """Three turns, the third of which leaves out the token that stopped the second; the first token of a row is its own."""
    session, rows, ids = make_session(), dict[str, bytes](), [1, 2, 3]
    for number in range(3):
        flight = begin(session, ask_tokens(ids))
        before = flight.prompt_tokens - len(flight.prompt_ids) // 4
        turn = turn_of(flight, f"r{number}", session)
        path = [*ids, *np.frombuffer(turn.output_ids, "<i4").tolist()]
        start = max(0, before - 1)
        told = RoutedExperts(start, len(path) - 1 - start, 1, 2, "uint16", "d")
        turn = replace(turn, routed=told)
        rows[turn.key] = np.array([[i, p] for p, i in enumerate(path[:-1])][start:], "<u2").tobytes()
        session.committed(turn)
        ids = [*(path[:-1] if number else path), 5, 6]
    return session, rows


def test_a_path_has_a_row_for_every_token_but_the_last():
    session, rows = conversation()
    assert routed_of(session).keys() == rows.keys()
    (path,) = trajectory_of(session)(rows)["paths"]
    assert path["routed_experts"].tolist() == [[[i, p]] for p, i in enumerate(path["token_ids"][:-1].tolist())]
    assert (path["routed_experts_partial"], path["routed_experts_missing"], path["routed_experts_substituted"]) == (False, [], [])


def test_a_trajectory_says_nothing_of_routed_experts_where_nobody_asked_for_them(session: Session):
    play(session, ask_tokens([1, 2, 3]), "r")
    assert not any("routed" in key for path in trajectory_of(session)()["paths"] for key in path)


def test_who_has_the_log_alone_finds_all_rows_missing():
    session, _ = conversation()
    (path,) = trajectory_of(session)()["paths"]
    assert (path["routed_experts"], path["routed_experts_missing"]) == (None, [[0, len(path["token_ids"]) - 1]])


def test_an_export_has_them_as_a_tensor(tmp_path: Path):
    session, rows = conversation()
    made = orjson.loads(dump(trajectory_of(session)(rows)))
    write_trajectory(tmp_path / "t.safetensors", made, 1.0)
    tensors = load_file(tmp_path / "t.safetensors")
    assert tensors["0.routed_experts"].dtype == np.uint16
    assert tensors["0.routed_experts"][:, 0, 0].tolist() == tensors["0.token_ids"][:-1].tolist()
    without = orjson.loads(dump(trajectory_of(session)({})))
    write_trajectory(tmp_path / "t.safetensors", without, 1.0)
    assert "0.routed_experts" not in load_file(tmp_path / "t.safetensors")


def test_a_turn_that_was_recorded_before_there_were_any_is_read():
    session, _ = conversation()
    turn = next(iter(session.tree.nodes.values())).turn
    kind, payload = encode_entry(turn)
    assert decode_entry(kind, payload) == turn
    old = {k: v for k, v in msgspec.msgpack.decode(payload).items() if k != "routed"}
    read = decode_entry("turn", msgspec.msgpack.encode(old))
    assert isinstance(read, Turn)
    assert read.routed is None
