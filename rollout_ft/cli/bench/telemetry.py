"""What telemetry adds to a turn: the same load on runs that stand side by side, with all of it, with some, and with none.

Owns the order of the rounds and what is made of them. The subtle invariant: in each round every run takes the same turns of
sessions of the same length, one run after the other and the first of them another each time, so that what else the machine
does meets all of them alike.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
from aiohttp import web
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rollout_ft import runtime
from rollout_ft.cli.bench.phases import Bench, Sizes, Take
from rollout_ft.cli.bench.usage import Processes
from rollout_ft.cluster import Cluster, connect, restore_signals
from rollout_ft.config import Config
from rollout_ft.telemetry.tracing import EXTRA, installed
from rollout_ft.types import JSON

OFF = "off"
ARMS: dict[str, JSON] = {
    OFF: {"metrics": False, "tracing": "off"}, "metrics": {"metrics": True, "tracing": "off"}, "all": {"metrics": True, "tracing": "on"},
}  # fmt: skip
"""The config section `telemetry` of each run; `all` where spans can be exported."""
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TURNS = 8
"""Of each session in a round."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Our CPU ms a turn, of each run in each round."""

    sessions: int
    ms: Mapping[str, Sequence[float]]

    def ratios(self, name: str) -> tuple[float, float, float]:
        """To the run that has none of it: the quartiles over the rounds."""
        low, median, high = np.percentile(np.divide(self.ms[name], self.ms[OFF]), [25, 50, 75])
        return float(low), float(median), float(high)

    @property
    def rounds(self) -> int:
        return len(self.ms[OFF])


async def compare(base: Config, sizes: Sizes, rounds: int, console: Console) -> Compared:
    """So many rounds behind one that nobody counts."""
    arms = [name for name in ARMS if ARMS[name]["tracing"] == "off" or installed()]
    cluster = await asyncio.to_thread(connect, base.ray)
    restore_signals()
    try:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(_collector())
            takes = {name: await _arm(stack, cluster, _settings(base, name), sizes) for name in arms}
            ms: dict[str, list[float]] = {name: [] for name in arms}
            with console.status("") as status:
                for number in range(rounds + 1):
                    status.update(f"with and without telemetry, in turn: round {number} of {rounds}")
                    for name in order(arms, number):
                        part = await takes[name](TURNS)
                        if number:
                            ms[name].append(part.cpu_ms)
            return Compared(sizes.sessions, ms)
    finally:
        await asyncio.to_thread(cluster.leave)


def order(names: list[str], number: int) -> list[str]:
    """Who is first changes from round to round."""
    first = number % len(names)
    return names[first:] + names[:first]


async def _arm(stack: AsyncExitStack, cluster: Cluster, config: Config, sizes: Sizes) -> Take:
    run = await stack.enter_async_context(runtime.within(cluster, config))
    bench = Bench(run, await Processes.of(run))
    sessions = await bench.open(sizes.sessions, "compared")
    return await stack.enter_async_context(bench.steps(sessions, replace(sizes, turns=TURNS)))


def _settings(base: Config, name: str) -> Config:
    telemetry = base.telemetry.model_copy(update=ARMS[name])
    return base.model_copy(update={"run": f"{base.run}-{name}", "telemetry": telemetry})


@asynccontextmanager
async def _collector() -> AsyncGenerator[None]:
    """Takes spans on this machine, and forgets them."""

    async def take(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        os.environ[ENDPOINT] = f"http://127.0.0.1:{port}"  # of this command alone
        yield
    finally:
        os.environ.pop(ENDPOINT, None)
        await runner.cleanup()


def figures(compared: Compared) -> JSON:
    """`{rounds, turns}`, and of each run `{cpu_ms_per_turn, ratio, ratio_low, ratio_high}`: the medians of its rounds, and the quartiles
    of the ratio to `off`."""
    made: JSON = {"rounds": compared.rounds, "turns": TURNS * compared.sessions}
    for name, ms in compared.ms.items():
        low, ratio, high = compared.ratios(name)
        made[name] = {
            "cpu_ms_per_turn": round(float(np.median(ms)), 3),
            "ratio": round(ratio, 4), "ratio_low": round(low, 4), "ratio_high": round(high, 4),
        }  # fmt: skip
    return made


def table(compared: Compared) -> Table:
    made = Table("telemetry", "CPU ms a turn", "adds", title=f"{compared.rounds} rounds of {TURNS * compared.sessions} turns each way")
    for column in made.columns[1:]:
        column.justify = "right"
    for name, ms in compared.ms.items():
        low, ratio, high = (100 * (value - 1) for value in compared.ratios(name))
        adds = "" if name == OFF else f"{ratio:+.1f} % ({low:+.1f} … {high:+.1f})"
        made.add_row(name, f"{np.median(ms):.3f} ({min(ms):.3f} … {max(ms):.3f})", adds)
    if "all" not in compared.ms:
        made.caption = escape(f"spans are left out: pip install '{EXTRA}'")
    return made
