"""Which rows of routed experts a turn has, when its engine calls break off at any place."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.engine.capture import CHARS, Capture, Shape, digest_of

SHAPE = Shape(1, 3, 256)


def encoded(rows: Any) -> bytes:
    return base64.b64encode(np.asarray(rows, "<i4").tobytes())


def rows_of(payload: bytes, shape: Shape = SHAPE) -> list[list[int]]:
    return np.frombuffer(payload, np.dtype(shape.dtype).newbyteorder("<")).reshape(-1, shape.ids).tolist()


@dataclass
class Engine:
    """The tokens of a turn so far, and for each the call that sampled it; a row names its token, its place and its call."""

    prompt: int
    tokens: list[int] = field(default_factory=list[int])
    sampled_by: list[int] = field(default_factory=list[int])
    calls: int = 0

    def call(self, start: int, count: int) -> list[list[int]]:
        self.calls += 1
        self.tokens += [100 + (7 * self.calls + i) % 100 for i in range(count)]
        self.sampled_by += [self.calls] * count
        return [self.row(i, self.calls) for i in range(start, self.prompt + len(self.tokens) - 1)]

    def row(self, i: int, call: int) -> list[int]:
        return [i % 100 if i < self.prompt else self.tokens[i - self.prompt], i % 256, call]

    def cut(self, keep: int) -> None:
        del self.tokens[keep:], self.sampled_by[keep:]


CALL = st.tuples(
    st.integers(0, 5),
    st.sampled_from(["sent", "sent", "lost", "short", "nothing"]),
    st.integers(0, 3),  # how many tokens are dropped in front of the next call
)


@given(prompt=st.integers(1, 8), before=st.integers(0, 7), calls=st.lists(CALL, max_size=6), adopted=st.integers(0, 4))
def test_every_row_is_that_of_its_token_and_a_substitute_is_marked(prompt: int, before: int, calls: list[Any], adopted: int):
    start = max(0, min(before, prompt) - 1)
    engine, capture = Engine(prompt), Capture(SHAPE, start, prompt - 1)
    engine.call(0, adopted)  # by an engine that is gone
    for count, how, dropped in [*calls, (1, "sent", 0)]:
        kept, asked = len(engine.tokens), capture.end
        assert start <= asked <= prompt + kept
        rows = engine.call(asked, count)
        if how == "sent":
            capture.take(kept, len(engine.tokens), encoded(rows))
        elif how == "short":
            capture.take(kept, len(engine.tokens), encoded(rows[1:]) if rows else b"AAAA")
        elif how == "nothing":
            capture.take(kept, len(engine.tokens), b"")
        if dropped:
            engine.cut(max(0, len(engine.tokens) - dropped))
            capture.cut(len(engine.tokens))
    packed = capture.packed()
    total = prompt + len(engine.tokens) - 1
    if total == start:
        assert packed.routed is None
        return
    routed = packed.routed
    assert routed is not None
    assert (routed.start, routed.rows) == (start, total - start)
    found = rows_of(packed.payload)
    for i, row in enumerate(found, start):
        assert row == engine.row(i, row[2])
    made_by = {prompt - 1 + n: call for n, call in enumerate(engine.sampled_by)}
    again = {i for i, row in enumerate(found, start) if made_by.get(i, row[2]) != row[2]}
    assert {i for a, b in routed.substituted for i in range(a, b)} == again
    assert routed.digest == digest_of(packed.payload)


def test_a_turn_of_one_call_has_all_its_rows_and_no_substitute():
    capture = Capture(SHAPE, 4, 9)
    capture.take(0, 3, encoded([[i, 0, 0] for i in range(4, 12)]))
    packed = capture.packed()
    assert packed.routed is not None
    assert (packed.routed.start, packed.routed.rows, packed.routed.substituted, packed.trouble) == (4, 8, (), "")
    assert [row[0] for row in rows_of(packed.payload)] == list(range(4, 12))


def test_rows_of_tokens_that_another_engine_sampled_are_substitutes():
    capture = Capture(SHAPE, 0, 9)
    capture.take(5, 8, encoded(np.zeros((17, 3))))
    routed = capture.packed().routed
    assert routed is not None
    assert routed.substituted == ((9, 14),)


def test_what_an_aborted_call_sent_is_kept_and_not_asked_for_again():
    capture = Capture(SHAPE, 0, 9)
    capture.take(0, 5, encoded(np.zeros((14, 3))))
    assert capture.end == 14
    capture.take(5, 8, encoded(np.ones((3, 3))))
    packed = capture.packed()
    assert packed.routed is not None
    assert (packed.routed.rows, packed.routed.substituted) == (17, ())
    assert [row[0] for row in rows_of(packed.payload)] == [0] * 14 + [1] * 3


def test_an_engine_that_computed_tokens_twice_gives_substitutes():
    capture = Capture(SHAPE, 0, 9)
    capture.take(0, 5, encoded(np.zeros((14, 3))), recaptured=True)
    routed = capture.packed().routed
    assert routed is not None
    assert routed.substituted == ((9, 14),)


@pytest.mark.parametrize(
    ("data", "trouble"),
    [
        (b"", "none came"),
        (encoded(np.zeros((13, 3))), "expected"),
        (encoded(np.full((14, 3), 256)), "none of 256"),
        (encoded(np.full((14, 3), -1)), "none of 256"),
        (b"!" + encoded(np.zeros((14, 3)))[1:], "base64"),
        (b"=" * 224, "ase64|adding"),
        ("é".encode() * 112, "base64"),
    ],
    ids=["nothing", "too few", "too large", "negative", "no base64", "padding", "no ascii"],
)
def test_what_cannot_be_right_is_dropped_and_said(data: bytes, trouble: str):
    capture = Capture(SHAPE, 0, 9)
    capture.take(0, 5, data)
    packed = capture.packed()
    assert packed.routed is None
    assert re.search(trouble, packed.trouble), packed.trouble


def test_a_piece_that_turns_out_wrong_leaves_the_rows_before_it():
    capture = Capture(SHAPE, 0, 9)
    capture.take(0, 5, encoded(np.zeros((14, 3))))
    capture.take(5, 8, encoded(np.full((3, 3), 300)))
    packed = capture.packed()
    assert packed.routed is not None
    assert (packed.routed.rows, bool(packed.trouble)) == (14, True)


@pytest.mark.parametrize(("experts", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65536, "uint16")])
def test_ids_take_as_few_bytes_as_they_can(experts: int, dtype: str):
    shape = Shape(2, 2, experts)
    capture = Capture(shape, 0, 1)
    capture.take(0, 2, encoded(np.full((3, 4), experts - 1)))
    packed = capture.packed()
    assert packed.routed is not None
    assert packed.routed.dtype == dtype
    assert rows_of(packed.payload, shape) == [[experts - 1] * 4] * 3


def test_more_than_is_decoded_at_a_time_is_the_same():
    shape = Shape(48, 8, 128)
    ids = np.arange(1500 * shape.ids, dtype=np.int32).reshape(1500, shape.ids) % 128
    data = encoded(ids)
    assert len(data) > 2 * CHARS
    capture = Capture(shape, 0, 1000)
    capture.take(0, 500, memoryview(data))
    assert rows_of(capture.packed().payload, shape) == ids.tolist()
