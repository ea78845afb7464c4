"""One fault under a load of trials on several nodes: what it cost, and whether anything was lost.

Owns the order: a run, agents that record what they receive, the fault while they are at work, the verdict of `history`.
A seed gives the same fault at the same number of replies; which token it meets is the machine's affair. Ends with the
run, whose nodes are as the fault left them.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from rollout_ft import runtime
from rollout_ft.clock import monotonic, wall
from rollout_ft.config import Config
from rollout_ft.runtime import Run
from rollout_ft.session.entries import decode_entry
from rollout_ft.testing.history import History, judge
from rollout_ft.testing.load import Load
from rollout_ft.testing.machines import Machine, Machines
from rollout_ft.testing.record import chat_bodies, history_of
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import JSON, Turn

WHOLE_S = 60.0
ENDS_S = 30.0
LOOK_S = 0.05


class Blow(StrEnum):
    """What is done to the run."""

    NONE = "none"
    ENGINE_KILLED = "engine's process killed"
    ENGINE_FROZEN = "engine's process frozen"
    ENGINE_ACTOR = "engine actor killed"
    STORE_ACTOR = "store actor killed"
    STORES_IN_TURN = "two store actors killed in turn"
    NODE_KILLED = "node with a replica and an engine killed"
    SUPERVISOR_NODE = "node of the supervisor killed"
    NODE_FROZEN = "node with a replica and an engine frozen"


@dataclass(slots=True)
class Siege:
    """What came of it. `detect_s`: until an engine was declared dead; `next_token_s`: of each session that moved; `pauses_s`: of
    each trial, the longest between two replies."""

    blow: Blow
    seed: int
    results: list[TrialResult] = field(default_factory=list[TrialResult])
    detect_s: float | None = None
    next_token_s: list[float] = field(default_factory=list[float])
    pauses_s: list[float] = field(default_factory=list[float])
    replies: int = 0
    tokens_regenerated: int = 0
    complaints: list[str] = field(default_factory=list[str])
    events: list[JSON] = field(default_factory=list[JSON])

    def row(self) -> JSON:
        """A line of the table: fault, time to the next token, turns lost, tokens regenerated."""
        return {
            "fault": self.blow.value, "next_token_s": _median(self.next_token_s), "next_token_s_max": _most(self.next_token_s),
            "pause_s_max": _most(self.pauses_s), "replies": self.replies, "turns_lost": len(self.complaints),
            "tokens_regenerated": self.tokens_regenerated,
        }  # fmt: skip


def settings(address: str, directory: str, name: str, seed: int, **changed: Any) -> Config:
    """Small engines at a speed at which generations last long enough to be hit, every commit journalled."""
    data: JSON = {
        "run": name, "seed": seed, "ray": {"address": address},
        "engine": {
            "count": 3, "stream_interval_tokens": 4, "token_timeout_s": 2, "partial_flush_s": 0.25,
            "args": ["--model", "hash", "--tokens-per-s", "60", "--count-file", f"{directory}/{{engine}}.count"],
        },
        "store": {"journal_dir": f"{directory}/journal"},
        "fleet": {"kill_window_s": 5},
        "gateway": {"ping_s": 0.5},
    }  # fmt: skip
    return Config.model_validate({**data, **changed})


async def lay(
    ms: Machines, blow: Blow, seed: int, *, name: str = "siege", trials: int = 6, turns: int = 16, **changed: Any
) -> Siege:  # fmt: skip
    """Runs `trials` trials through the blow to their end."""
    siege = Siege(blow, seed)
    with tempfile.TemporaryDirectory(prefix="rft-siege-") as directory:
        config = settings(ms.address, directory, name, seed, **changed)
        tasks = [{"task_id": f"{name}-{i}", "turns": turns} for i in range(trials)]
        load = Load()
        try:
            async with runtime.start(config) as run:
                run.on_event = siege.events.append
                playing = asyncio.create_task(run.run_trials(tasks, load.agent, concurrency=trials))
                try:
                    at = await _strike(ms, run, load, siege, random.Random(seed), trials)
                    siege.results = await playing
                finally:
                    playing.cancel()
        finally:
            await load.aclose()
        history = await history_of(Path(directory, "journal"), load.received)
        siege.complaints = judge(history, chat_bodies(config))
        siege.replies = len(load.received)
        siege.tokens_regenerated = _sampled(Path(directory)) - _committed(history)
    siege.detect_s = next((e["time"] - at for e in siege.events if e["event"] == "engine.dead" and e["time"] > at), None)
    siege.next_token_s = _next_tokens(siege.events, at)
    siege.pauses_s = [max(b - a for a, b in pairwise(times)) for times in load.replies.values() if len(times) > 1]
    return siege


async def _strike(ms: Machines, run: Run, load: Load, siege: Siege, rng: random.Random, trials: int) -> float:
    """Waits until the load is at work, and strikes; returns when, on the wall clock. Sees to what has to follow."""
    wanted = rng.randint(2 * trials, 3 * trials)
    await until(lambda: len(load.received) >= wanted)
    pids: dict[str, int] = await run.supervisor.ask("pids")
    nodes: dict[str, str] = (await run.fleet())["nodes"]
    engines, stores = _roles(nodes, "engine"), _roles(nodes, "store")
    at = wall()
    match siege.blow:
        case Blow.NONE:
            pass
        case Blow.ENGINE_KILLED | Blow.ENGINE_FROZEN:
            number = signal.SIGKILL if siege.blow is Blow.ENGINE_KILLED else signal.SIGSTOP
            os.kill(_engine_of(pids[rng.choice(engines)]), number)
            await until(lambda: any(_next_tokens(siege.events, at)))
        case Blow.ENGINE_ACTOR:
            os.kill(pids[rng.choice(engines)], signal.SIGKILL)
        case Blow.STORE_ACTOR:
            os.kill(pids[rng.choice(stores)], signal.SIGKILL)
        case Blow.STORES_IN_TURN:
            rng.shuffle(stores)
            os.kill(pids[stores[0]], signal.SIGKILL)
            await _refilled(run, stores[0])
            os.kill(pids[stores[1]], signal.SIGKILL)
        case Blow.NODE_KILLED:
            _shared(ms, nodes, rng).kill()
        case Blow.SUPERVISOR_NODE:
            ms.workers[nodes[f"{run.config.run}/supervisor/1"]].kill()
        case Blow.NODE_FROZEN:
            machine = _shared(ms, nodes, rng)
            there = [pids[name] for name in (*engines, *stores) if nodes[name] == machine.node_id]
            at = wall()
            machine.freeze()
            try:
                replies = len(load.received)
                await until(lambda: any(_next_tokens(siege.events, at)) and len(load.received) >= replies + trials)
            finally:
                machine.thaw()  # while the run goes on: what was frozen tries to go on as well, and must be refused
            await until(lambda: not any(map(_runs, there)))
    return at


async def until(holds: Callable[[], bool], limit_s: float = WHOLE_S) -> None:
    """Returns when it holds. Raises TimeoutError."""
    ends = monotonic() + limit_s
    while not holds():
        if monotonic() > ends:
            raise TimeoutError(f"not within {limit_s:g} s")
        await asyncio.sleep(LOOK_S)


async def whole(run: Run) -> None:
    """Returns when all engines serve and the view has all its replicas. Raises TimeoutError."""
    async with asyncio.timeout(WHOLE_S):
        while True:
            fleet = await run.fleet()
            replicas = len(fleet["view"]["members"]) == run.config.store.replicas
            if replicas and all(e["state"] == "healthy" for e in fleet["engines"]):
                return
            await asyncio.sleep(LOOK_S)


async def _refilled(run: Run, without: str) -> None:
    async with asyncio.timeout(WHOLE_S):
        while True:
            members = (await run.fleet())["view"]["members"]
            if without not in members and len(members) == run.config.store.replicas:
                return
            await asyncio.sleep(LOOK_S)


def _shared(ms: Machines, nodes: dict[str, str], rng: random.Random) -> Machine:
    """A node that has a replica and an engine."""
    both = {nodes[s] for s in _roles(nodes, "store")} & {nodes[e] for e in _roles(nodes, "engine")} & ms.workers.keys()
    return ms.workers[rng.choice(sorted(both))]


def _engine_of(actor: int) -> int:
    """The engine that this actor started: what its guard guards."""
    guarded = (p for p in psutil.Process(actor).children(recursive=True) if "rollout_ft.testing.small_engine" in p.cmdline())
    return next(p.pid for p in guarded if not any("guard.py" in part for part in p.cmdline()))


def _roles(nodes: dict[str, str], kind: str) -> list[str]:
    return sorted(name for name in nodes if name.split("/")[1].startswith(kind))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _next_tokens(events: list[JSON], at: float) -> list[float]:
    """Of each session that moved after `at`: how long until it had a token again."""
    first: dict[str, float] = {}
    for event in events:
        if event["event"] == "session.resumed" and event["time"] > at:
            first.setdefault(event["session"], event["time"] - at)
    return list(first.values())


def _sampled(directory: Path) -> int:
    """Tokens that the engines sampled, by their own count."""
    return sum(int(np.fromfile(path, "<u8")[0]) for path in directory.glob("*.count"))


def _committed(history: History) -> int:
    """Tokens of all turns in the logs of the last view."""
    entries = [w.entry for w in history.written[history.last[0]] if w.entry is not None] if history.last else []
    turns = [decode_entry(e.kind, e.payload) for e in entries if e.kind == "turn"]
    return sum(len(t.output_ids) // 4 for t in turns if isinstance(t, Turn))


def _median(values: list[float]) -> float | None:
    return round(statistics.median(values), 2) if values else None


def _most(values: list[float]) -> float | None:
    return round(max(values), 2) if values else None
