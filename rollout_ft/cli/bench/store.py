"""`rollout-ft bench store`: what a commit costs, what is kept of it, and how long it takes to have it back.

Owns the order of the measurements and the names of the figures (DESIGN section 7). Prints through `storetables`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from rollout_ft.checkpoint.ports import resolve
from rollout_ft.checkpoint.store import create_store_actor
from rollout_ft.checkpoint.view import View, recover_view
from rollout_ft.cli.bench import storetables
from rollout_ft.cli.bench.commits import Size, Taken, dictionary, writer
from rollout_ft.cli.bench.machine import machine
from rollout_ft.cluster import connect
from rollout_ft.config import RayConfig
from rollout_ft.rayapi import ray
from rollout_ft.types import JSON

NAMESPACE = "bench-store"
SMALL, TURN = Size(140, 70), Size(650, 300)
"""Two kB of data, and the turn of 950 tokens that the other benchmarks take."""
FILLED_AT_ONCE = 256
SYNCS = 200


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of what; `resumed` sessions of `tokens` tokens are written and had back."""

    seconds: float
    sessions: tuple[int, ...]
    resumed: int
    tokens: int
    journal_dir: Path | None

    @property
    def turns(self) -> int:
        return max(2, self.tokens // TURN.tokens)


@dataclass(frozen=True, slots=True)
class Load:
    """One load: `kind` is `store`, `dictionary` or `snapshots`."""

    kind: str
    replicas: int
    journal: bool
    size: Size
    sessions: int
    taken: Taken

    @property
    def percentiles(self) -> tuple[float, float]:
        p50, p99 = np.percentile(self.taken.latencies_ms, [50, 99])
        return float(p50), float(p99)

    @property
    def commits_per_s(self) -> float:
        return len(self.taken.latencies_ms) / self.taken.seconds

    @property
    def sent_per_commit(self) -> float:
        return self.taken.sent / len(self.taken.latencies_ms)


@dataclass(frozen=True, slots=True)
class Resumed:
    """`kept`: bytes of one replica's process, the mean, of the `raw` ones of all trials; `disk`: of one journal."""

    raw: int
    kept: float
    disk: float
    fill_s: float
    read_back: Taken
    start_s: float
    takeovers: Taken

    @property
    def seconds(self) -> float:
        return self.start_s + self.takeovers.seconds


@dataclass(frozen=True, slots=True)
class Measured:
    """`raw`: data of a turn of each size."""

    scale: Scale
    raw: dict[Size, int]
    loads: list[Load]
    resumed: Resumed
    sync_ms: float

    def find(self, kind: str, replicas: int, journal: bool, size: Size, sessions: int) -> Load:
        wanted = (kind, replicas, journal, size, sessions)
        return next(each for each in self.loads if (each.kind, each.replicas, each.journal, each.size, each.sessions) == wanted)


class Replicas:
    """Store actors under names of their own, with or without journals."""

    def __init__(self, count: int, journal_dir: Path | None) -> None:
        self._journal_dir = str(journal_dir) if journal_dir else None
        self._handles: list[Any] = []
        self.view = View(1, tuple(f"store-{os.urandom(4).hex()}" for _ in range(count)), 1)

    async def start(self) -> None:
        """Returns when all answer: whatever their journals hold is read by then."""
        self._handles = [create_store_actor(name, NAMESPACE, self.view, self._journal_dir) for name in self.view.members]
        await asyncio.gather(*(handle.ping.remote() for handle in self._handles))

    async def again(self) -> View:
        """As after the loss of the cluster: other processes on the same journals, and the view that they make out."""
        self.kill()
        for name in self.view.members:
            while await asyncio.to_thread(_is_there, name):
                await asyncio.sleep(0.01)
        await self.start()
        return await recover_view({name: resolve(name, NAMESPACE) for name in self.view.members}, call_timeout_s=60)

    async def memory(self) -> int:
        """Of all their processes, with what they have put into the object store."""
        return sum([psutil.Process((await handle.describe.remote())["pid"]).memory_info().rss for handle in self._handles])

    def kill(self) -> None:
        for handle in self._handles:
            ray.kill(handle)


def _is_there(name: str) -> bool:
    with contextlib.suppress(ValueError):
        ray.get_actor(name, NAMESPACE)
        return True
    return False


async def bench(scale: Scale, console: Console) -> JSON:
    """Runs what `scale` asks for; prints it, and returns DESIGN section 7's object and what belongs to it."""
    facts = machine()
    console.print(storetables.of_machine(facts))
    async with _cluster(scale) as folder:
        sync_ms = _sync_ms(folder)
        loads: list[Load] = []
        raw: dict[Size, int] = {}
        for size in (SMALL, TURN):
            writes = writer(NAMESPACE, size, scale.turns)
            raw[size] = await writes.raw_bytes.remote()
            loads += [load async for load in _loads(scale, size, writes, folder, console)]
            ray.kill(writes)
        with console.status(f"{scale.resumed} sessions of {scale.turns * TURN.tokens:,} tokens, and all of them back"):
            resumed = await _resumed(scale, raw[TURN], folder)
    measured = Measured(scale, raw, loads, resumed, sync_ms)
    for table in storetables.of(measured):
        console.print(table)
    return {**figures(measured), "machine": facts}


@contextlib.asynccontextmanager
async def _cluster(scale: Scale) -> AsyncGenerator[Path]:
    """A cluster of this machine, and a folder for journals; nothing of either is left."""
    folder = Path(tempfile.mkdtemp(prefix="rft-bench-", dir=scale.journal_dir))
    data = scale.resumed * scale.turns * 12 * TURN.tokens
    cluster = await asyncio.to_thread(connect, RayConfig(address="local", namespace=NAMESPACE, object_store_bytes=2**29 + 4 * data))
    try:
        yield folder
    finally:
        await asyncio.to_thread(cluster.leave)
        shutil.rmtree(folder, ignore_errors=True)


async def _loads(scale: Scale, size: Size, writes: Any, folder: Path, console: Console) -> AsyncGenerator[Load]:
    for count, journal in ((1, False), (1, True), (2, False), (2, True)):
        replicas = Replicas(count, folder / "loads" if journal else None)
        await replicas.start()
        await writes.join.remote(replicas.view)
        await writes.commits.remote("warm", 8, scale.seconds / 4)
        for sessions in scale.sessions:
            with console.status(f"{count} replicas, journal {journal}, {size.tokens} tokens a turn, {sessions} sessions"):
                yield Load("store", count, journal, size, sessions, await writes.commits.remote(str(sessions), sessions, scale.seconds))
        replicas.kill()
        shutil.rmtree(folder / "loads", ignore_errors=True)
    plain = dictionary()
    await writes.calls.remote("warm", 8, scale.seconds / 4, plain)
    for sessions in scale.sessions:
        with console.status(f"a plain dictionary, {sessions} sessions"):
            yield Load("dictionary", 1, False, size, sessions, await writes.calls.remote(str(sessions), sessions, scale.seconds, plain))
    for sessions in scale.sessions:
        with console.status(f"full snapshots, {sessions} sessions"):
            taken = await writes.snapshots.remote(f"s{sessions}", sessions, scale.seconds, plain)
            yield Load("snapshots", 1, False, size, sessions, taken)
    ray.kill(plain)


async def _resumed(scale: Scale, raw: int, folder: Path) -> Resumed:
    writes = writer(NAMESPACE, TURN, scale.turns)
    replicas = Replicas(2, folder / "resumed")
    await replicas.start()
    await writes.join.remote(replicas.view)
    await writes.fill.remote("warm", 8, 8)
    before, written = await replicas.memory(), _bytes_of(folder)
    fill_s = await writes.fill.remote("kept", scale.resumed, FILLED_AT_ONCE)
    kept, disk = (await replicas.memory() - before) / 2, (_bytes_of(folder) - written) / 2
    read_back = await writes.takeovers.remote("kept", scale.resumed, 2)
    began = perf_counter()
    view = await replicas.again()
    start_s = perf_counter() - began
    await writes.join.remote(view)
    takeovers = await writes.takeovers.remote("kept", scale.resumed, 3)
    replicas.kill()
    ray.kill(writes)
    return Resumed(raw * scale.turns * scale.resumed, kept, disk, fill_s, read_back, start_s, takeovers)


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.segment"))


def _sync_ms(folder: Path) -> float:
    """What the disk alone takes for a write of 8 kB."""
    times: list[float] = []
    file = os.open(folder / "sync", os.O_WRONLY | os.O_CREAT)
    for _ in range(SYNCS):
        began = perf_counter()
        os.write(file, bytes(8192))
        os.fdatasync(file)
        times.append(1e3 * (perf_counter() - began))
    os.close(file)
    return float(np.median(times))


def figures(m: Measured) -> JSON:
    """Section 7's keys: two replicas without a journal, alone (`commit_ms`) and with the most sessions; then everything."""
    alone, many = m.find("store", 2, False, TURN, min(m.scale.sessions)), m.find("store", 2, False, SMALL, max(m.scale.sessions))
    return {
        "commit_ms_p50": round(alone.percentiles[0], 3), "commit_ms_p99": round(alone.percentiles[1], 3),
        "commits_per_s": round(many.commits_per_s, 1),
        "bytes_kept_ratio": round(m.resumed.kept / m.resumed.raw, 3),
        "resume_s": round(m.resumed.seconds, 2),
        "journal_bytes_ratio": round(m.resumed.disk / m.resumed.raw, 3), "fdatasync_ms": round(m.sync_ms, 3),
        "resume": {
            "sessions": m.scale.resumed, "tokens": m.scale.turns * TURN.tokens, "written_s": round(m.resumed.fill_s, 2),
            "read_back_s": round(m.resumed.read_back.seconds, 2), "stores_start_s": round(m.resumed.start_s, 2),
            "takeovers_s": round(m.resumed.takeovers.seconds, 2),
        },
        "loads": list(_loads_json(m)),
    }  # fmt: skip


def _loads_json(m: Measured) -> Iterable[JSON]:
    for each in m.loads:
        p50, p99 = each.percentiles
        yield {
            "kind": each.kind, "replicas": each.replicas, "journal": each.journal, "tokens": each.size.tokens,
            "raw_bytes": m.raw[each.size], "sessions": each.sessions, "commit_ms_p50": round(p50, 3), "commit_ms_p99": round(p99, 3),
            "commits_per_s": round(each.commits_per_s, 1), "bytes_sent_per_turn": round(each.sent_per_commit),
        }  # fmt: skip
