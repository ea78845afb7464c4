"""A real Prometheus for tests, on this machine's loopback alone, and the board's queries as Grafana sends them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from ports import free_port

CONFIGS = Path("configs/grafana").resolve()
BOARD = CONFIGS / "rollout_ft.json"
PLACES = ("/usr/local/bin", "/usr/bin", ".venvs/prometheus/usr/bin")
VARIABLES = {"$__rate_interval": "30s", "$__range": "10m", "$__interval": "15s", "$run": ".*", "$mode": ".*"}
"""What Grafana puts in their place, for a run that lasts a minute."""


def program(name: str) -> str:
    """Where it is; empty when it is not."""
    found = shutil.which(name) or next((str(at) for place in PLACES if (at := Path(place) / name).exists()), "")
    return str(Path(found).resolve()) if found else ""


@dataclass(frozen=True)
class Query:
    panel: str
    expr: str
    legend: str


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] not in ("row", "text")]


def queries() -> Iterator[Query]:
    for panel in panels():
        for target in panel["targets"]:
            yield Query(panel["title"], filled(target["expr"]), target["legendFormat"])


def filled(expr: str) -> str:
    for name, value in VARIABLES.items():
        expr = expr.replace(name, value)
    return expr


def config_for(discovery: str) -> str:
    """The config that is shipped, for a cluster whose list of nodes is elsewhere, and hurried."""
    text = (CONFIGS / "prometheus.yml").read_text()
    for old, new in (
        ("/tmp/ray/session_latest/prom_metrics_service_discovery.json", discovery), ("alerts.yaml", str(CONFIGS / "alerts.yaml")),
        ("scrape_interval: 10s, evaluation_interval: 10s", "scrape_interval: 1s, evaluation_interval: 1s"),
        ("refresh_interval: 30s", "refresh_interval: 1s"),
    ):  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    return text


@dataclass
class Prometheus:
    url: str
    http: aiohttp.ClientSession

    async def get(self, path: str, **params: Any) -> Any:
        async with self.http.get(self.url + path, params=params) as answer:
            body = await answer.json()
            assert answer.status == 200, (path, params, body)
            return body["data"]

    async def ask(self, expr: str) -> list[Any]:
        return (await self.get("/api/v1/query", query=expr))["result"]

    async def over(self, expr: str, start: float, end: float, step_s: float = 1) -> list[Any]:
        return (await self.get("/api/v1/query_range", query=expr, start=start, end=end, step=step_s))["result"]


@contextlib.asynccontextmanager
async def prometheus(config: str, directory: Path) -> AsyncGenerator[Prometheus]:
    """Scrapes as `config` says, until the block is left."""
    (directory / "prometheus.yml").write_text(config)
    address = f"127.0.0.1:{free_port()}"
    with (directory / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            program("prometheus"), f"--config.file={directory / 'prometheus.yml'}", f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address={address}", stdout=log, stderr=log,
        )  # fmt: skip
        try:
            async with aiohttp.ClientSession() as http:
                made = Prometheus(f"http://{address}", http)
                await made_ready(made, process, directory / "prometheus.log")
                yield made
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def made_ready(made: Prometheus, process: asyncio.subprocess.Process, log: Path) -> None:
    async with asyncio.timeout(30):
        while True:
            assert process.returncode is None, log.read_text()
            with contextlib.suppress(aiohttp.ClientError):
                async with made.http.get(made.url + "/-/ready") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)
