"""What the checkpoint tests share: stores behind a network that loses, repeats and delays, on a clock that jumps.

The fakes are tested here as well: a fault that never happens would make every other test pass.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from rollout_ft.checkpoint.log import Append, Entry
from rollout_ft.checkpoint.mirror import Mirror
from rollout_ft.checkpoint.store import Store
from rollout_ft.checkpoint.view import View
from rollout_ft.errors import StoreUnavailable

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer as soon as nothing can run."""

    def __init__(self) -> None:
        super().__init__()
        self._virtual = 0.0

    def time(self) -> float:
        return self._virtual

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._virtual = max(self._virtual, self._scheduled[0]._when)
        super()._run_once()


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class Network:
    """Calls to stores, with faults drawn from `rng`: a lost request or reply, a repeated, late or endless call."""

    FAULTS = ("lost request", "lost reply", "twice", "late", "hangs")

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.share = 0.0
        self.dead: set[str] = set()
        self.script: list[tuple[str, str, str]] = []
        self.late: list[tuple[Store, str, tuple[Any, ...]]] = []
        self.calls: list[tuple[str, str]] = []
        self.sizes: list[int] = []

    def port(self, store: Store) -> Any:
        return Port(self, store)

    def once(self, store: str, method: str, fault: str) -> None:
        """The next call of `method` on `store` meets `fault`."""
        self.script.append((store, method, fault))

    async def call(self, store: Store, method: str, args: tuple[Any, ...]) -> Any:
        self.calls.append((store.name, method))
        if method == "append_many":
            self.sizes.append(len(args[1]))
        if self.share:
            await asyncio.sleep(self.rng.choice((0, 0, 0.0005, 0.002)))
        fault = self._fault(store.name, method)
        if store.name in self.dead or fault == "lost request":
            raise StoreUnavailable(f"{store.name} is not there")
        if fault in ("late", "hangs"):
            self.late.append((store, method, args))
            if fault == "hangs":
                await asyncio.sleep(3600)
            raise StoreUnavailable(f"{store.name}: {method} got lost, and may yet arrive")
        result = await getattr(store, method)(*args)
        if fault == "twice":
            result = await getattr(store, method)(*args)
        if fault == "lost reply" or store.name in self.dead:
            raise StoreUnavailable(f"{store.name}: {method} ran, and its reply was lost")
        return result

    async def deliver_late(self) -> None:
        late, self.late = self.late, []
        for store, method, args in late:
            if store.name not in self.dead:
                await getattr(store, method)(*args)

    def _fault(self, store: str, method: str) -> str:
        for place, (name, what, fault) in enumerate(self.script):
            if (name, what) == (store, method):
                del self.script[place]
                return fault
        return self.rng.choice(self.FAULTS) if self.rng.random() < self.share else ""


class Port:
    def __init__(self, network: Network, store: Store) -> None:
        self._network, self._store = network, store

    def __getattr__(self, method: str) -> Any:
        return lambda *args: self._network.call(self._store, method, args)


class Cluster:
    """Stores, the network to them, and the supervisor's idea of the view."""

    def __init__(self, *names: str, min_replicas: int = 1, seed: int = 0) -> None:
        self.view = View(1, names, min_replicas)
        self.network = Network(seed)
        self.stores: dict[str, Store] = {}
        for name in names:
            self.add(name, self.view)

    def add(self, name: str, view: View | None = None) -> Store:
        self.stores[name] = Store(name, view)
        return self.stores[name]

    def port(self, name: str) -> Any:
        return self.network.port(self.stores[name])

    def ports(self) -> dict[str, Any]:
        return {name: self.port(name) for name in self.stores if name not in self.network.dead}

    async def current_view(self) -> View:
        return self.view

    def mirror(self, commit_timeout_s: float = 5.0, call_timeout_s: float = 1.0) -> Mirror:
        return Mirror(self.view, self.port, self.current_view, commit_timeout_s=commit_timeout_s, call_timeout_s=call_timeout_s)


def turn(seq: int, trial_id: str = "trial", owner: tuple[int, int] = (1, 1), size: int = 8, key: str = "") -> Append:
    key = key or f"key-{seq}"
    return Append(trial_id, *owner, seq, Entry("turn", key, key.encode().ljust(size, b".")))


async def keys(store: Store, trial_id: str = "trial") -> list[str]:
    return [entry.key for entry in await store.read(trial_id)]


def test_the_virtual_clock_jumps_over_an_hour_of_sleep() -> None:
    async def main() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert run(main()) == pytest.approx(3600)


@pytest.mark.parametrize(("fault", "ran"), [("lost request", 0), ("lost reply", 1), ("twice", 1), ("late", 0)])
def test_each_fault_does_what_its_name_says(fault: str, ran: int) -> None:
    async def main() -> None:
        cluster = Cluster("a")
        cluster.network.once("a", "freeze", fault)
        if fault == "twice":
            await cluster.port("a").freeze(2)
        else:
            with pytest.raises(StoreUnavailable):
                await cluster.port("a").freeze(2)
        assert (await cluster.stores["a"].standing()).promised == 1 + ran
        await cluster.network.deliver_late()
        assert (await cluster.stores["a"].standing()).promised == (1 if fault == "lost request" else 2)

    run(main())
