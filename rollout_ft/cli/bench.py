"""`rollout-ft bench`: what our processes cost on this machine, measured while they serve.

Owns the runs that are measured and what is printed of them. Knows nothing of how a load is made; that is `loadgen`,
in a process of its own. The subtle invariant: CPU is the difference of two readings of the same processes; a process
that was replaced in between would be read as cheap, so that its absence ends the benchmark.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import msgspec
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from rollout_ft import runtime
from rollout_ft.cli.loadgen import JOB_BYTES, Chat, Job, LoadFailed, Result
from rollout_ft.config import Config, model_dir
from rollout_ft.errors import RolloutFTError
from rollout_ft.runtime import Run
from rollout_ft.types import JSON

COMPARED_SESSIONS = 4
"""Sessions whose turns are taken both ways, one at a time."""
OURS = ("gateway", "engine actor", "store", "supervisor")
"""The roles whose cost is ours; the others are shown beside them."""


def settings(tokens: int, tokens_out: int) -> Config:
    """Engines that cost as little as possible: what is left is ours."""
    return Config.model_validate(
        {
            "run": "bench", "ray": {"address": "local"},
            "model": {"context_tokens": max(131072, 2 * tokens)},
            "engine": {"count": 2, "args": ["--model", "hash", "--tokens-per-s", "0"]},
            "gateway": {"count": 2}, "store": {"replicas": 2},
            "session": {"max_output_tokens": max(8192, tokens_out)},
        }
    )  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class Measured:
    """What the three loads gave; `spent` is what the second of them cost."""

    sessions: int
    turns: int
    compared: Result
    loaded: Result
    direct: Result
    spent: Usage

    @property
    def total(self) -> int:
        return self.sessions * self.turns

    @property
    def added_ms(self) -> list[float]:
        return np.subtract(self.compared.latencies_ms, self.compared.direct_ms).tolist()

    def figures(self) -> JSON:
        ours, (p50, p99) = together(self.spent, OURS), np.percentile(self.added_ms, [50, 99])
        return {
            "turns_per_s": round(self.total / self.loaded.seconds, 1),
            "cpu_ms_per_turn": round(ours.cpu_s * 1e3 / self.total, 2),
            "rss_mb_per_session": round(ours.rss / 2**20 / self.sessions, 2),
            "added_ms_p50": round(float(p50), 2), "added_ms_p99": round(float(p99), 2),
            "direct_turns_per_s": round(self.total / self.direct.seconds, 1),
        }  # fmt: skip


async def overhead(sessions: int, turns: int, tokens_in: int, tokens_out: int, console: Console) -> JSON:
    """What a turn costs over talking to the engine directly; DESIGN section 7's object.

    Three loads on one run, whose engines take no time to think:
    - `added_ms`: a few sessions alone, one request at a time; the latency of every turn through the gateway minus that
      of a `/generate` with as many ids in and out, straight to an engine, right after it;
    - `turns_per_s`, `cpu_ms_per_turn`, `rss_mb_per_session`: all sessions at once, each asking again as soon as it is
      answered; user and system time, and growth of resident memory, of all gateways, engine actors, stores and the
      supervisor together. The engines and the clients share the machine, and are not counted;
    - `direct_turns_per_s`: as many conversations of the same size, at once, straight to the engines.
    """
    config = settings((tokens_in + tokens_out) * turns, tokens_out)
    async with runtime.start(config) as run:
        processes = await Processes.of(run)
        chats = await _open(run, min(COMPARED_SESSIONS, sessions), "compared")
        job = Job("compare", chats, processes.engines, model_dir(config), turns, tokens_in, tokens_out)
        with console.status("one request at a time"):
            compared = await generate(job)
        job = replace(job, kind="through", chats=await _open(run, sessions, "loaded"))
        with console.status(f"{sessions} sessions at once"):
            before = processes.usage()
            loaded = await generate(job)
            spent = since(processes.usage(), before)
        with console.status("straight to the engines"):
            direct = await generate(replace(job, kind="direct"))
    measured = Measured(sessions, turns, compared, loaded, direct, spent)
    for table in tables(measured):
        console.print(table)
    return {**measured.figures(), "sessions": sessions, "turns": turns, "tokens_in": tokens_in, "tokens_out": tokens_out}


async def _open(run: Run, count: int, name: str) -> list[Chat]:
    opened = await asyncio.gather(*(run.open_session(trial_id=f"{name}-{i}") for i in range(count)))
    return [Chat(session.base_url, session.api_key) for session in opened]


async def generate(job: Job) -> Result:
    """Has a process of its own do the job; raises LoadFailed. It ends when its stdin closes, however this is left."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rollout_ft.cli.loadgen", start_new_session=True, limit=JOB_BYTES,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(msgspec.json.encode(job) + b"\n")
        output = await process.stdout.read()
    finally:
        process.stdin.close()
        await process.wait()
    if not output:
        raise LoadFailed(f"the load generator ended with exit code {process.returncode}")
    result = msgspec.json.decode(output, type=Result)
    if result.error:
        raise LoadFailed(result.error)
    return result


def _role(name: str) -> str:
    """`bench/engine-0/1` → `engine actor`."""
    role = name.split("/")[1].rpartition("-")[0] if "/" in name else name
    return "engine actor" if role == "engine" else role


def _port_of(process: psutil.Process) -> str:
    """The port in an engine's command line; empty when there is none."""
    command = process.cmdline()
    return command[command.index("--port") + 1] if "--port" in command else ""


def tables(m: Measured) -> list[Table]:
    """The figures, and where the CPU time goes: what there is to optimise."""
    figures = Table(title=f"{m.sessions} sessions x {m.turns} turns")
    for column in ("", "through the gateway", "straight to the engine"):
        figures.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, load, straight in (
        ("turns/s", f"{m.total / m.loaded.seconds:,.1f}", f"{m.total / m.direct.seconds:,.1f}"),
        ("ms at once, p50 / p99", _percentiles(m.loaded.latencies_ms), _percentiles(m.direct.latencies_ms)),
        ("ms alone, p50 / p99", _percentiles(m.compared.latencies_ms), _percentiles(m.compared.direct_ms)),
        ("ms added alone, p50 / p99", _percentiles(m.added_ms), ""),
        ("prompt tokens, mean", f"{m.loaded.prompt_tokens / m.total:,.0f}", f"{m.direct.prompt_tokens / m.total:,.0f}"),
        ("client's CPU ms a turn", f"{m.loaded.cpu_s * 1e3 / m.total:.2f}", f"{m.direct.cpu_s * 1e3 / m.total:.2f}"),
    ):
        figures.add_row(name, load, straight)
    split = Table(title="all at once, by process")
    for column in ("", "processes", "CPU ms a turn", "MB a session"):
        split.add_column(column, justify="right" if column else "left", no_wrap=True)
    for role in sorted(OURS, key=lambda role: -m.spent[role].cpu_s):
        split.add_row(role, *_row(m, [role]))
    split.add_row("[bold]ours", *_row(m, OURS), end_section=True)
    for role in sorted(m.spent.keys() - set(OURS)):
        split.add_row(f"{role} (not counted)", *_row(m, [role]))
    return [figures, split]


def _row(m: Measured, roles: Sequence[str]) -> tuple[str, str, str]:
    used = together(m.spent, roles)
    return str(used.count), f"{used.cpu_s * 1e3 / m.total:.2f}", f"{used.rss / 2**20 / m.sessions:.2f}"


def _percentiles(values: Sequence[float]) -> str:
    p50, p99 = np.percentile(values, [50, 99])
    return f"{p50:,.1f} / {p99:,.1f}"
