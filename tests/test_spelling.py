"""The ids of a path as JSON, against the ids themselves."""

from __future__ import annotations

import random

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.session import spelling
from rollout_ft.session.spelling import Spelling
from rollout_ft.session.tree import Node, Tree, ids_bytes, ids_of, path_ids
from rollout_ft.types import Turn

Ids = st.lists(st.integers(0, 200_000), max_size=4)


def turn(key: str, parent: Node | None, prompt: list[int], output: list[int], trim: int) -> Turn:
    return Turn(
        key=key, parent=parent.turn.key if parent else "", sample=0, depth=1, request_id=key, messages=b"", tools=b"",
        prompt_ids=ids_bytes(prompt), output_ids=ids_bytes(output), logprobs=b"", version_spans=(), sampling=b"{}",
        finish_reason="stop", reply=b"{}", created=1, generations=1, trim=trim,
    )  # fmt: skip


@given(turns=st.lists(st.tuples(Ids, Ids, st.integers(0, 5)), min_size=1, max_size=12), seed=st.integers(0, 2**16))
def test_any_path_in_any_order_is_spelled_as_its_ids_are(turns: list[tuple[list[int], list[int], int]], seed: int):
    tree, choose = Tree(), random.Random(seed)
    nodes: list[Node | None] = [None]
    for i, (prompt, output, trim) in enumerate(turns):
        parent = choose.choice(nodes[-2:] if choose.random() < 0.8 else nodes)
        trim = min(trim, len(path_ids(parent)) // 4)
        nodes.append(tree.add(turn(str(i), parent, prompt, output, trim)))
    spelled = Spelling()
    for _ in range(3 * len(nodes)):
        node, trim, new = choose.choice(nodes), choose.randrange(4), [choose.randrange(10) for _ in range(choose.randrange(3))]
        there = ids_of(path_ids(node))
        assert orjson.loads(b"[" + spelled.prompt(node, trim, new) + b"]") == there[: max(0, len(there) - trim)] + new


def test_a_turn_that_follows_the_last_one_spells_only_what_it_adds(monkeypatch: pytest.MonkeyPatch):
    tree, spelled = Tree(), Spelling()
    first = tree.add(turn("1", None, [1, 2], [3], 0))
    spelled.prompt(first, 0, [])
    second = tree.add(turn("2", first, [4], [5], 0))
    monkeypatch.setattr(spelling, "path_ids", None)
    assert spelled.prompt(second, 0, [6]) == b"1,2,3,4,5,6"
    assert spelled.prompt(second, 1, [7]) == b"1,2,3,4,7"
