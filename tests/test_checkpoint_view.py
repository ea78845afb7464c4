"""Changes of view: who survives, who joins, and what a rebuilt supervisor may believe."""

from __future__ import annotations

import asyncio

import pytest
from test_checkpoint_fakes import Cluster, keys, run, turn

from rollout_ft.checkpoint import store as store_module
from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.view import View, reconfigure, recover_view
from rollout_ft.errors import CommitRefused, DataLost, Fenced, StoreUnavailable

pytestmark = pytest.mark.timeout(60)


async def write_to(cluster: Cluster, name: str, *appends: object) -> None:
    batch = wire.join([wire.encode_append(append) for append in appends])  # type: ignore[arg-type]
    number = (await cluster.stores[name].standing()).view
    assert number is not None
    await cluster.stores[name].append_many(number.number, batch)


def test_the_survivors_of_a_dead_replica_go_on_with_everything_acknowledged() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b", "c")
        mirror = cluster.mirror()
        await mirror.commit(turn(0))
        cluster.network.dead.add("b")
        cluster.view = await reconfigure(cluster.view, cluster.ports())
        assert (cluster.view.members, cluster.view.number) == (("a", "c"), 2)
        await mirror.commit(turn(1))
        assert await keys(cluster.stores["a"]) == await keys(cluster.stores["c"]) == ["key-0", "key-1"]

    run(main())


@pytest.mark.parametrize(("longer", "fenced"), [("a", "b"), ("b", "a")])
def test_what_only_one_survivor_has_is_given_to_the_others(longer: str, fenced: str) -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        await cluster.mirror().commit(turn(0))
        await write_to(cluster, longer, turn(1), turn(0, "other"))
        await cluster.stores[fenced].fence(1, "trial", 1, 7)
        await reconfigure(cluster.view, cluster.ports())
        assert await cluster.stores["a"].heads() == await cluster.stores["b"].heads()
        head = await cluster.stores[longer].lookup("trial")
        assert head is not None
        assert (head.owner_epoch, head.length) == (7, 2)

    run(main())


def test_a_member_that_did_not_confirm_the_freeze_is_left_out_because_it_may_still_accept() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        await cluster.mirror().commit(turn(0))
        for _ in range(3):
            cluster.network.once("b", "freeze", "lost request")
        cluster.view = await reconfigure(cluster.view, cluster.ports())
        assert cluster.view.members == ("a",)

    run(main())


def test_commits_go_on_while_a_learner_copies_and_it_misses_none() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        await asyncio.gather(*(mirror.commit(turn(0, f"t{n}")) for n in range(300)))
        cluster.add("c")
        cluster.network.share = 1e-9  # delays, and no faults
        acked: list[tuple[int, int]] = []

        async def writer(n: int) -> None:
            for seq in range(1, 20):
                await mirror.commit(turn(seq, f"t{n}"))
                acked.append((n, cluster.view.number))

        async def join() -> None:
            cluster.view = await reconfigure(cluster.view, cluster.ports(), "c")

        await asyncio.gather(join(), *(writer(n) for n in range(300)))
        assert cluster.view.members == ("a", "b", "c")
        assert {number for _, number in acked} == {1, 2}
        heads = [await store.heads() for store in cluster.stores.values()]
        assert heads[0] == heads[1] == heads[2]
        assert {head.length for head in heads[2].values()} == {20}

    run(main())


def test_a_learner_takes_fences_and_released_trials_as_well() -> None:
    async def main() -> None:
        cluster = Cluster("a")
        mirror = cluster.mirror()
        await mirror.commit(turn(0, "done"))
        await cluster.stores["a"].release("done")
        await mirror.takeover("only-fenced", 3, 4)
        cluster.add("c")
        cluster.view = await reconfigure(cluster.view, cluster.ports(), "c")
        with pytest.raises(CommitRefused, match="closed"):
            await mirror.commit(turn(1, "done"))
        with pytest.raises(Fenced):
            await mirror.commit(turn(0, "only-fenced"))
        assert await cluster.stores["c"].lookup("only-fenced") == await cluster.stores["a"].lookup("only-fenced")

    run(main())


def test_a_long_log_travels_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(store_module, "EXPORT_BYTES", 100_000)
        cluster = Cluster("a")
        mirror = cluster.mirror()
        for seq in range(20):
            await mirror.commit(turn(seq, "long", size=30_000))
            await mirror.commit(turn(seq, "short"))
        await mirror.commit(turn(0, "huge", size=500_000))
        cluster.add("c")
        await reconfigure(cluster.view, cluster.ports(), "c")
        assert cluster.network.calls.count(("a", "export")) > 5
        for trial in ("long", "short", "huge"):
            assert await cluster.stores["c"].read(trial) == await cluster.stores["a"].read(trial)

    run(main())


def test_a_learner_that_dies_is_left_out_and_the_members_go_on() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        await mirror.commit(turn(0))
        cluster.add("c")
        for _ in range(3):
            cluster.network.once("c", "load", "lost request")
        cluster.view = await reconfigure(cluster.view, cluster.ports(), "c")
        assert cluster.view.members == ("a", "b")
        await mirror.commit(turn(1))

    run(main())


def test_a_store_with_a_past_cannot_join() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b", "c")
        await cluster.mirror().commit(turn(0))
        late = cluster.ports()
        cluster.view = await reconfigure(cluster.view, {name: late[name] for name in ("a", "b")})
        with pytest.raises(ValueError, match="c cannot join"):
            await reconfigure(cluster.view, late, "c")

    run(main())


