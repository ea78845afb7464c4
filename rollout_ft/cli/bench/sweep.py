"""The second part of `rollout-ft bench storm`: trials at once, up to five times what the engines can run.

Owns the levels of the load and their figures. Real and unreal are as in `storm`; there are no faults. Clients time out and
come again as SDKs do, so that a stack whose queue grows beyond their patience does the same work over and over.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from rollout_ft.cli.bench.storm import Plan, Played, Scale, play
from rollout_ft.types import JSON, Recovery

LOADS = (1, 2, 3, 5)
"""Trials at once, in times of what all engines run at once."""
ENGINES = 6
TURNS = 2
WAVES = 2
"""Trials of a level, in times of its trials at once at the highest load."""


async def sweep(scale: Scale, console: Console) -> list[JSON]:
    """A row for each load: `{load, trials, trials_lost, tokens_generated, tokens_per_s, ratio}`, the same trials for all."""
    small = replace(scale, engines=ENGINES)
    capacity = small.engines * small.running
    planned = plan(small, capacity * LOADS[-1] * WAVES)
    played = [await play(f"{load} x capacity", small, planned, Recovery.RESUME, console, at_once=load * capacity) for load in LOADS]
    rows = [row(load, each, played[0]) for load, each in zip(LOADS, played, strict=True)]
    console.print(table(rows))
    return rows


def plan(scale: Scale, trials: int) -> Plan:
    """Agents without tools: an engine has always somebody who waits for it."""
    rng = random.Random(scale.seed)
    return Plan([{"task_id": f"task-{i}", "tokens": [rng.randint(64, 160) for _ in range(TURNS)], "tools_s": [0.0] * TURNS}
                 for i in range(trials)], [], [])  # fmt: skip


def row(load: int, played: Played, least: Played) -> JSON:
    return {
        "load": load, "trials": len(played.results), "trials_lost": played.lost, "tokens_generated": played.generated,
        "tokens_per_s": round(rate(played), 1), "ratio": round(rate(played) / rate(least), 3),
    }  # fmt: skip


def rate(played: Played) -> float:
    """Of tokens that are in a trajectory."""
    return played.useful / played.seconds


def table(rows: Sequence[JSON]) -> Table:
    made = Table("trials at once", "lost", "tokens", "useful tokens/s", "ratio", title="load beyond what the engines can run, no faults")
    for column in made.columns[1:]:
        column.justify = "right"
    for each in rows:
        made.add_row(
            f"{each['load']} x capacity", f"{each['trials_lost']} of {each['trials']}", f"{each['tokens_generated']:,}",
            f"{each['tokens_per_s']:,.0f}", f"{each['ratio']:.2f}",
        )  # fmt: skip
    return made
