"""What the benchmark prints.

Owns the words and the columns. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from rollout_ft.cli.bench.phases import Collecting, Grown
from rollout_ft.cli.bench.profile import Profile
from rollout_ft.cli.bench.usage import OURS, together
from rollout_ft.types import JSON

if TYPE_CHECKING:
    from rollout_ft.cli.bench.command import Measured

HOT_MS = 0.03


def of(m: Measured) -> Iterable[Table]:
    yield _loads(m)
    yield _processes(m)
    yield _growth(m)
    if m.collecting is not None:
        yield _others(m.collecting)


def of_machine(facts: JSON) -> str:
    libraries = ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("cpu", "cores", "load"))
    return f"{facts['cores']} cores of {facts['cpu']}, load {facts['load']}; {libraries}"


def of_profile(profile: Profile, loaded: Grown) -> Iterable[Table]:
    """A share of a role's samples is printed as that share of its CPU; threads without Python are in no sample."""
    spent, turns = loaded.whole.spent, loaded.sizes.total
    threads = titled("CPU ms a turn, by thread", "", "thread", "ms")
    for role, name, seconds in profile.threads():
        if seconds * 1e3 / turns >= HOT_MS:
            threads.add_row(role, name, f"{seconds * 1e3 / turns:.2f}")
    yield threads
    functions = titled("CPU ms a turn, by function, about", "", "itself", "and below", "")
    for hot in profile.hottest():
        ms = spent[hot.role].cpu_s * 1e3 / turns
        if hot.own * ms >= HOT_MS:
            functions.add_row(hot.role, f"{hot.own * ms:.2f}", f"{hot.below * ms:.2f}", hot.function)
    yield functions


def _loads(m: Measured) -> Table:
    sizes, loaded, direct = m.scale.load, m.loaded.whole.result, m.direct
    table = titled(f"{sizes.sessions} sessions x {sizes.turns} turns", "", "through the gateway", "straight to the engine")
    for row in (
        ("turns/s", f"{sizes.total / loaded.seconds:,.1f}", f"{sizes.total / direct.seconds:,.1f}"),
        ("ms at once, p50 / p99", percentiles(loaded.latencies_ms), percentiles(direct.latencies_ms)),
        ("ms alone, p50 / p99", percentiles(m.compared.latencies_ms), percentiles(m.compared.direct_ms)),
        ("ms added alone, p50 / p99", percentiles(m.added_ms), ""),
        ("prompt tokens, mean", f"{loaded.prompt_tokens / sizes.total:,.0f}", f"{direct.prompt_tokens / sizes.total:,.0f}"),
        ("client's CPU ms a turn", f"{loaded.cpu_s * 1e3 / sizes.total:.2f}", f"{direct.cpu_s * 1e3 / sizes.total:.2f}"),
    ):
        table.add_row(*row)
    return table


def _processes(m: Measured) -> Table:
    table = titled("all at once: CPU of a turn, memory of a session", "", "processes", "CPU ms", "MB", "MB after DELETE")
    spent = m.loaded.whole.spent
    for role in sorted(OURS, key=lambda role: -spent[role].cpu_s):
        table.add_row(role, *_used(m, [role]))
    table.add_row("[bold]ours", *_used(m, OURS), end_section=True)
    for role in sorted(spent.keys() - set(OURS)):
        table.add_row(f"{role} (not counted)", *_used(m, [role]))
    return table


def _used(m: Measured, roles: Sequence[str]) -> tuple[str, str, str, str]:
    sizes, used = m.scale.load, together(m.loaded.whole.spent, roles)
    kept = f"{together(m.kept, roles).rss / 2**20 / sizes.sessions:.2f}"
    return str(used.count), f"{used.cpu_s * 1e3 / sizes.total:.2f}", f"{used.rss / 2**20 / sizes.sessions:.2f}", kept


def _growth(m: Measured) -> Table:
    table = titled("CPU ms of a turn, and of orjson.loads of its request", "sessions", "prompt", "ours", "reading", "less it", "MB sent")
    pace = f"at {m.scale.paced_tokens_per_s:g} tokens/s"
    for grown, how in ((m.loaded, ""), (m.wide, ""), (m.long, ""), (m.paced, pace)):
        if grown is None:
            continue
        for part in grown.parts:
            r, first, last = part.result, part is grown.parts[0], part is grown.parts[-1]
            label = f"{grown.sizes.sessions} {how}" if first else ""
            less = f"{part.cpu_ms - r.reading_ms:.2f}"
            tokens, megabytes = f"{r.prompt_tokens / r.turns:,.0f}", f"{r.bytes_out / 1e6:.2f}"
            table.add_row(label, tokens, f"{part.cpu_ms:.2f}", f"{r.reading_ms:.2f}", less, megabytes, end_section=last)
    return table


def _others(c: Collecting) -> Table:
    table = titled("turns of others, beside one long trajectory", "", "ms, p50 / p99", "longest", "turns")
    for name, result in (("nobody collects", c.quiet), ("it is collected all the time", c.beside), ("one collection", c.collected)):
        table.add_row(name, percentiles(result.latencies_ms), f"{max(result.latencies_ms):,.1f}", str(result.turns))
    return table


def titled(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def percentiles(values: Sequence[float]) -> str:
    p50, p99 = np.percentile(values, [50, 99])
    return f"{p50:,.1f} / {p99:,.1f}"
