"""A store is killed at every point of its journal, and on a disk that is full: what it acknowledged is there afterwards.

Seeds come from JOURNAL_SEED (default 1); a failure names the child's command line, which kills at the same place again.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from journal_child import payload

from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.journal import Journal, journal_path
from rollout_ft.checkpoint.log import Append, Entry
from rollout_ft.checkpoint.offline import Trials
from rollout_ft.checkpoint.reading import Reading
from rollout_ft.checkpoint.records import JournalInUse, Located, trial_of
from rollout_ft.checkpoint.store import Store
from rollout_ft.checkpoint.view import View
from rollout_ft.errors import ConfigError, StoreUnavailable

pytestmark = pytest.mark.timeout(180)

SEED = int(os.environ.get("JOURNAL_SEED", "1"))
POINTS = [
    "before write", "written", "synced", "segment made", "manifest written", "manifest synced", "manifest renamed",
    "segment named", "segment dropped",
]  # fmt: skip
LONGEST = 400
"""Acknowledgements after which a child that did not end itself is killed."""


class Killed:
    """A child that has ended by SIGKILL, and what it had acknowledged. `command` does the same again."""

    def __init__(self, folder: Path, seed: int, *point: str, acks: int = LONGEST) -> None:
        self.kept: dict[str, int] = {}
        self.released: set[str] = set()
        child_file = str(Path(__file__).parent / "journal_child.py")
        self.command = [sys.executable, child_file, str(folder), str(seed), *point]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
        with subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            assert child.stdout is not None
            for number, line in enumerate(child.stdout):
                self._note(*line.split())
                if number == acks:
                    child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL, self.again

    def _note(self, what: str, trial_id: str, *seq: str) -> None:
        if what == "kept":
            self.kept[trial_id] = int(seq[0]) + 1
        else:
            self.released.add(trial_id)

    @property
    def again(self) -> str:
        return f"again: {' '.join(self.command)}"


async def check(folder: Path, killed: Killed) -> None:
    """Everything acknowledged is there, to its reader and to the store's next start, and the store goes on from it."""
    offline = Trials(folder, "a")
    assert (offline.refused, offline.damage) == ({}, []), killed.again
    store = Store("a", View(1, ("a",), 1), str(folder))
    heads = await store.heads()
    assert heads == offline.heads(), killed.again
    for trial_id, length in killed.kept.items():
        head = heads[trial_id]
        if trial_id in killed.released:
            assert (head.released, await store.note(trial_id)) == (True, trial_id.encode()), killed.again
        if head.released:
            continue
        entries = await store.read(trial_id)
        assert len(entries) >= length, killed.again
        assert entries == [Entry("turn", f"key-{seq}", payload(trial_id, seq)) for seq in range(len(entries))], killed.again
        assert entries == offline.entries(trial_id), killed.again
        entry = Entry("turn", f"key-{len(entries)}", payload(trial_id, len(entries)))
        batch = wire.join([wire.encode_append(Append(trial_id, 1, 1, len(entries), entry))])
        assert wire.decode_results(await store.append_many(1, batch)) == [None], killed.again
    heads = await store.heads()
    store.close()
    assert Trials(folder, "a").heads() == heads, killed.again


@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("point", POINTS)
def test_what_was_acknowledged_survives_a_kill_at_each_point_of_the_journal(tmp_path: Path, point: str, number: int) -> None:
    asyncio.run(check(tmp_path, Killed(tmp_path, SEED, point, str(number))))


