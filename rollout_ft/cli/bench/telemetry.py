"""What telemetry adds to a turn: the same load on runs that stand side by side, one that counts and one that does not.

Owns the order of the rounds and what is made of them. The subtle invariant: in each round every run takes the same turns of
sessions of the same length, one run after the other and the first of them another each time, so that what else the machine
does, and where it heats up, meets all of them alike.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from rollout_ft import runtime
from rollout_ft.cli.bench.phases import Bench, Sizes, Take
from rollout_ft.cli.bench.usage import Processes
from rollout_ft.cluster import connect, restore_signals
from rollout_ft.config import Config
from rollout_ft.types import JSON

ARMS: dict[str, JSON] = {"off": {"metrics": False}, "on": {"metrics": True}}
TURNS = 8
"""Of each session in a round."""
ALLOWED = 1.05


@dataclass(frozen=True, slots=True)
class Compared:
    """Our CPU ms a turn, of each arm in each round."""

    sessions: int
    ms: Mapping[str, Sequence[float]]

    @property
    def ratios(self) -> list[float]:
        return np.divide(self.ms["on"], self.ms["off"]).tolist()


async def compare(base: Config, sizes: Sizes, rounds: int, console: Console) -> Compared:
    """So many rounds behind one that nobody counts."""
    cluster = await asyncio.to_thread(connect, base.ray)
    restore_signals()
    try:
        async with AsyncExitStack() as stack:
            takes = {name: await _arm(stack, cluster, _settings(base, name), sizes) for name in ARMS}
            ms: dict[str, list[float]] = {name: [] for name in ARMS}
            with console.status("with and without telemetry, in turn") as status:
                for number in range(-1, rounds):
                    status.update(f"with and without telemetry, in turn: round {number + 1} of {rounds}")
                    for name in order(list(ARMS), number):
                        part = await takes[name](TURNS)
                        if number >= 0:
                            ms[name].append(part.cpu_ms)
            return Compared(sizes.sessions, ms)
    finally:
        await asyncio.to_thread(cluster.leave)


def order(names: list[str], number: int) -> list[str]:
    """Who is first changes from round to round."""
    first = number % len(names)
    return names[first:] + names[:first]


async def _arm(stack: AsyncExitStack, cluster: runtime.Cluster, config: Config, sizes: Sizes) -> Take:
    run = await stack.enter_async_context(runtime.within(cluster, config))
    bench = Bench(run, await Processes.of(run))
    sessions = await bench.open(sizes.sessions, "compared")
    return await stack.enter_async_context(bench.steps(sessions, replace(sizes, turns=TURNS)))


def _settings(base: Config, name: str) -> Config:
    telemetry = base.telemetry.model_copy(update=ARMS[name])
    return base.model_copy(update={"run": f"{base.run}-{name}", "telemetry": telemetry})


def figures(compared: Compared) -> JSON:
    """`{rounds, turns, on_ms, off_ms, ratio, ratio_low, ratio_high}`: medians, and the quartiles of the ratio of the rounds."""
    low, ratio, high = np.percentile(compared.ratios, [25, 50, 75])
    return {
        "rounds": len(compared.ratios), "turns": TURNS * compared.sessions,
        **{f"{name}_ms": round(float(np.median(ms)), 3) for name, ms in compared.ms.items()},
        "ratio": round(float(ratio), 4), "ratio_low": round(float(low), 4), "ratio_high": round(float(high), 4),
    }  # fmt: skip


def table(compared: Compared) -> Table:
    made = Table("", "CPU ms a turn", title=f"telemetry: {len(compared.ratios)} rounds of {TURNS * compared.sessions} turns each way")
    made.columns[1].justify = "right"
    for name, ms in compared.ms.items():
        made.add_row(name, f"{np.median(ms):.3f} ({min(ms):.3f} … {max(ms):.3f})")
    low, ratio, high = (100 * (value - 1) for value in np.percentile(compared.ratios, [25, 50, 75]))
    made.add_row(f"on adds (at most {100 * (ALLOWED - 1):.0f} % allowed)", f"{ratio:+.1f} % ({low:+.1f} … {high:+.1f})")
    return made
