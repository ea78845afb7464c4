"""The journal: what was acknowledged is on disk, a torn tail is cut, and damage is never taken for a tail."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint_fakes import turn

from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.journal import Journal, journal_names, journal_path
from rollout_ft.checkpoint.log import Head
from rollout_ft.checkpoint.mirror import Mirror
from rollout_ft.checkpoint.records import Appended, JournalDamaged, JournalInUse, Located, Raised, Record
from rollout_ft.checkpoint.store import Store
from rollout_ft.checkpoint.view import View, reconfigure, recover_view
from rollout_ft.errors import ConfigError, StoreUnavailable

pytestmark = pytest.mark.timeout(120)

VIEW = View(1, ("a",), 1)


async def append(store: Store, seq: int, size: int = 8, view: int = 1) -> None:
    batch = wire.join([wire.encode_append(turn(seq, size=size))])
    assert wire.decode_results(await store.append_many(view, batch)) == [None]


def records_in(folder: Path, name: str = "a") -> list[Record]:
    journal = Journal(folder, name)
    try:
        return [item.record for item in journal.replay() if isinstance(item, Located)]
    finally:
        journal.close()


def segment(folder: Path) -> Path:
    return journal_path(folder, "a") / "00000001.segment"


def fence(number: int) -> Raised:
    return Raised("trial", 1, number)


def written(folder: Path, count: int = 5) -> Path:
    """The file of a journal of `count` writes of one record each."""
    journal = Journal(folder, "a")
    list(journal.replay())
    for number in range(count):
        journal.write([fence(number)])
    journal.close()
    return segment(folder)


def test_a_store_started_on_its_journal_is_what_it_was(tmp_path: Path) -> None:
    async def before() -> dict[str, Head]:
        store = Store("a", VIEW, str(tmp_path))
        for seq in range(3):
            await append(store, seq)
        await store.fence(1, "trial", 2, 1)
        await store.fence(1, "fenced", 4, 5)
        batch = wire.join([wire.encode_append(turn(0, "released"))])
        await store.append_many(1, batch)
        await store.release("released")
        await store.freeze(7)
        await store.install(View(7, ("a",), 1))
        await store.freeze(9)
        heads = await store.heads()
        store.close()
        return heads

    async def after() -> None:
        store = Store("a", VIEW, str(tmp_path))
        standing = await store.standing()
        assert (standing.view, standing.promised) == (View(7, ("a",), 1), 9)
        assert await store.heads() == heads
        assert [entry.key for entry in await store.read("trial")] == ["key-0", "key-1", "key-2"]
        assert await store.read("released") == []
        store.close()

    heads = asyncio.run(before())
    asyncio.run(after())


def test_a_whole_cluster_comes_back_from_its_journals(tmp_path: Path) -> None:
    view = View(1, ("run/a", "run/b"), 2)

    def start(*names: str) -> dict[str, Store]:
        return {name: Store(name, view if name in view.members else None, str(tmp_path)) for name in names}

    def writer(stores: dict[str, Store], view: View) -> Mirror:
        async def current() -> View:
            return view

        return Mirror(view, stores.__getitem__, current, commit_timeout_s=5, call_timeout_s=5)

    async def before() -> None:
        stores = start("run/a", "run/b", "run/c")
        for seq in range(5):
            await writer(stores, view).commit(turn(seq))
        opened = await reconfigure(view, stores, "run/c")
        await writer(stores, opened).commit(turn(5))
        for store in stores.values():
            store.close()

    async def after() -> None:
        names = journal_names(tmp_path)
        assert names == ["run/a", "run/b", "run/c"]
        stores = start(*names)
        opened = await recover_view(stores)
        assert opened.members == ("run/a", "run/b", "run/c")
        adopted = await writer(stores, opened).takeover("trial", 1, 2)
        assert [entry.key for entry in adopted.entries] == [f"key-{seq}" for seq in range(6)]
        for store in stores.values():
            store.close()

    asyncio.run(before())
    asyncio.run(after())


CHILD = """
import asyncio, sys
from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.log import Append, Entry
from rollout_ft.checkpoint.store import Store
from rollout_ft.checkpoint.view import View

async def main():
    store = Store("a", View(1, ("a",), 1), sys.argv[1])
    seq = 0
    while True:
        entries = [Entry("turn", f"key-{seq + n}", b"x" * 3000) for n in range(3)]
        appends = [Append("trial", 1, 1, seq + n, entry) for n, entry in enumerate(entries)]
        await store.append_many(1, wire.join([wire.encode_append(each) for each in appends]))
        seq += 3
        print(seq, flush=True)

