"""Payloads beside the log: on one replica, within a limit, of the owner alone, and fixed by the commit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from test_checkpoint_fakes import Cluster, turn

from rollout_ft.checkpoint import payloads
from rollout_ft.checkpoint.mirror import Mirror
from rollout_ft.checkpoint.payloads import Label, Shelf, decode_label, encode_label
from rollout_ft.checkpoint.segments import keep, kept


def label(key: str = "key-1", digest: str = "d", trial: str = "trial", owner: tuple[int, int] = (1, 1)) -> Label:
    return Label(trial, *owner, key, digest)


def writer(cluster: Cluster, copies: int = 1, timeout_s: float = 5.0) -> Mirror:
    return Mirror(
        cluster.view, cluster.port, cluster.current_view, commit_timeout_s=timeout_s, call_timeout_s=timeout_s, payload_copies=copies
    )


def played(play: Callable[[Cluster, Mirror], Awaitable[None]], *names: str, copies: int = 1) -> None:
    async def main() -> None:
        cluster = Cluster(*(names or ("a", "b", "c")))
        mirror = writer(cluster, copies)
        await mirror.commit(turn(0))
        await play(cluster, mirror)

    asyncio.run(main())


async def holders(cluster: Cluster, key: str = "key-1", digest: str = "d") -> list[str]:
    return [name for name, store in cluster.stores.items() if await store.payload("trial", key, digest) is not None]


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_payload_is_on_as_many_replicas_as_configured(copies: int):
    async def play(cluster: Cluster, mirror: Mirror) -> None:
        assert await mirror.payloads.put(label(), b"rows") == copies
        assert len(await holders(cluster)) == copies
        assert await mirror.payloads.fetch("trial", {"key-1": "d"}) == {"key-1": b"rows"}

    played(play, copies=copies)


def test_trials_are_spread_over_the_replicas():
    async def main() -> None:
        cluster = Cluster("a", "b", "c")
        mirror = writer(cluster)
        for n in range(30):
            await mirror.commit(turn(0, f"t{n}"))
            await mirror.payloads.put(label(trial=f"t{n}"), b"1")
        assert min([(await store.describe())["payload_bytes"] for store in cluster.stores.values()]) > 3

    asyncio.run(main())


def test_a_replica_that_does_not_answer_is_passed_over():
    async def play(cluster: Cluster, mirror: Mirror) -> None:
        await mirror.payloads.put(label(), b"rows")
        (first,) = await holders(cluster)
        cluster.network.dead.add(first)
        assert await mirror.payloads.put(label("key-2"), b"rows") == 1
        assert first not in await holders(cluster, "key-2")

    played(play)


def test_a_replica_that_hangs_costs_one_payload_the_wait_and_takes_them_again_later(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(payloads, "SHUN_S", 0.3)

    async def play(cluster: Cluster, mirror: Mirror) -> None:
        impatient = writer(cluster, timeout_s=0.2)
        await impatient.payloads.put(label("key-20"), b"rows")
        (first,) = await holders(cluster, "key-20")
        cluster.network.once(first, "put_payload", "hangs")
        names = [f"key-{n}" for n in range(1, 9)]
        cluster.network.calls.clear()
        assert await asyncio.gather(*(impatient.payloads.put(label(name), b"x") for name in names)) == [1] * 8
        assert cluster.network.calls.count((first, "put_payload")) == 1
        while await impatient.payloads.put(label("key-9"), b"x") and first not in await holders(cluster, "key-9"):
            await asyncio.sleep(0)

    played(play)


def test_with_its_last_copy_a_payload_is_gone_and_the_others_are_still_found():
    async def play(cluster: Cluster, mirror: Mirror) -> None:
        await mirror.payloads.put(label(), b"rows")
        (first,) = await holders(cluster)
        cluster.network.dead.add(first)
        await mirror.payloads.put(label("key-2"), b"more")
        assert await mirror.payloads.fetch("trial", {"key-1": "d", "key-2": "d"}) == {"key-2": b"more"}

    played(play)


def test_a_replica_that_hangs_is_waited_for_once():
    async def play(cluster: Cluster, mirror: Mirror) -> None:
        names = [f"key-{n}" for n in range(2, 12)]
        for name in names:
            await mirror.payloads.put(label(name), b"x")
        (holder,) = await holders(cluster, names[0])
        for _ in names:
            cluster.network.once(holder, "payload", "hangs")
        cluster.network.calls.clear()
        impatient = writer(cluster, timeout_s=0.2)
        assert await impatient.payloads.fetch("trial", dict.fromkeys(names, "d")) == {}
        assert cluster.network.calls.count((holder, "payload")) <= 4

    played(play)


def test_when_no_replica_takes_it_none_has_it_and_nothing_is_raised():
    async def play(cluster: Cluster, mirror: Mirror) -> None:
        cluster.network.dead.update("abc")
        assert await mirror.payloads.put(label(), b"rows") == 0

    played(play)


@pytest.mark.parametrize("owner", [(1, 0), (1, 2), (2, 1)])
def test_only_the_owner_brings_payloads(owner: tuple[int, int]):
    async def play(cluster: Cluster, mirror: Mirror) -> None:
        assert await mirror.payloads.put(label(owner=owner), b"rows") == 0

    played(play)


def test_an_owner_that_was_fenced_brings_none():
    async def play(cluster: Cluster, mirror: Mirror) -> None:
        await writer(cluster).takeover("trial", 1, 2)
        assert await mirror.payloads.put(label(), b"old") == 0
        assert await mirror.payloads.put(label(owner=(1, 2)), b"new") == 1

    played(play)


def test_until_the_commit_another_may_take_its_place_and_then_none():
    async def play(cluster: Cluster, mirror: Mirror) -> None:
        await mirror.payloads.put(label(digest="one"), b"one")
        await mirror.payloads.put(label(digest="two"), b"twos")
        assert (await holders(cluster, digest="one"), len(await holders(cluster, digest="two"))) == ([], 1)
        await mirror.commit(turn(1))
        assert await mirror.payloads.put(label(digest="three"), b"three") == 0
        assert await mirror.payloads.put(label(digest="two"), b"twos") == 1
        assert sum([(await s.describe())["payload_bytes"] for s in cluster.stores.values()]) == 4

    played(play)


def test_a_trial_that_is_released_holds_no_payloads():
    async def play(cluster: Cluster, mirror: Mirror) -> None:
        await mirror.payloads.put(label(), b"rows")
        store = cluster.stores["a"]
        assert (await store.describe())["payload_bytes"] == 4
        await store.release("trial")
        assert (await store.describe())["payload_bytes"] == 0
        assert await mirror.payloads.fetch("trial", {"key-1": "d"}) == {}
        assert await mirror.payloads.put(label("key-2"), b"rows") == 0

    played(play, "a")


def test_what_is_beyond_the_limit_is_not_kept():
    async def main() -> None:
        shelf = Shelf(keep, kept, 10)
        assert await shelf.keep(label("1"), b"6bytes")
        assert not await shelf.keep(label("2"), b"5byte")
        assert await shelf.keep(label("3"), b"4byt")
        shelf.release("trial")
        assert shelf.used == 0

    asyncio.run(main())


def test_a_payload_that_another_overtakes_is_not_kept():
    async def main() -> None:
        go, put = threading.Event(), list[Any]()

        def slow(payloads: list[bytes]) -> Any:
            put.append(payloads)
            if payloads == [b"first"]:
                go.wait(10)
            return payloads

        shelf = Shelf(slow, kept, 100)
        first = asyncio.create_task(shelf.keep(label(digest="first"), b"first"))
        while not put:
            await asyncio.sleep(0)
        assert not shelf.has("trial", "key-1", "first")
        assert await shelf.keep(label(digest="second"), b"second")
        go.set()
        assert not await first
        assert await shelf.read("trial", "key-1", "second") == b"second"
        assert shelf.used == 6

    asyncio.run(main())


def test_an_object_store_that_refuses_costs_the_payload_and_nothing_else():
    async def main() -> None:
        def full(payloads: list[bytes]) -> Any:
            raise MemoryError

        shelf = Shelf(full, kept, 100)
        assert not await shelf.keep(label(), b"rows")
        assert (shelf.used, await shelf.read("trial", "key-1", "d")) == (0, None)

    asyncio.run(main())


def test_a_label_travels_as_it_is():
    assert decode_label(bytearray(encode_label(label()))) == label()
