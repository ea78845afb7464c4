"""`rollout-ft bench overhead` and `session`: which loads, on which runs, and the object that is returned.

Owns the order of the loads and the names of the figures (DESIGN section 7). Prints through `tables`. Both commands are
one: `overhead` is the first half of `session`, and what telemetry adds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from rollout_ft import runtime
from rollout_ft.cli.bench import tables, telemetry
from rollout_ft.cli.bench.loads import Result
from rollout_ft.cli.bench.machine import machine
from rollout_ft.cli.bench.phases import OTHERS, Bench, Collecting, Grown, Sizes
from rollout_ft.cli.bench.profile import Profile
from rollout_ft.cli.bench.usage import OURS, Processes, Usage, since, together
from rollout_ft.config import Config
from rollout_ft.types import JSON

COMPARED_SESSIONS = 4
"""Sessions whose turns are taken both ways, one at a time."""
WIDE_TOKENS = 131_072
LONG_TURN_TOKENS = 20_000
PACED_TURNS = 5


@dataclass(frozen=True, slots=True)
class Scale:
    """How much of what. `wide`: sessions that grow to 128k; `long_tokens`: length of the one long session;
    `paced_tokens_per_s`: pace of the engines whose tokens come one by one; `rounds`: with and without telemetry. 0 leaves a
    part out."""

    load: Sizes
    wide: int = 0
    long_tokens: int = 0
    paced_tokens_per_s: float = 0.0
    rounds: int = 0

    @property
    def wide_sizes(self) -> Sizes:
        a_turn = self.load.tokens_in + self.load.tokens_out
        return replace(self.load, sessions=self.wide, turns=-(-WIDE_TOKENS // a_turn))

    @property
    def long_sizes(self) -> Sizes:
        tokens_in = min(LONG_TURN_TOKENS, max(self.load.tokens_in, self.long_tokens // 50)) - self.load.tokens_out
        return Sizes(1, -(-self.long_tokens // (tokens_in + self.load.tokens_out)), tokens_in, self.load.tokens_out)

    @property
    def paced_sizes(self) -> Sizes:
        return replace(self.load, turns=min(PACED_TURNS, self.load.turns))


@dataclass(frozen=True, slots=True)
class Measured:
    """`kept`: what is still used when the sessions of the load were deleted, of what they had taken."""

    scale: Scale
    compared: Result
    loaded: Grown
    direct: Result
    kept: Usage
    wide: Grown | None = None
    collecting: Collecting | None = None
    long: Grown | None = None
    paced: Grown | None = None

    @property
    def added_ms(self) -> list[float]:
        return np.subtract(self.compared.latencies_ms, self.compared.direct_ms).tolist()


def settings(scale: Scale, tokens_per_s: float = 0.0) -> Config:
    """Engines that cost as little as possible: what is left is ours. The model alone says how long a context may be."""
    longest = max(scale.load.context_tokens, scale.wide_sizes.context_tokens, scale.long_sizes.context_tokens)
    return Config.model_validate(
        {
            "run": "bench", "ray": {"address": "local"},
            "model": {"context_tokens": max(131072, 2 * longest)},
            "engine": {"count": 2, "args": ["--model", "hash", "--tokens-per-s", f"{tokens_per_s:g}"]},
            "gateway": {"count": 2}, "store": {"replicas": 2},
            "session": {"max_output_tokens": max(8192, scale.load.tokens_out)},
        }
    )  # fmt: skip


async def bench(scale: Scale, console: Console, profile: Path | None = None) -> JSON:
    """Runs what `scale` asks for; prints it, and returns DESIGN section 7's object and what belongs to it."""
    facts = machine()
    console.print(tables.of_machine(facts))
    measured, profiled = await _at_once(scale, console, profile)
    if scale.paced_tokens_per_s:
        measured = replace(measured, paced=await _paced(scale, console))
    for table in tables.of(measured):
        console.print(table)
    if profiled is not None:
        for table in tables.of_profile(profiled, measured.loaded):
            console.print(table)
    made = {**figures(measured), "machine": facts}
    if scale.rounds:
        compared = await telemetry.compare(settings(scale), scale.load, scale.rounds, console)
        console.print(telemetry.table(compared))
        made["telemetry"] = telemetry.figures(compared)
    return made


