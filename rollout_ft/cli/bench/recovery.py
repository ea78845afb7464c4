"""How long a fault is not seen, and how long it holds up the sessions that it met: engines, their actors, nodes.

Owns the number of runs and the names of the figures (DESIGN section 7); how one fault is met and judged is `siege`'s.
Starts several nodes of its own, from the main thread and with nothing else on its loop. A figure of a run that lost a
turn is none: it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from rich.table import Table

from rollout_ft.errors import RolloutFTError
from rollout_ft.testing.machines import machines
from rollout_ft.testing.siege import Blow, Siege, lay
from rollout_ft.types import JSON

MET = {
    Blow.ENGINE_KILLED: "engine_killed", Blow.ENGINE_FROZEN: "engine_frozen", Blow.ENGINE_ACTOR: "actor_killed",
    Blow.NODE_KILLED: "node_killed", Blow.NODE_FROZEN: "node_frozen",
}  # fmt: skip
"""The faults of `bench recovery`."""
NAMES = {Blow.ENGINE_ACTOR: "actor", Blow.NODE_KILLED: "node", Blow.NODE_FROZEN: "frozen_node"}
"""Those of `bench store`."""
WORKERS = 3


class TurnsLost(RolloutFTError):
    """The run that was measured lost what it must not lose: its complaints."""


async def bench(runs: int, *, seed: int = 7, show: Callable[[Siege], None] = lambda siege: None) -> JSON:
    """`{fault: {runs, detect_s_p50, detect_s_p99, next_token_s_p50, next_token_s_p99}}`, each `runs` times."""
    met = await _met(runs, tuple(MET), seed, show)
    return {MET[blow]: figures_of(sieges) for blow, sieges in met.items()}


async def recovery(runs: int, *, seed: int = 7, show: Callable[[Siege], None] = lambda siege: None) -> JSON:
    """`{actor|node|frozen_node}_recovery_s_{p50,max}`: from the fault to the next token of each session that it met."""
    met = await _met(runs, tuple(NAMES), seed, show)
    taken = {name: [s for siege in met[blow] for s in siege.next_token_s] for blow, name in NAMES.items()}
    return {
        f"{name}_recovery_s_{which}": round(float(measure(times)), 3) if times else None
        for name, times in taken.items()
        for which, measure in (("p50", np.median), ("max", np.max))
    }


async def _met(runs: int, blows: Sequence[Blow], seed: int, show: Callable[[Siege], None]) -> dict[Blow, list[Siege]]:
    met: dict[Blow, list[Siege]] = {blow: [] for blow in blows}
    with machines(WORKERS) as ms:
        for n in range(runs):
            for blow in blows:
                ms.heal()
                siege = await lay(ms, blow, seed + n, name=f"recovery-{MET[blow].replace('_', '-')}-{n}")
                if siege.complaints:
                    raise TurnsLost("; ".join(siege.complaints))
                met[blow].append(siege)
                show(siege)
    return met


def figures_of(sieges: Sequence[Siege]) -> JSON:
    """Of one fault: None where nothing was measured."""
    detect = [s.detect_s for s in sieges if s.detect_s is not None]
    tokens = [s for siege in sieges for s in siege.next_token_s]
    named = {"detect_s": detect, "next_token_s": tokens}
    return {"runs": len(sieges)} | {
        f"{name}_p{p}": round(float(np.percentile(times, p)), 3) if times else None for name, times in named.items() for p in (50, 99)
    }


def faults_table(figures: JSON) -> Table:
    """The figures of `bench`, for people."""
    title = "sessions on engines that were lost, of a head and three nodes"
    made = Table("fault", "runs", "s until seen, p50", "p99", "s to the next token, p50", "p99", title=title)
    for column in made.columns[1:]:
        column.justify = "right"
    for name, row in figures.items():
        made.add_row(name.replace("_", " "), *(str(value) for value in row.values()))
    return made


def table(figures: JSON) -> Table:
    """The figures of `recovery`, for people."""
    made = Table("lost", "s to the next token, p50", "at most", title="sessions that were there, of a head and three nodes")
    for column in made.columns[1:]:
        column.justify = "right"
    for name in NAMES.values():
        made.add_row(name.replace("_", " "), *(f"{figures[f'{name}_recovery_s_{which}']}" for which in ("p50", "max")))
    return made
