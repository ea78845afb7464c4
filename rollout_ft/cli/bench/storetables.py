"""What `bench store` prints.

Owns the words and the columns. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rich.table import Table

from rollout_ft.cli.bench.commits import Size, Taken
from rollout_ft.cli.bench.tables import of_machine, percentiles, titled

if TYPE_CHECKING:
    from rollout_ft.cli.bench.store import Load, Measured

__all__ = ["of", "of_machine"]


def of(m: Measured) -> Iterable[Table]:
    for size, raw in m.raw.items():
        what = f"commits of {raw:,} bytes ({size.tokens} tokens)"
        yield _commits(m, size, f"{what}: ms, p50 / p99", lambda load: _ms(load.taken))
        yield _commits(m, size, f"{what}: a second", lambda load: f"{load.commits_per_s:,.0f}")
    yield _sizes(m)
    yield _back(m)


def _commits(m: Measured, size: Size, title: str, cell: Callable[[Load], str]) -> Table:
    made = titled(title, "", *(f"{n} session{'s' * (n > 1)}" for n in m.scale.sessions))
    kinds: dict[str, list[Load]] = {}
    for load in m.loads:
        if load.size == size:
            kinds.setdefault(_name(load.kind, load.replicas, load.journal), []).append(load)
    for name, loads in kinds.items():
        made.add_row(name, *map(cell, loads))
    return made


def _name(kind: str, replicas: int, journal: bool) -> str:
    if kind != "store":
        return {"dictionary": "dictionary actor, 1 copy", "snapshots": "full snapshots, 1 copy"}[kind]
    return f"{replicas} replica{'s' * (replicas > 1)}{', journal' * journal}"


def _sizes(m: Measured) -> Table:
    made = titled("bytes a turn", "data", "sent to a replica", "share", "snapshots send", "share")
    for size, raw in m.raw.items():
        sent, whole = (m.find(kind, 1, False, size, max(m.scale.sessions)).sent_per_commit for kind in ("store", "snapshots"))
        made.add_row(f"{raw:,}", f"{sent:,.0f}", f"{sent / raw:.2f}", f"{whole:,.0f}", f"{whole / raw:.1f}")
    return made


def _back(m: Measured) -> Table:
    r, sessions = m.resumed, m.scale.resumed
    made = titled(f"{sessions:,} sessions of {m.scale.turns * 950:,} tokens on two replicas with journals", "", "", "share")
    for row in (
        ("data, MB", f"{r.raw / 1e6:,.1f}", ""),
        ("in memory of each replica, MB", f"{r.kept / 1e6:,.1f}", f"{r.kept / r.raw:.2f}"),
        ("on disk of each, MB", f"{r.disk / 1e6:,.1f}", f"{r.disk / r.raw:.2f}"),
        ("written, s", f"{r.fill_s:.1f}", ""),
        ("taken over, replicas alive, s (ms each)", f"{r.read_back.seconds:.1f} ({_ms(r.read_back)})", ""),
        ("all lost: replicas on their journals, s", f"{r.start_s:.1f}", ""),
        ("and all sessions taken over, s (ms each)", f"{r.takeovers.seconds:.1f} ({_ms(r.takeovers)})", ""),
        ("[bold]resumed, s", f"[bold]{r.seconds:.1f}", ""),
        ("fdatasync of 8 kB on this disk, ms", f"{m.sync_ms:.2f}", ""),
    ):
        made.add_row(*row)
    return made


def _ms(taken: Taken) -> str:
    return percentiles(taken.latencies_ms)
