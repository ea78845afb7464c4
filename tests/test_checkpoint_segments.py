"""Where payloads lie: sealing changes the place of a payload and nothing else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.log import Append, Entry
from rollout_ft.checkpoint.segments import LARGE_BYTES, SEAL_BYTES, SEAL_ENTRIES, Memory, Segments
from rollout_ft.checkpoint.store import Store
from rollout_ft.checkpoint.view import View

pytestmark = pytest.mark.timeout(60)

sizes = st.one_of(st.integers(0, 50), st.integers(LARGE_BYTES - 1, LARGE_BYTES + 1))


class Shelf:
    """An object store that counts, and can be full."""

    def __init__(self) -> None:
        self.kept: list[list[bytes]] = []
        self.full = False

    def put(self, payloads: list[bytes]) -> int:
        if self.full:
            raise MemoryError("the object store is full")
        self.kept.append(payloads)
        return len(self.kept) - 1

    async def get(self, ref: Any) -> list[bytes]:
        return self.kept[ref]


@given(st.lists(sizes, max_size=150), st.integers(0, 160))
def test_whatever_was_sealed_is_read_back_in_order(lengths: list[int], start: int) -> None:
    shelf = Shelf()
    segments = Segments(Memory(shelf.put, shelf.get))
    payloads = [str(number).encode().ljust(length, b".") for number, length in enumerate(lengths)]
    for number, payload in enumerate(payloads):
        segments.append(payload)
        if number % 40 == 39:
            segments.seal()
    assert asyncio.run(segments.read(start)) == payloads[start:]
    assert asyncio.run(segments.read(0, start)) == payloads[:start]
    assert segments.total_bytes == sum(map(len, payloads))


def test_a_segment_is_sealed_by_count_and_by_size_and_a_large_payload_goes_alone() -> None:
    shelf = Shelf()
    segments = Segments(Memory(shelf.put, shelf.get))
    for _ in range(SEAL_ENTRIES + 1):
        segments.append(b"x")
    assert [len(each) for each in shelf.kept] == [SEAL_ENTRIES]
    segments.append(b"x" * (LARGE_BYTES + 1))
    assert len(shelf.kept[1]) == 1
    for _ in range(SEAL_BYTES // LARGE_BYTES + 1):
        segments.append(b"x" * LARGE_BYTES)
    assert len(shelf.kept) == 3


def test_a_full_object_store_costs_memory_and_no_payload() -> None:
    shelf = Shelf()
    segments = Segments(Memory(shelf.put, shelf.get))
    shelf.full = True
    segments.append(b"x" * (LARGE_BYTES + 1))
    for _ in range(SEAL_ENTRIES):
        segments.append(b"y")
    shelf.full = False
    segments.append(b"z")
    segments.seal()
    assert [len(payload) for payload in asyncio.run(segments.read())] == [LARGE_BYTES + 1, *[1] * (SEAL_ENTRIES + 1)]


def test_the_outcome_of_a_trial_seals_what_is_left_of_it() -> None:
    async def main() -> None:
        shelf = Shelf()
        store = Store("a", View(1, ("a",), 1), put=shelf.put, get=shelf.get)
        entries = [Entry("turn", "k", b"1"), Entry("outcome", "", b"2")]
        appends = [Append("t", 1, 1, seq, entry) for seq, entry in enumerate(entries)]
        await store.append_many(1, wire.join([wire.encode_append(append) for append in appends]))
        assert shelf.kept == [[b"1", b"2"]]
        assert await store.read("t") == entries
        described = await store.describe()
        assert (described["trials"], described["entries"], described["bytes"]) == (1, 2, 2)

    asyncio.run(main())
