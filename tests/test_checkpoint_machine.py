"""Writers, takeovers, deaths, lost calls and changes of view, in any order: what must hold after each step.

The model is small: what was acknowledged, by whom, and the highest takeover that succeeded. The stores are the real
ones; only the network between is a fake.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_checkpoint_fakes import Cluster, VirtualLoop

from rollout_ft.checkpoint.log import Append, Entry
from rollout_ft.checkpoint.mirror import Mirror
from rollout_ft.checkpoint.view import reconfigure, recover_view
from rollout_ft.errors import CommitRefused, Fenced, StoreUnavailable
from rollout_ft.types import Partial

TRIALS = ("x", "y")
seeds = st.integers(0, 2**32)
shares = st.sampled_from((0.0, 0.2, 0.5))
trials = st.sampled_from(TRIALS)
writers = st.integers(0, 2)


@dataclass
class Owner:
    """What one writer believes of one trial: its epoch, the next place, and an append whose fate it does not know."""

    epoch: int = 0
    seq: int = 0
    doubt: Append | None = None


@dataclass
class Writer:
    mirror: Mirror
    owns: dict[str, Owner] = field(default_factory=lambda: {trial: Owner() for trial in TRIALS})


class Machine(RuleBasedStateMachine):
    @initialize(min_replicas=st.sampled_from((1, 2)))
    def start(self, min_replicas: int) -> None:
        self.loop = VirtualLoop()
        self.cluster = Cluster("a", "b", min_replicas=min_replicas)
        self.network = self.cluster.network
        self.names = iter(f"learner-{n}" for n in range(1000))
        self.writers = [Writer(self.cluster.mirror(0.02, 0.02)) for _ in range(3)]
        self.acked: dict[str, list[Entry]] = {trial: [] for trial in TRIALS}
        self.taken: dict[str, tuple[int, list[Entry]]] = {trial: (0, []) for trial in TRIALS}
        self.epochs = dict.fromkeys(TRIALS, 0)
        self.serial = 0

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.calm()
            for writer in self.writers:
                self.loop.run_until_complete(writer.mirror.aclose())
            self.loop.close()

    def storm(self, seed: int, share: float) -> None:
        self.network.rng.seed(seed)
        self.network.share = share

    def calm(self) -> None:
        self.network.share = 0.0

    async def commit(self, writer: Writer, trial: str, give_up: bool = False) -> None:
        """One commit; after one in doubt the same again, or with `give_up` (a mistake) another at its place."""
        owner = writer.owns[trial]
        if owner.doubt is None or give_up:
            self.serial += 1
            entry = Entry("turn", f"turn-{self.serial}", f"{owner.epoch}".encode())
            owner.doubt = Append(trial, 1, owner.epoch, owner.seq, entry)
        append, fence = owner.doubt, self.taken[trial][0]
        try:
            await writer.mirror.commit(append)
        except StoreUnavailable:
            return
        except (CommitRefused, Fenced):
            owner.epoch, owner.doubt = 0, None
            return
        assert append.owner_epoch >= fence, "a fenced writer was acknowledged"
        if append.entry not in self.acked[trial]:
            self.acked[trial].append(append.entry)
        owner.seq, owner.doubt = append.seq + 1, None

    async def take(self, writer: Writer, trial: str) -> None:
        self.epochs[trial] += 1
        epoch, acked = self.epochs[trial], list(self.acked[trial])
        owner = writer.owns[trial]
        try:
            adopted = await writer.mirror.takeover(trial, 1, epoch)
        except (StoreUnavailable, Fenced):
            return
        assert adopted.entries[: len(acked)] == acked, "a takeover missed what was acknowledged"
        committed = {entry.key for entry in adopted.entries}
        assert not committed & {partial.turn_key for partial in adopted.partials}
        self.acked[trial] = list(adopted.entries)
        owner.epoch, owner.seq, owner.doubt = epoch, len(adopted.entries), None
        self.taken[trial] = max(self.taken[trial], (epoch, adopted.entries), key=lambda pair: pair[0])

    async def change_view(self, learner: bool) -> None:
        name = None
        if learner:
            name = next(self.names)
            self.cluster.add(name)
        try:
            view = await reconfigure(self.cluster.view, self.cluster.ports(), name, call_timeout_s=0.05)
        except (StoreUnavailable, ValueError):
            return
        self.cluster.view = view

    @rule(seed=seeds, share=shares, trial=trials, count=st.integers(1, 3), give_up=st.booleans())
    def the_owner_commits(self, seed: int, share: float, trial: str, count: int, give_up: bool) -> None:
        writer = max(self.writers, key=lambda writer: writer.owns[trial].epoch)
        self.storm(seed, share)
        for _ in range(count):
            if writer.owns[trial].epoch:
                self.loop.run_until_complete(self.commit(writer, trial, give_up))

    @rule(seed=seeds, share=shares, who=writers, trial=trials)
    def somebody_commits(self, seed: int, share: float, who: int, trial: str) -> None:
        if self.writers[who].owns[trial].epoch:
            self.storm(seed, share)
            self.loop.run_until_complete(self.commit(self.writers[who], trial))

    @rule(seed=seeds, share=shares, who=writers, trial=trials)
    def takes_over(self, seed: int, share: float, who: int, trial: str) -> None:
        self.storm(seed, share)
        self.loop.run_until_complete(self.take(self.writers[who], trial))

    @rule(seed=seeds, share=shares, learner=st.booleans())
    def changes_the_view(self, seed: int, share: float, learner: bool) -> None:
        self.storm(seed, share)
        self.loop.run_until_complete(self.change_view(learner))

    @rule(seed=seeds, share=shares, learner=st.booleans(), who=writers, trial=trials)
    def everything_at_once(self, seed: int, share: float, learner: bool, who: int, trial: str) -> None:
        """Commits of every owner, one takeover and a change of view, interleaved."""
        self.storm(seed, share)

        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.change_view(learner))
                for writer in self.writers:
                    for name, owner in writer.owns.items():
                        if owner.epoch and not (writer is self.writers[who] and name == trial):
                            group.create_task(self.commit(writer, name))
                group.create_task(self.take(self.writers[who], trial))

        self.loop.run_until_complete(main())

    @rule(who=writers, trial=trials, key=st.integers(0, 3))
    def reports_a_partial(self, who: int, trial: str, key: int) -> None:
        self.calm()
        owner = self.writers[who].owns[trial]
        partial = Partial(f"turn-{self.serial + key}", "rid", "", "", b"", b"", (), 1)
        self.loop.run_until_complete(self.writers[who].mirror.put_partials([(trial, 1, owner.epoch, partial)]))

    @rule()
    def late_calls_arrive(self) -> None:
        self.calm()
        self.loop.run_until_complete(self.network.deliver_late())

    @precondition(lambda self: len(self.survivors()) > 1)
    @rule(which=st.integers(0, 7))
    def a_member_dies(self, which: int) -> None:
        members = self.survivors()
        self.network.dead.add(members[which % len(members)])

    @rule(seed=seeds, share=shares)
    def the_supervisor_is_rebuilt(self, seed: int, share: float) -> None:
        self.storm(seed, share)
        before = self.cluster.view.number
        recovering = recover_view(self.cluster.ports(), at_least=before, call_timeout_s=0.05)
        try:
            self.cluster.view = self.loop.run_until_complete(recovering)
        except StoreUnavailable:
            return
        assert self.cluster.view.number > before

    def survivors(self) -> list[str]:
        """Live stores on which the highest view of all was opened; the last of them must not die."""
        live = {name: store for name, store in self.cluster.stores.items() if name not in self.network.dead}
        views = {name: self.loop.run_until_complete(store.standing()).view for name, store in live.items()}
        highest = max(view.number for view in views.values() if view)
        return [name for name, view in views.items() if view and view.number == highest and name in view.members]

    def logs(self, trial: str) -> dict[str, list[Entry]]:
        members = [name for name in self.cluster.view.members if name not in self.network.dead]
        stores = {name: self.cluster.stores[name] for name in members}
        return {name: self.loop.run_until_complete(store.read(trial)) for name, store in stores.items()}

    @invariant()
    def what_was_acknowledged_is_on_every_member_exactly_once(self) -> None:
        for trial in TRIALS if hasattr(self, "loop") else ():
            for name, log in self.logs(trial).items():
                assert log[: len(self.acked[trial])] == self.acked[trial], name
                assert len({entry.key for entry in log}) == len(log), name

    @invariant()
    def the_members_logs_are_prefixes_of_each_other(self) -> None:
        for trial in TRIALS if hasattr(self, "loop") else ():
            logs = sorted(self.logs(trial).values(), key=len)
            for shorter, longer in pairwise(logs):
                assert longer[: len(shorter)] == shorter

    @invariant()
    def nothing_of_a_fenced_writer_is_stored_after_the_fence(self) -> None:
        for trial in TRIALS if hasattr(self, "loop") else ():
            epoch, adopted = self.taken[trial]
            for log in self.logs(trial).values():
                assert all(int(entry.payload) >= epoch for entry in log[len(adopted) :])

    @invariant()
    def a_view_can_always_be_found_again(self) -> None:
        if hasattr(self, "loop"):
            assert self.survivors()


Machine.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
TestEverythingThatCanHappen = pytest.mark.timeout(300)(Machine.TestCase)
