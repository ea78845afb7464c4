"""The writer's side: what a commit waits for, what it repeats, and when it gives up."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from test_checkpoint_fakes import Cluster, keys, run, turn

from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.log import Entry
from rollout_ft.checkpoint.mirror import MAX_QUEUED
from rollout_ft.checkpoint.view import View
from rollout_ft.errors import CommitRefused, Fenced, StoreUnavailable
from rollout_ft.types import Partial

pytestmark = pytest.mark.timeout(60)


def partial(key: str, length: int, generations: int = 1) -> Partial:
    return Partial(key, "rid", "request", "digest", b"\0" * length, b"", (), generations)


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_a_commit_returns_only_when_every_replica_has_it() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        cluster.network.once("b", "append_many", "lost request")
        commit = asyncio.create_task(mirror.commit(turn(0)))
        await settle()
        assert await keys(cluster.stores["a"]) == ["key-0"]
        assert not commit.done()
        await commit
        assert await keys(cluster.stores["b"]) == ["key-0"]

    run(main())


def test_what_arrives_during_a_call_rides_the_next_one() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        await asyncio.gather(*(mirror.commit(turn(0, f"trial-{n}")) for n in range(100)))
        assert cluster.network.calls.count(("a", "append_many")) == 1
        first = asyncio.create_task(mirror.commit(turn(1, "trial-0")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        others = [asyncio.create_task(mirror.commit(turn(1, f"trial-{n}"))) for n in range(1, 50)]
        await asyncio.gather(first, *others)
        assert cluster.network.calls.count(("a", "append_many")) == 3

    run(main())


def test_a_call_stays_below_the_inline_limit_unless_one_entry_alone_is_larger() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        sizes = [2_000] * 200 + [300_000] + [2_000] * 20
        await asyncio.gather(*(mirror.commit(turn(0, f"t{n}", size=size)) for n, size in enumerate(sizes)))
        large = [size for size in cluster.network.sizes if size > wire.CALL_BYTES + 1_000]
        assert len(large) == 2
        assert all(size < 301_000 for size in large)

    run(main())


@pytest.mark.parametrize("fault", ["lost request", "lost reply", "twice", "late", "hangs"])
@pytest.mark.parametrize("store", ["a", "b"])
def test_a_commit_survives_each_fault_and_is_stored_once(fault: str, store: str) -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        cluster.network.once(store, "append_many", fault)
        await mirror.commit(turn(0))
        await cluster.network.deliver_late()
        assert await keys(cluster.stores["a"]) == await keys(cluster.stores["b"]) == ["key-0"]

    run(main())


def test_a_writer_never_drops_a_replica_and_gives_up_when_time_is_out() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        cluster.network.dead.add("b")
        with pytest.raises(StoreUnavailable, match="b is not there"):
            await cluster.mirror(commit_timeout_s=3).commit(turn(0))
        assert 3 <= asyncio.get_running_loop().time() < 5

    run(main())


def test_a_refused_view_is_asked_for_and_the_commit_sent_again() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        cluster.view = View(2, ("a",), 1)
        await cluster.stores["a"].freeze(2)
        await cluster.stores["a"].install(cluster.view)
        await mirror.commit(turn(0))
        assert mirror.view == cluster.view
        assert await keys(cluster.stores["a"]) == ["key-0"]

    run(main())


def test_a_pushed_view_frees_a_commit_from_a_frozen_replica_at_once() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror(commit_timeout_s=60, call_timeout_s=30)
        cluster.network.once("b", "append_many", "hangs")
        commit = asyncio.create_task(mirror.commit(turn(0)))
        await settle()
        newer = View(2, ("a",), 1)
        await cluster.stores["a"].freeze(2)
        await cluster.stores["a"].install(newer)
        mirror.set_view(newer)
        mirror.set_view(View(1, ("z",), 1))
        await commit
        assert asyncio.get_running_loop().time() < 1

    run(main())


def test_below_min_replicas_a_commit_waits_and_then_names_the_setting() -> None:
    async def main() -> None:
        cluster = Cluster("a", min_replicas=2)
        mirror = cluster.mirror(commit_timeout_s=1)
        with pytest.raises(StoreUnavailable, match="min_replicas is 2"):
            await mirror.commit(turn(0))
        with pytest.raises(StoreUnavailable, match="min_replicas is 2"):
            await mirror.takeover("trial", 1, 1)
        assert await keys(cluster.stores["a"]) == []

    run(main())


def test_a_view_without_members_acknowledges_nothing() -> None:
    async def main() -> None:
        cluster = Cluster()
        with pytest.raises(StoreUnavailable):
            await cluster.mirror(commit_timeout_s=1).commit(turn(0))

    run(main())


def test_a_supervisor_that_cannot_be_asked_does_not_stop_the_repetition() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")

        async def away() -> View:
            raise StoreUnavailable("the supervisor is away")

        cluster.current_view = away  # type: ignore[method-assign]
        mirror = cluster.mirror(commit_timeout_s=2)
        cluster.network.once("a", "append_many", "lost reply")
        await mirror.commit(turn(0))
        cluster.network.dead.add("b")
        with pytest.raises(StoreUnavailable, match=r"b is not there.*supervisor is away"):
            await mirror.commit(turn(1))

    run(main())


@pytest.mark.parametrize(("owner", "reason"), [((1, 1), "stale_owner"), ((0, 9), "stale_attempt")])
def test_a_fenced_writer_is_told_so_even_when_one_replica_is_away(owner: tuple[int, int], reason: str) -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        await cluster.mirror().takeover("trial", 1, 2)
        cluster.network.dead.add("b")
        with pytest.raises(Fenced) as caught:
            await cluster.mirror().commit(turn(0, owner=owner))
        assert (caught.value.reason, caught.value.trial_id) == (reason, "trial")

    run(main())


@pytest.mark.parametrize(("seq", "reason"), [(0, "conflict"), (5, "gap")])
def test_a_refused_entry_names_its_reason_and_harms_nobody_in_the_batch(seq: int, reason: str) -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        await mirror.commit(turn(0))
        bad, good = await asyncio.gather(mirror.commit(turn(seq, key="other")), mirror.commit(turn(0, "second")), return_exceptions=True)
        assert isinstance(bad, CommitRefused)
        assert (bad.reason, bad.trial_id, bad.key, good) == (reason, "trial", "other", None)

    run(main())


def test_after_a_commit_in_doubt_only_the_same_append_may_follow() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror(commit_timeout_s=1)
        cluster.network.dead.add("b")
        with pytest.raises(StoreUnavailable):
            await mirror.commit(turn(0))
        cluster.network.dead.clear()
        with pytest.raises(CommitRefused, match="in_doubt"):
            await mirror.commit(turn(0, key="other"))
        await mirror.commit(turn(0))
        await mirror.commit(turn(1))
        assert await keys(cluster.stores["b"]) == ["key-0", "key-1"]

    run(main())


def test_a_takeover_by_the_next_owner_ends_the_doubt_and_the_late_call_is_fenced() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror(commit_timeout_s=0.01)
        for name in ("a", "b"):
            cluster.network.once(name, "append_many", "late")
            cluster.network.once(name, "append_many", "late")
        with pytest.raises(StoreUnavailable):
            await mirror.commit(turn(0))
        assert (await mirror.takeover("trial", 1, 1)).entries == []
        with pytest.raises(CommitRefused, match="in_doubt"):
            await mirror.commit(turn(0, key="other"))
        assert (await mirror.takeover("trial", 1, 2)).entries == []
        await mirror.commit(turn(0, key="other", owner=(1, 2)))
        await cluster.network.deliver_late()
        assert await keys(cluster.stores["a"]) == await keys(cluster.stores["b"]) == ["other"]

    run(main())


def test_a_takeover_that_finds_the_entry_in_doubt_settles_it() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror(commit_timeout_s=0.01)
        for name in ("a", "b"):
            cluster.network.once(name, "append_many", "lost reply")
            cluster.network.once(name, "append_many", "lost reply")
        with pytest.raises(StoreUnavailable):
            await mirror.commit(turn(0))
        assert [entry.key for entry in (await mirror.takeover("trial", 1, 1)).entries] == ["key-0"]
        await mirror.commit(turn(1))

    run(main())


def test_a_cancelled_caller_leaves_its_append_on_the_way_and_the_next_one_waits_for_it() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        cluster.network.once("b", "append_many", "lost request")
        first = asyncio.create_task(mirror.commit(turn(0)))
        await settle()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await mirror.commit(turn(1))
        assert await keys(cluster.stores["a"]) == await keys(cluster.stores["b"]) == ["key-0", "key-1"]

    run(main())


def test_the_same_append_from_two_callers_is_one_commit() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        await asyncio.gather(mirror.commit(turn(0)), mirror.commit(turn(0)))
        assert await keys(cluster.stores["a"]) == ["key-0"]

    run(main())


def test_what_never_left_the_queue_in_time_is_in_nobodys_doubt() -> None:
    async def main() -> None:
        cluster = Cluster("a")
        mirror = cluster.mirror(commit_timeout_s=1, call_timeout_s=2)
        cluster.network.once("a", "append_many", "hangs")
        large = [asyncio.create_task(mirror.commit(turn(0, f"t{n}", size=60_000))) for n in range(2)]
        for commit in large:
            with pytest.raises(StoreUnavailable):
                await commit
        with pytest.raises(CommitRefused, match="in_doubt"):
            await mirror.commit(turn(0, "t0", key="other"))
        await mirror.commit(turn(0, "t1", key="other"))

    run(main())


def test_the_queue_is_bounded() -> None:
    async def main() -> None:
        cluster = Cluster("a")
        cluster.network.dead.add("a")
        mirror = cluster.mirror(commit_timeout_s=1)
        commits = [mirror.commit(turn(0, f"t{n}")) for n in range(MAX_QUEUED + 1)]
        answers = await asyncio.gather(*commits, return_exceptions=True)
        assert all(isinstance(answer, StoreUnavailable) for answer in answers)
        assert "waiting already" in str(answers[-1])

    run(main())


def test_closing_fails_what_waits_and_what_comes() -> None:
    async def main() -> None:
        cluster = Cluster("a")
        mirror = cluster.mirror(commit_timeout_s=60, call_timeout_s=60)
        cluster.network.once("a", "append_many", "hangs")
        waiting = [asyncio.create_task(mirror.commit(turn(0, f"t{n}", size=60_000))) for n in range(3)]
        await settle()
        await mirror.aclose()
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(answer, StoreUnavailable) for answer in answers)
        with pytest.raises(StoreUnavailable):
            await mirror.commit(turn(0))

    run(main())


def test_a_takeover_adopts_what_one_replica_has_and_repairs_the_other() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        old = cluster.mirror(commit_timeout_s=1)
        for seq in range(3):
            await old.commit(turn(seq, size=50_000))
        cluster.network.dead.add("a")
        with pytest.raises(StoreUnavailable):
            await old.commit(turn(3))
        cluster.network.dead.clear()
        adopted = await cluster.mirror().takeover("trial", 1, 2)
        assert [entry.key for entry in adopted.entries] == ["key-0", "key-1", "key-2", "key-3"]
        assert adopted.head.length == 4
        assert await cluster.stores["a"].heads() == await cluster.stores["b"].heads()
        with pytest.raises(Fenced):
            await old.commit(turn(3))

    run(main())


def test_a_takeover_of_a_trial_that_nobody_knows_is_empty() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        adopted = await cluster.mirror().takeover("trial", 1, 1)
        assert (adopted.entries, adopted.partials, adopted.head.length) == ([], [], 0)
        await cluster.mirror().commit(turn(0))

    run(main())


def test_a_takeover_reads_nothing_before_every_replica_is_fenced() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        await cluster.mirror().commit(turn(0))
        cluster.network.calls.clear()
        cluster.network.once("b", "fence", "lost request")
        await cluster.mirror().takeover("trial", 1, 2)
        first_read = [method for _, method in cluster.network.calls].index("read")
        assert ("b", "fence") in cluster.network.calls[:first_read]
        assert cluster.network.calls[:first_read].count(("b", "fence")) == 2

    run(main())


def test_a_takeover_goes_on_in_the_view_that_replaced_its_own() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        await cluster.mirror().commit(turn(0))
        mirror = cluster.mirror()
        cluster.view = View(2, ("b",), 1)
        await cluster.stores["b"].freeze(2)
        await cluster.stores["b"].install(cluster.view)
        assert len((await mirror.takeover("trial", 1, 2)).entries) == 1
        cluster.network.dead.add("b")
        with pytest.raises(StoreUnavailable, match="takeover of trial"):
            await mirror.takeover("trial", 1, 3)

    run(main())


def test_of_two_takeovers_the_older_one_is_fenced() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        await cluster.mirror().takeover("trial", 2, 1)
        with pytest.raises(Fenced, match="stale_attempt"):
            await cluster.mirror().takeover("trial", 1, 7)

    run(main())


def test_logs_that_differ_are_never_adopted() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        for name in ("a", "b"):
            await cluster.stores[name].append_many(1, wire.join([wire.encode_append(turn(0, key=name))]))
        with pytest.raises(CommitRefused, match="conflict"):
            await cluster.mirror().takeover("trial", 1, 2)

    run(main())


def test_a_takeover_finds_the_furthest_partial_of_each_turn() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        await mirror.commit(turn(0))
        await mirror.put_partials([("trial", 1, 1, partial("x", 5)), ("trial", 1, 1, partial("y", 9))])
        cluster.network.once("a", "put_partials", "lost request")
        await mirror.put_partials([("trial", 1, 1, partial("x", 7)), ("trial", 1, 1, partial("y", 2, generations=2))])
        adopted = await mirror.takeover("trial", 1, 2)
        found = {each.turn_key: (each.generations, len(each.output_ids)) for each in adopted.partials}
        assert found == {"x": (1, 7), "y": (2, 2)}

    run(main())


def test_partials_are_best_effort_and_never_raise() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        cluster.network.dead |= {"a", "b"}
        await cluster.mirror().put_partials([("trial", 1, 1, partial("x", 200_000)), ("trial", 1, 1, partial("y", 1))])
        assert cluster.network.calls.count(("a", "put_partials")) == 2

    run(main())


def test_an_operator_reads_from_any_replica_that_answers() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        await mirror.commit(turn(0))
        cluster.network.dead.add("a")
        assert await mirror.read("trial") == [Entry("turn", "key-0", b"key-0...")]
        assert await mirror.read("unknown") == []
        cluster.network.dead.add("b")
        with pytest.raises(StoreUnavailable, match="b is not there"):
            await mirror.read("trial")

    run(main())


def test_a_replica_that_cannot_be_resolved_counts_as_silent() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")

        def port(name: str) -> Any:
            if name == "b":
                raise StoreUnavailable("no actor is called b")
            return cluster.network.port(cluster.stores[name])

        cluster.port = port  # type: ignore[method-assign]
        with pytest.raises(StoreUnavailable, match="no actor is called b"):
            await cluster.mirror(commit_timeout_s=1).commit(turn(0))

    run(main())