@pytest.mark.parametrize("seed", range(SEED, SEED + 6))
def test_what_was_acknowledged_survives_a_kill_at_any_point_again_and_again(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    folder = tmp_path / "journal"
    killed = Killed(folder, seed, "any", str(rng.randint(1, 600)))
    asyncio.run(check(folder, killed))


@pytest.mark.parametrize("seed", range(SEED, SEED + 12))
def test_what_was_acknowledged_survives_a_kill_in_the_middle_of_a_write(tmp_path: Path, seed: int) -> None:
    killed = Killed(tmp_path, seed, "torn", str(random.Random(seed).randint(1, 150)))
    asyncio.run(check(tmp_path, killed))


@pytest.mark.parametrize("seed", range(SEED, SEED + 4))
def test_what_was_acknowledged_survives_a_kill_at_any_moment(tmp_path: Path, seed: int) -> None:
    asyncio.run(check(tmp_path, Killed(tmp_path, seed, acks=random.Random(seed).randrange(LONGEST))))


def test_a_full_segment_is_there_only_for_trials_that_live(tmp_path: Path) -> None:
    killed = Killed(tmp_path, SEED)
    asyncio.run(check(tmp_path, killed))
    lives = {trial_id for trial_id, head in Trials(tmp_path, "a").heads().items() if not head.released}
    held: dict[int, set[str]] = {}
    for item in Reading(journal_path(tmp_path, "a")):
        assert isinstance(item, Located)
        held.setdefault(item.place.segment, set()).add(trial_of(item.record))
    del held[0]  # the manifest
    assert len(held) == len(list(journal_path(tmp_path, "a").glob("*.segment")))
    assert [segment for segment, trials in held.items() if not trials & lives and segment != max(held)] == []


def test_another_process_cannot_write_a_journal_and_can_read_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "a")
    list(journal.replay())
    script = (
        "import sys\nfrom rollout_ft.checkpoint.offline import Trials\nfrom rollout_ft.checkpoint.store import Store\n"
        "assert Trials(sys.argv[1], 'a').heads() == {}\nStore('a', None, sys.argv[1])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    second = subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert second.returncode == 1
    assert f"{JournalInUse.__name__}: {journal.path} is being written by another process" in second.stderr
    journal.close()


async def fill_up(store: Store, size: int = 20_000) -> int:
    """Commits until the store says no; how many it acknowledged."""
    for seq in range(10_000):
        entry = Entry("turn", f"key-{seq}", bytes(size))
        batch = wire.join([wire.encode_append(Append("t", 1, 1, seq, entry))])
        try:
            await store.append_many(1, batch)
        except StoreUnavailable:
            with pytest.raises(StoreUnavailable, match="cannot be written"):
                await store.append_many(1, batch)
            return seq
    raise AssertionError("the disk never became full")


async def read_back(folder: Path, acknowledged: int) -> None:
    assert len(Trials(folder, "a").entries("t")) == acknowledged
    store = Store("a", None, str(folder))
    assert len(await store.read("t")) == acknowledged
    store.close()


def test_a_file_that_may_not_grow_fails_commits_and_costs_nothing_acknowledged(tmp_path: Path) -> None:
    async def main() -> int:
        store = Store("a", View(1, ("a",), 1), str(tmp_path))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        try:
            return await fill_up(store)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            store.close()

    acknowledged = asyncio.run(main())
    assert acknowledged == 24
    asyncio.run(read_back(tmp_path, acknowledged))


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], stderr=subprocess.DEVNULL, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=2m", "none", str(folder)):
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_fails_commits_and_costs_nothing_acknowledged(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout_ft.checkpoint.journal.SEGMENT_BYTES", 300_000)

    async def main() -> int:
        store = Store("a", View(1, ("a",), 1), str(small_disk))
        acknowledged = await fill_up(store)
        store.close()
        return acknowledged

    acknowledged = asyncio.run(main())
    assert acknowledged > 90
    asyncio.run(read_back(small_disk, acknowledged))


def test_a_disk_that_cannot_be_written_refuses_the_store_and_can_be_read(small_disk: Path) -> None:
    async def main() -> None:
        store = Store("a", View(1, ("a",), 1), str(small_disk))
        batch = wire.join([wire.encode_append(Append("t", 1, 1, 0, Entry("turn", "k", b"kept")))])
        await store.append_many(1, batch)
        store.close()

    asyncio.run(main())
    assert mount("-o", "remount,ro", str(small_disk))
    with pytest.raises(ConfigError, match=r"store\.journal_dir: .* cannot be written: Read-only file system"):
        Store("a", None, str(small_disk))
    assert [entry.payload for entry in Trials(small_disk, "a").entries("t")] == [b"kept"]