asyncio.run(main())
"""


@pytest.mark.parametrize("seed", range(4))
def test_every_acknowledged_entry_survives_a_sigkill(tmp_path: Path, seed: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    for _ in range(random.Random(seed).randrange(1, 200)):
        assert child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    acked = int(([*child.stdout] or ["0"])[-1] or 0)
    child.wait()
    child.stdout.close()

    async def read() -> list[str]:
        store = Store("a", None, str(tmp_path))
        try:
            return [entry.key for entry in await store.read("trial")]
        finally:
            store.close()

    kept = asyncio.run(read())
    assert kept == [f"key-{seq}" for seq in range(len(kept))]
    assert len(kept) >= acked


def test_a_second_writer_of_a_journal_is_refused_by_name(tmp_path: Path) -> None:
    first = Store("a", VIEW, str(tmp_path))
    with pytest.raises(JournalInUse, match=r"a\.journal"):
        Store("a", VIEW, str(tmp_path))
    first.close()
    Store("a", VIEW, str(tmp_path)).close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(cut=st.integers(1, 10_000))
def test_wherever_the_file_ends_the_whole_frames_before_are_read_and_writing_goes_on(tmp_path: Path, cut: int) -> None:
    path = written(tmp_path)
    whole = path.stat().st_size
    os.truncate(path, whole - min(cut, whole))
    kept = records_in(tmp_path)
    assert kept == [fence(number) for number in range(len(kept))]
    assert len(kept) < 5
    journal = Journal(tmp_path, "a")
    list(journal.replay())
    journal.write([fence(77)])
    journal.close()
    assert records_in(tmp_path)[-1] == fence(77)
    shutil.rmtree(path.parent)


def test_a_payload_that_imitates_a_frame_is_not_taken_for_one(tmp_path: Path) -> None:
    path = written(tmp_path / "model")
    journal = Journal(tmp_path / "victim", "a")
    list(journal.replay())
    journal.write([Appended("t", 1, 1, 0, "turn", "k", path.read_bytes()), fence(1)])
    journal.close()
    os.truncate(segment(tmp_path / "victim"), 200)
    assert records_in(tmp_path / "victim") == []


class Later(msgspec.Struct, array_like=True, tag="later"):
    """A record that a later version may know."""

    trial_id: str


def test_a_frame_with_a_good_checksum_and_no_sense_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "a")
    list(journal.replay())
    journal.write([Later("trial")])  # type: ignore[list-item]
    journal.close()
    with pytest.raises(JournalDamaged, match="makes no sense"):
        records_in(tmp_path)


def test_a_file_that_is_no_journal_is_an_error_and_stays(tmp_path: Path) -> None:
    path = journal_path(tmp_path, "a")
    path.write_bytes(b"something else altogether, and long enough")
    with pytest.raises(ConfigError, match=r"store.journal_dir: .*a\.journal cannot be written"):
        Store("a", VIEW, str(tmp_path))
    assert path.read_bytes().startswith(b"something else")


def test_a_store_whose_disk_failed_acknowledges_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        store = Store("a", VIEW, str(tmp_path))
        await append(store, 0)

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", full)
            with pytest.raises(StoreUnavailable, match="No space left"):
                await append(store, 1)
        with pytest.raises(StoreUnavailable, match="No space left"):
            await append(store, 1)
        store.close()

    asyncio.run(main())


def test_a_repeated_append_waits_for_the_write_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        store = Store("a", VIEW, str(tmp_path))
        real, order = os.fdatasync, list[str]()

        def slow(file: int) -> None:
            real(file)
            order.append("synced")

        monkeypatch.setattr(os, "fdatasync", slow)

        async def send(name: str) -> None:
            await append(store, 0)
            order.append(name)

        await asyncio.gather(send("first"), send("second"))
        assert order[0] == "synced"
        store.close()

    asyncio.run(main())


def test_a_journal_without_a_view_cannot_found_one(tmp_path: Path) -> None:
    async def copy() -> None:
        source = Store("z", View(1, ("z",), 1))
        await append(source, 0)
        learner = Store("a", None, str(tmp_path))
        await learner.freeze(2)
        exports = [export for export in await source.export([("trial", 0)]) if export]
        assert await learner.load(2, exports) is None
        learner.close()

    asyncio.run(copy())
    store = Store("a", VIEW, str(tmp_path))
    assert asyncio.run(store.standing()).view is None
    store.close()