@pytest.mark.parametrize("fault", ["lost request", "lost reply", "twice", "late", "hangs"])
@pytest.mark.parametrize("method", ["standing", "heads", "freeze", "export", "load", "install"])
def test_one_fault_in_a_change_of_view_costs_a_repetition_and_no_replica(method: str, fault: str) -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        await mirror.commit(turn(0))
        await write_to(cluster, "b", turn(1))
        cluster.add("c")
        for name in ("a", "b", "c"):
            cluster.network.once(name, method, fault)
        cluster.view = await reconfigure(cluster.view, cluster.ports(), "c", call_timeout_s=1)
        await cluster.network.deliver_late()
        assert cluster.view.members == ("a", "b", "c")
        await mirror.commit(turn(2))
        for store in cluster.stores.values():
            assert await keys(store) == ["key-0", "key-1", "key-2"]

    run(main())


def test_a_replica_that_fails_to_open_the_view_is_left_out_of_the_next() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        for _ in range(3):
            cluster.network.once("b", "install", "lost request")
        view = await reconfigure(cluster.view, cluster.ports())
        assert (view.members, view.number) == (("a",), 3)

    run(main())


def test_below_min_replicas_the_view_opens_for_reading_only() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b", min_replicas=2)
        mirror = cluster.mirror(commit_timeout_s=1)
        await mirror.commit(turn(0))
        cluster.network.dead.add("b")
        cluster.view = await reconfigure(cluster.view, cluster.ports())
        with pytest.raises(StoreUnavailable, match="min_replicas is 2"):
            await mirror.commit(turn(1))
        assert [entry.key for entry in await mirror.read("trial")] == ["key-0"]
        cluster.add("c")
        cluster.view = await reconfigure(cluster.view, cluster.ports(), "c")
        await mirror.commit(turn(1))
        assert await keys(cluster.stores["c"]) == ["key-0", "key-1"]

    run(main())


def test_without_a_survivor_the_loss_is_said_and_nothing_is_opened() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        old = cluster.ports()["b"]
        cluster.network.dead.add("b")
        cluster.view = await reconfigure(cluster.view, cluster.ports())
        cluster.network.dead = {"a"}
        with pytest.raises(DataLost, match="no replica of view 2"):
            await reconfigure(cluster.view, {"b": old})

    run(main())


def test_a_rebuilt_supervisor_goes_on_from_the_highest_opened_view() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b", "c")
        mirror = cluster.mirror()
        cluster.network.dead.add("c")
        cluster.view = await reconfigure(cluster.view, cluster.ports())
        await mirror.commit(turn(0))
        cluster.network.dead.clear()
        cluster.view = await recover_view(cluster.ports(), at_least=2)
        assert (cluster.view.members, cluster.view.number) == (("a", "b"), 3)
        await mirror.commit(turn(1))

    run(main())


def test_a_supervisor_that_died_between_freeze_and_install_leaves_nothing_stuck() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        mirror = cluster.mirror()
        await mirror.commit(turn(0))
        await cluster.stores["a"].freeze(2)
        cluster.view = await recover_view(cluster.ports())
        assert (cluster.view.members, cluster.view.number) == (("a", "b"), 3)
        await cluster.stores["a"].freeze(4)
        await cluster.stores["b"].freeze(4)
        await cluster.stores["b"].install(View(4, ("a", "b"), 1))
        cluster.view = await recover_view(cluster.ports())
        assert (cluster.view.members, cluster.view.number) == (("b",), 5)
        await mirror.commit(turn(1))
        assert await keys(cluster.stores["b"]) == ["key-0", "key-1"]

    run(main())


def test_a_supervisor_that_has_been_replaced_is_refused() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        await cluster.stores["a"].freeze(9)
        port = cluster.port("a")
        cluster.view = await reconfigure(cluster.view, cluster.ports())
        assert cluster.view.number == 10
        refused = await port.install(View(9, ("a",), 1))
        assert refused is not None
        assert refused.reason == "stale_view"

    run(main())


def test_recovery_says_so_when_nobody_knows() -> None:
    async def main() -> None:
        cluster = Cluster("a")
        cluster.add("blank")
        with pytest.raises(DataLost, match="opened view 5"):
            await recover_view(cluster.ports(), at_least=5)
        with pytest.raises(DataLost):
            await recover_view({"blank": cluster.port("blank")})
        with pytest.raises(DataLost):
            await recover_view({})

    run(main())


def test_a_silent_replica_is_not_taken_for_a_lost_one() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        cluster.network.dead.add("b")
        cluster.view = await reconfigure(cluster.view, cluster.ports())
        cluster.network.dead.clear()
        ports = cluster.ports()
        cluster.network.dead.add("a")
        with pytest.raises(StoreUnavailable, match="a of view 2 does not answer"):
            await reconfigure(cluster.view, ports)
        for at_least in (0, 2):
            with pytest.raises(StoreUnavailable, match="a may know a later view"):
                await recover_view(ports, at_least=at_least)
        cluster.network.dead.clear()
        assert (await recover_view(ports)).members == ("a",)

    run(main())


def test_a_replica_whose_log_differs_is_left_out_instead_of_stopping_everyone() -> None:
    async def main() -> None:
        cluster = Cluster("a", "b")
        await cluster.mirror().commit(turn(0))
        await write_to(cluster, "a", turn(1, key="mine"))
        await write_to(cluster, "b", turn(1, key="theirs"), turn(2))
        cluster.view = await reconfigure(cluster.view, cluster.ports())
        assert cluster.view.members == ("b",)

    run(main())
