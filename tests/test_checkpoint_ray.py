"""The same store behind real actors: a replica is killed, another joins, and everything is still there."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint_fakes import turn

from rollout_ft.checkpoint.mirror import Mirror
from rollout_ft.checkpoint.ports import RayStore, resolve
from rollout_ft.checkpoint.store import create_store_actor
from rollout_ft.checkpoint.view import View, reconfigure, recover_view
from rollout_ft.errors import Fenced, StoreUnavailable

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    settings = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    ray: Any = pytest.importorskip("ray")
    name = f"checkpoint-{uuid.uuid4().hex}"
    ray.init(address="local", num_cpus=2, include_dashboard=False, namespace=name, logging_level="ERROR")
    yield name
    ray.shutdown()
    for key, value in before.items():
        os.environ.pop(key)
        if value is not None:
            os.environ[key] = value


def writer(view: View, namespace: str, ports: dict[str, RayStore]) -> Mirror:
    async def current() -> View:
        return view

    return Mirror(view, ports.__getitem__, current, commit_timeout_s=20, call_timeout_s=10)


async def kill(port: RayStore) -> None:
    os.kill((await port.describe())["pid"], signal.SIGKILL)
    while await answers(port):
        pass


async def answers(port: RayStore) -> bool:
    try:
        await port.ping()
    except StoreUnavailable:
        return False
    return True


def test_a_killed_replica_is_replaced_by_a_learner_and_nothing_is_lost(namespace: str) -> None:
    view = View(1, ("run/store/1", "run/store/2"), 2)
    for name in view.members:
        create_store_actor(name, namespace, view)

    async def main() -> None:
        ports = {name: resolve(name, namespace) for name in (*view.members, "run/store/3")}
        mirror = writer(view, namespace, ports)
        sizes = [100, 300_000, *[2_000] * 70]
        for seq, size in enumerate(sizes):
            await mirror.commit(turn(seq, size=size))
        await asyncio.gather(*(mirror.commit(turn(0, f"trial-{n}", size=2_000)) for n in range(200)))
        await mirror.aclose()

        await kill(ports.pop("run/store/1"))
        create_store_actor("run/store/3", namespace, None)
        opened = await reconfigure(view, ports, "run/store/3")
        assert opened.members == ("run/store/2", "run/store/3")
        after = writer(opened, namespace, ports)
        adopted = await after.takeover("trial", 1, 2)
        assert [len(entry.payload) for entry in adopted.entries] == sizes
        with pytest.raises(Fenced):
            await after.commit(turn(len(sizes)))
        await after.commit(turn(len(sizes), owner=(1, 2)))
        await after.aclose()

        await kill(ports.pop("run/store/2"))
        alone = await recover_view(ports)
        assert alone.members == ("run/store/3",)
        kept = await writer(alone, namespace, ports).read("trial")
        assert [entry.key for entry in kept] == [f"key-{seq}" for seq in range(len(sizes) + 1)]
        assert len(await ports["run/store/3"].trials()) == 201
        await kill(ports["run/store/3"])

    asyncio.run(main())


def test_killed_actors_come_back_from_their_journals(namespace: str, tmp_path: Path) -> None:
    view = View(1, ("journal/1", "journal/2"), 2)

    async def main() -> None:
        ports = {name: resolve(name, namespace) for name in view.members}
        for name in view.members:
            create_store_actor(name, namespace, view, str(tmp_path))
        mirror = writer(view, namespace, ports)
        for seq in range(20):
            await mirror.commit(turn(seq))
        await mirror.aclose()
        for port in ports.values():
            await kill(port)
        ports = {name: resolve(name, namespace) for name in view.members}
        for name in view.members:
            create_store_actor(name, namespace, view, str(tmp_path))
        opened = await recover_view(ports, call_timeout_s=30)
        assert opened.members == view.members
        assert len((await writer(opened, namespace, ports).takeover("trial", 1, 2)).entries) == 20
        for port in ports.values():
            await kill(port)

    asyncio.run(main())


def test_a_store_that_does_not_exist_or_cannot_start_is_unavailable(namespace: str, tmp_path: Path) -> None:
    (tmp_path / "bad.journal").write_bytes(b"not a journal at all, but long enough")
    create_store_actor("bad", namespace, None, str(tmp_path))

    async def main() -> None:
        with pytest.raises(StoreUnavailable, match="nobody"):
            await resolve("nobody", namespace).ping()
        with pytest.raises(StoreUnavailable, match=r"bad\.journal cannot be written"):
            await resolve("bad", namespace).ping()

    asyncio.run(main())
