"""What telemetry adds to a turn: the same load on runs side by side, with all of it, with some, and with none.

Owns the rounds and what is made of them. The subtle invariant: in each round every run takes the same turns of new sessions, all
runs at the same time, so that a turn costs in the last round what it does in the first, and what else the machine does meets all
of them alike.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import numpy as np
from aiohttp import web
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rollout_ft import runtime
from rollout_ft.cli.bench.phases import Bench, Part, Sizes
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
TURNS = 16
"""Of each session: short ones, in which a turn costs the least and telemetry adds the most to it."""


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
                    status.update(f"with and without telemetry, side by side: round {number} of {rounds}")
                    parts = await asyncio.gather(*(takes[name](f"round-{number}") for name in arms))
                    if number:
                        for name, part in zip(arms, parts, strict=True):
                            ms[name].append(part.cpu_ms)
            return Compared(sizes.sessions, ms)
    finally:
        await asyncio.to_thread(cluster.leave)


async def _arm(stack: AsyncExitStack, cluster: Cluster, config: Config, sizes: Sizes) -> Callable[[str], Awaitable[Part]]:
    run = await stack.enter_async_context(runtime.within(cluster, config))
    bench = Bench(run, await Processes.of(run))

    async def take(name: str) -> Part:
        sessions = await bench.open(sizes.sessions, name)
        async with bench.steps(sessions, sizes) as steps:
            part = await steps(TURNS)
        await bench.end(sessions)
        return part

    return take


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