async def _at_once(scale: Scale, console: Console, profile: Path | None) -> tuple[Measured, Profile | None]:
    """On one run, whose engines take no time to think."""
    sizes = scale.load
    async with runtime.start(settings(scale)) as run:
        processes = await Processes.of(run)
        profiler = Profile(profile, processes) if profile is not None else None
        on = Bench(run, processes)
        with console.status("one request at a time"):
            compared = await on.compared(await on.open(min(COMPARED_SESSIONS, sizes.sessions), "compared"), sizes)
        with console.status(f"{sizes.sessions} sessions at once"):
            before = processes.usage()
            sessions = await on.open(sizes.sessions, "loaded")
            loaded = await on.grown(sessions, sizes, profiler)
            kept = since(await on.delete(sessions), before)
        with console.status("straight to the engines"):
            direct = await on.direct(sizes)
        measured = Measured(scale, compared, loaded, direct, kept)
        if scale.wide:
            measured = await _wide(on, measured, console)
        if scale.long_tokens:
            with console.status(f"one session of {scale.long_tokens:,} tokens"):
                measured = replace(measured, long=await on.grown(await on.open(1, "long"), scale.long_sizes))
        return measured, profiler


async def _wide(on: Bench, measured: Measured, console: Console) -> Measured:
    sizes = measured.scale.wide_sizes
    with console.status(f"{sizes.sessions} sessions of {sizes.context_tokens:,} tokens"):
        sessions = await on.open(sizes.sessions, "wide")
        wide = await on.grown(sessions, sizes)
    with console.status("others, while one is collected"):
        collecting = await on.collecting(sessions[0], await on.open(OTHERS, "others"), sizes)
    return replace(measured, wide=wide, collecting=collecting)


async def _paced(scale: Scale, console: Console) -> Grown:
    """On a run of its own: the pace is the engines' own."""
    async with runtime.start(settings(scale, scale.paced_tokens_per_s)) as run:
        on = Bench(run, await Processes.of(run))
        with console.status(f"tokens at {scale.paced_tokens_per_s:g} a second"):
            return await on.grown(await on.open(scale.paced_sizes.sessions, "paced"), scale.paced_sizes)


def figures(m: Measured) -> JSON:
    """Section 7's keys, and beside them those of the parts that were measured."""
    whole, sizes = m.loaded.whole, m.scale.load
    ours, (p50, p99) = together(whole.spent, OURS), np.percentile(m.added_ms, [50, 99])
    made: JSON = {
        "turns_per_s": round(sizes.total / whole.result.seconds, 1),
        "cpu_ms_per_turn": round(whole.cpu_ms, 2),
        "rss_mb_per_session": _mb_a_session(ours.rss, sizes),
        "added_ms_p50": round(float(p50), 2), "added_ms_p99": round(float(p99), 2),
        "direct_turns_per_s": round(sizes.total / m.direct.seconds, 1),
        "sessions": sizes.sessions, "turns": sizes.turns, "tokens_in": sizes.tokens_in, "tokens_out": sizes.tokens_out,
        "rss_mb_per_session_deleted": _mb_a_session(together(m.kept, OURS).rss, sizes), "parts": _parts(m.loaded),
    }  # fmt: skip
    for name, grown in (("wide", m.wide), ("long", m.long), ("paced", m.paced)):
        if grown is not None:
            made[name] = _grown(grown)
    if m.collecting is not None:
        made["collecting"] = _collecting(m.collecting)
    return made


def _mb_a_session(rss: int, sizes: Sizes) -> float:
    return round(rss / 2**20 / sizes.sessions, 2)


def _grown(g: Grown) -> JSON:
    whole = g.whole
    return {
        "sessions": g.sizes.sessions, "turns": g.sizes.turns, "context_tokens": g.sizes.context_tokens,
        "turns_per_s": round(g.sizes.total / whole.result.seconds, 1), "cpu_ms_per_turn": round(whole.cpu_ms, 2),
        "rss_mb_per_session": _mb_a_session(together(whole.spent, OURS).rss, g.sizes), "parts": _parts(g),
    }  # fmt: skip


def _parts(g: Grown) -> list[JSON]:
    return [
        {
            "prompt_tokens": round(part.result.prompt_tokens / part.result.turns),
            "cpu_ms_per_turn": round(part.cpu_ms, 2), "reading_ms": round(part.result.reading_ms, 3),
        }
        for part in g.parts
    ]  # fmt: skip


def _collecting(c: Collecting) -> JSON:
    (q50, q99), (b50, b99) = (np.percentile(r.latencies_ms, [50, 99]) for r in (c.quiet, c.beside))
    return {
        "quiet_ms_p50": round(float(q50), 2), "quiet_ms_p99": round(float(q99), 2), "beside_ms_p50": round(float(b50), 2),
        "beside_ms_p99": round(float(b99), 2), "collections": c.collected.turns, "collected_bytes": c.collected.bytes_in,
        "collect_ms_p50": round(float(np.median(c.collected.latencies_ms)), 2),
    }  # fmt: skip
