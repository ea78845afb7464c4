"""Where payloads lie: sealing changes the place of a payload and nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.journal import journal_path
from rollout_ft.checkpoint.log import Append, Entry, Refused
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


def test_a_trial_that_has_ended_is_one_object_and_its_large_payloads() -> None:
    async def main() -> None:
        shelf = Shelf()
        segments = Segments(Memory(shelf.put, shelf.get))
        payloads = [str(number).encode() * (LARGE_BYTES if number == 100 else 1) for number in range(3 * SEAL_ENTRIES)]
        for payload in payloads:
            segments.append(payload)
        segments.seal()
        before = len(shelf.kept)
        await segments.compact()
        assert len(shelf.kept[-1]) == len(payloads) - 1
        assert await segments.read() == payloads
        await segments.compact()
        assert len(shelf.kept) == before + 1

    asyncio.run(main())


def test_what_is_read_while_its_trial_is_compacted_is_what_was_written() -> None:
    async def main() -> None:
        shelf = Shelf()
        memory = Memory(shelf.put, shelf.get)
        segments = Segments(memory)
        payloads = [str(number).encode() for number in range(3 * SEAL_ENTRIES)]
        for payload in payloads:
            segments.append(payload)
        compacting: list[asyncio.Task[None]] = []

        async def slow(ref: Any) -> list[bytes]:
            memory.get = shelf.get
            compacting.append(asyncio.create_task(segments.compact()))
            await compacting[0]
            return await shelf.get(ref)

        memory.get = slow
        assert await segments.read() == payloads
        assert len(shelf.kept) == 4, "it was compacted meanwhile"

    asyncio.run(main())


def test_a_trial_that_is_released_while_it_is_compacted_takes_nothing() -> None:
    async def main() -> None:
        shelf = Shelf()
        memory = Memory(shelf.put, shelf.get, limit=2**30)
        segments = Segments(memory)

        async def released(ref: Any) -> list[bytes]:
            segments.release()
            return await shelf.get(ref)

        memory.get = released
        for _ in range(2 * SEAL_ENTRIES):
            segments.append(b"x")
        before = len(shelf.kept)
        await segments.compact()
        assert (len(shelf.kept), memory.used, len(segments)) == (before, 0, 0)

    asyncio.run(main())


def turn_of(trial_id: str, seq: int, size: int) -> bytes:
    entry = Entry("turn", f"key-{seq}", f"{trial_id} {seq} ".encode().ljust(size, b"."))
    return wire.encode_append(Append(trial_id, 1, 1, seq, entry))


async def fill(store: Store, trial_id: str, turns: int, size: int = 50_000) -> None:
    for seq in range(turns):
        assert wire.decode_results(await store.append_many(1, wire.join([turn_of(trial_id, seq, size)]))) == [None]


async def described(store: Store, what: str) -> int:
    return (await store.describe())[what]


def test_past_the_limit_the_oldest_payloads_are_on_disk_alone_and_are_read_back(tmp_path: Path) -> None:
    limit = 3 * SEAL_BYTES

    async def main() -> None:
        shelf = Shelf()
        store = Store("a", View(1, ("a",), 1), str(tmp_path), put=shelf.put, get=shelf.get, memory_bytes=limit)
        for trial_id in ("old", "new"):
            await fill(store, trial_id, 100)
        assert await described(store, "bytes") == 200 * 50_000
        assert await described(store, "bytes_in_memory") <= limit
        for trial_id in ("old", "new"):
            assert [entry.payload for entry in await store.read(trial_id)] == [
                f"{trial_id} {seq} ".encode().ljust(50_000, b".") for seq in range(100)
            ]
        store.close()
        again = Store("a", None, str(tmp_path), memory_bytes=limit)
        assert await described(again, "bytes_in_memory") <= limit
        assert (await again.read("old", 98))[1].payload.startswith(b"old 99 ")
        again.close()

    asyncio.run(main())


def test_without_a_journal_nothing_is_given_up() -> None:
    async def main() -> None:
        store = Store("a", View(1, ("a",), 1), memory_bytes=SEAL_BYTES)
        await fill(store, "t", 60)
        assert await described(store, "bytes_in_memory") == 60 * 50_000
        assert len(await store.read("t")) == 60

    asyncio.run(main())


def test_a_released_trial_takes_nothing_whose_segments_were_open_sealed_or_on_disk(tmp_path: Path) -> None:
    async def main() -> None:
        shelf = Shelf()
        store = Store("a", View(1, ("a",), 1), str(tmp_path), put=shelf.put, get=shelf.get, memory_bytes=2 * SEAL_BYTES)
        for number in range(5):
            await fill(store, f"t{number}", 30)
        for number in range(5):
            assert await store.release(f"t{number}", b"note")
            assert await store.release(f"t{number}", b"another note")
        assert (await described(store, "bytes"), await described(store, "bytes_in_memory")) == (0, 0)
        assert await store.note("t0") == b"note"
        assert await store.read("t0") == []
        batch = wire.join([turn_of("t0", 30, 8)])
        assert wire.decode_results(await store.append_many(1, batch)) == [Refused("closed", 30)]
        store.close()

    asyncio.run(main())


def test_a_journal_keeps_no_file_of_trials_that_were_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_ft.checkpoint.journal.SEGMENT_BYTES", 200_000)

    async def main() -> None:
        store = Store("a", View(1, ("a",), 1), str(tmp_path))
        await fill(store, "lives", 1)
        for number in range(40):
            await fill(store, f"t{number}", 3)
            await store.release(f"t{number}", b"note")
        files = list(journal_path(tmp_path, "a").glob("*.segment"))
        assert sum(file.stat().st_size for file in files) < 700_000
        heads = await store.heads()
        store.close()
        again = Store("a", None, str(tmp_path))
        assert await again.heads() == heads
        assert len(await again.read("lives")) == 1
        assert [await again.note(f"t{number}") for number in range(40)] == [b"note"] * 40
        again.close()

    asyncio.run(main())


def test_releases_are_remembered_up_to_a_number_and_an_id_may_then_live_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_ft.checkpoint.journal.SEGMENT_BYTES", 20_000)
    monkeypatch.setattr("rollout_ft.checkpoint.journal.MAX_RELEASED", 8)
    monkeypatch.setattr("rollout_ft.checkpoint.store.MAX_RELEASED", 8)

    async def main() -> None:
        store = Store("a", View(1, ("a",), 1), str(tmp_path))
        for number in range(100):
            await fill(store, f"t{number}", 1, size=5_000)
            await store.release(f"t{number}")
        known = await store.heads()
        assert 8 <= len(known) < 20
        assert "t0" not in known
        await fill(store, "t0", 2, size=100)
        store.close()
        again = Store("a", None, str(tmp_path))
        assert [entry.key for entry in await again.read("t0")] == ["key-0", "key-1"]
        assert "t99" in await again.heads()
        again.close()

    asyncio.run(main())
