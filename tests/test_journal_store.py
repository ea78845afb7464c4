"""A store on a damaged journal: the trial is refused, the others go on, and another replica makes it whole."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from test_checkpoint_fakes import turn

from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.journal import journal_path
from rollout_ft.checkpoint.log import Refused
from rollout_ft.checkpoint.mirror import Mirror
from rollout_ft.checkpoint.offline import Trials
from rollout_ft.checkpoint.records import JournalDamaged
from rollout_ft.checkpoint.store import Store
from rollout_ft.checkpoint.view import View, reconfigure, recover_view
from rollout_ft.errors import CommitRefused

pytestmark = pytest.mark.timeout(60)

VIEW = View(1, ("a", "b"), 1)


def start(folder: Path, *names: str) -> dict[str, Store]:
    return {name: Store(name, VIEW if name in VIEW.members else None, str(folder)) for name in names}


def writer(stores: dict[str, Store], view: View) -> Mirror:
    async def current() -> View:
        return view

    return Mirror(view, stores.__getitem__, current, commit_timeout_s=5, call_timeout_s=5)


def close(stores: dict[str, Store]) -> None:
    for store in stores.values():
        store.close()


async def two_trials(folder: Path) -> None:
    """`hurt` and `other`, four entries each, on two replicas with journals."""
    stores = start(folder, "a", "b")
    mirror = writer(stores, VIEW)
    for seq in range(4):
        await mirror.commit(turn(seq, "hurt", size=500))
        await mirror.commit(turn(seq, "other", size=500))
    await mirror.aclose()
    close(stores)


def damage(folder: Path, name: str) -> int:
    """Flips a bit of entry 2 of `hurt`; where."""
    path = journal_path(folder, name) / "00000001.segment"
    content = bytearray(path.read_bytes())
    places = [at for at in range(len(content)) if content.startswith(b"key-2...", at)]
    content[places[0]] ^= 1
    path.write_bytes(content)
    return places[0]


def test_a_damaged_trial_is_refused_by_file_and_offset_and_the_others_go_on(tmp_path: Path) -> None:
    async def main() -> None:
        await two_trials(tmp_path)
        at = damage(tmp_path, "a")
        store = start(tmp_path, "a")["a"]
        with pytest.raises(JournalDamaged, match=r"hurt .*a\.journal/00000001\.segment: \d+ bytes at byte \d+ are damaged"):
            await store.read("hurt")
        await store.live(60)
        events = {event["event"]: event for event in (await store.renew(0))[0]}
        damaged = events["journal.damaged"]
        assert damaged["file"].endswith("a.journal/00000001.segment")
        assert damaged["offset"] <= at < damaged["offset"] + damaged["bytes"]
        assert (damaged["trials"], events["trial.refused"]["trial"]) == (["hurt"], "hurt")
        assert await store.fence(1, "hurt", 1, 2) == Refused("damaged", 2)
        batch = wire.join([wire.encode_append(turn(4, "hurt")), wire.encode_append(turn(4, "other"))])
        assert wire.decode_results(await store.append_many(1, batch)) == [Refused("damaged", 2), None]
        assert len(await store.read("other")) == 5
        store.close()

    asyncio.run(main())


def test_a_damaged_trial_is_made_whole_by_a_replica_that_has_it_and_stays_so(tmp_path: Path) -> None:
    async def main() -> None:
        await two_trials(tmp_path)
        damage(tmp_path, "a")
        stores = start(tmp_path, "a", "b")
        opened = await recover_view(stores)
        assert opened.members == ("a", "b")
        adopted = await writer(stores, opened).takeover("hurt", 1, 2)
        assert [entry.key for entry in adopted.entries] == [f"key-{seq}" for seq in range(4)]
        assert len(await stores["a"].read("hurt")) == 4
        close(stores)
        assert len(Trials(tmp_path, "a").entries("hurt")) == 4

    asyncio.run(main())


def test_what_no_replica_can_vouch_for_stays_refused_also_on_those_that_join(tmp_path: Path) -> None:
    async def main() -> None:
        await two_trials(tmp_path)
        damage(tmp_path, "a")
        damage(tmp_path, "b")
        stores = start(tmp_path, "a", "b", "c")
        opened = await reconfigure(await recover_view({name: stores[name] for name in "ab"}), stores, "c")
        assert opened.members == ("a", "b", "c")
        mirror = writer(stores, opened)
        with pytest.raises(CommitRefused, match=r"damaged.*hurt"):
            await mirror.takeover("hurt", 1, 2)
        assert len((await mirror.takeover("other", 1, 2)).entries) == 4
        close(stores)
        assert set(Trials(tmp_path, "c").refused) == {"hurt"}

    asyncio.run(main())


def test_a_torn_tail_is_cut_and_reported(tmp_path: Path) -> None:
    async def main() -> None:
        await two_trials(tmp_path)
        path = journal_path(tmp_path, "a") / "00000001.segment"
        whole = path.stat().st_size
        os.truncate(path, whole - 1)
        store = start(tmp_path, "a")["a"]
        await store.live(60)
        ((torn,), _) = await store.renew(0)
        assert (torn["event"], torn["file"]) == ("journal.torn", str(path))
        assert torn["offset"] + torn["bytes"] == whole - 1
        assert path.stat().st_size == torn["offset"]
        assert (len(await store.read("hurt")), len(await store.read("other"))) == (4, 3)
        store.close()

    asyncio.run(main())


def test_a_replica_that_joins_knows_of_released_trials_what_the_others_know(tmp_path: Path) -> None:
    async def main() -> None:
        await two_trials(tmp_path)
        stores = start(tmp_path, "a", "b", "c")
        await stores["a"].release("hurt", b"what is known of it")
        opened = await reconfigure(await recover_view({name: stores[name] for name in "ab"}), stores, "c")
        assert opened.members == ("a", "b", "c")
        for store in stores.values():
            head = await store.lookup("hurt")
            assert head is not None
            assert (head.length, head.released, await store.note("hurt")) == (4, True, b"what is known of it")
            assert len(await store.read("other")) == 4
        close(stores)
        assert Trials(tmp_path, "c").note("hurt") == b"what is known of it"

    asyncio.run(main())


def test_commits_that_come_together_share_one_write_and_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        store = Store("a", View(1, ("a",), 1), str(tmp_path))
        real, syncs = os.fdatasync, list[int]()

        def counted(file: int) -> None:
            syncs.append(file)
            real(file)

        monkeypatch.setattr(os, "fdatasync", counted)
        batches = [wire.join([wire.encode_append(turn(0, f"trial-{n}"))]) for n in range(100)]
        answers = await asyncio.gather(*(store.append_many(1, batch) for batch in batches))
        assert [wire.decode_results(answer) for answer in answers] == [[None]] * 100
        assert len(syncs) <= 2
        store.close()
        assert len(Trials(tmp_path, "a").heads()) == 100

    asyncio.run(main())
