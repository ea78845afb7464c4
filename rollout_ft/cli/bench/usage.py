"""What our processes use: CPU and memory, by role.

Owns the processes of a run and the readings of them. Knows nothing of loads. The subtle invariant: CPU is the
difference of two readings of the same processes; one that was replaced in between would be read as cheap, so that its
absence ends the benchmark.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce

import psutil

from rollout_ft.errors import RolloutFTError
from rollout_ft.runtime import Run

OURS = ("gateway", "engine actor", "store", "supervisor")
"""The roles whose cost is ours; the others are shown beside them."""


@dataclass(frozen=True, slots=True)
class Used:
    """What some processes used, or use: `count` of them, CPU seconds, resident bytes."""

    count: int = 0
    cpu_s: float = 0.0
    rss: int = 0

    def plus(self, other: Used) -> Used:
        return Used(self.count + other.count, self.cpu_s + other.cpu_s, self.rss + other.rss)

    def since(self, before: Used) -> Used:
        return Used(self.count, self.cpu_s - before.cpu_s, self.rss - before.rss)


Usage = dict[str, Used]
"""By role."""


def since(usage: Usage, before: Usage) -> Usage:
    return {role: used.since(before[role]) for role, used in usage.items()}


def plus(usages: Iterable[Usage]) -> Usage:
    """Of one run at different times: counts are those of the processes, not of the readings."""
    whole: Usage = {}
    for usage in usages:
        whole = {role: replace(whole.get(role, Used()).plus(used), count=used.count) for role, used in usage.items()}
    return whole


def together(usage: Usage, roles: Iterable[str]) -> Used:
    return reduce(Used.plus, (usage[role] for role in roles), Used())


@dataclass(frozen=True, slots=True)
class Processes:
    """Every process of a run, with its role; `engines` are the engines' own URLs."""

    roles: list[tuple[str, psutil.Process]]
    engines: list[str]

    @classmethod
    async def of(cls, run: Run) -> Processes:
        """Raises RolloutFTError when one of ours does not say where it is: it would be left out unnoticed."""
        pids: dict[str, int] = await run.supervisor.ask("pids")
        config = run.config
        if len(pids) != config.engine.count + config.gateway.count + config.store.replicas + 1:
            raise RolloutFTError(f"only {', '.join(sorted(pids))} answered; try again on a machine that is less busy")
        ours = [(_role(name), psutil.Process(pid)) for name, pid in pids.items()]
        below = [child for role, p in ours if role == "engine actor" for child in p.children(recursive=True)]
        engines = [p for p in below if _port_of(p) and not p.children()]  # the guard above has the same command line
        ray = [p for p in psutil.Process().children(recursive=True) if p.name() in ("raylet", "gcs_server")]
        others = [*(("engine", p) for p in engines), *(("Ray", p) for p in ray), ("this command", psutil.Process())]
        return cls([*ours, *others], [f"http://127.0.0.1:{_port_of(engine)}" for engine in engines])

    def usage(self) -> Usage:
        """Raises RolloutFTError when one has ended: the figures would be of different processes."""
        usage: Usage = {}
        for role, process in self.roles:
            try:
                times, memory = process.cpu_times(), process.memory_info()
            except psutil.NoSuchProcess:
                raise RolloutFTError(f"a process was lost while it was measured ({role}, pid {process.pid})") from None
            usage[role] = usage.get(role, Used()).plus(Used(1, times.user + times.system, memory.rss))
        return usage


def _role(name: str) -> str:
    """`bench/engine-0/1` → `engine actor`."""
    role = name.split("/")[1].rpartition("-")[0] if "/" in name else name
    return "engine actor" if role == "engine" else role


def _port_of(process: psutil.Process) -> str:
    """The port in an engine's command line; empty when there is none."""
    command = process.cmdline()
    return command[command.index("--port") + 1] if "--port" in command else ""
