"""`rollout-ft serve`: a run for whoever comes.

Owns the line that says where it is. Ends when it is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import orjson

from rollout_ft import runtime
from rollout_ft.cli.served import Served, place
from rollout_ft.config import Config
from rollout_ft.errors import BadRequest


def warn(run: runtime.Run) -> None:
    """One line on stderr for each thing that the cluster's shape risks."""
    for warning in run.warnings:
        print(f"rollout-ft: warning: {warning}", file=sys.stderr, flush=True)


async def serve(config: Config, output: Path | None = None) -> None:
    """With `output` what happens is kept there."""
    if output is None:
        async with runtime.start(config) as run:
            return await _serving(run)
    directory = place(output, config)
    served, metrics = Served(directory), dict[str, float]()
    try:
        async with runtime.start(config, secret=directory.secret, resume=directory.resumed, last_view=served.last_view) as run:
            served.started(run.gateway_url)
            run.on_event = served.event
            try:
                await _serving(run)
            finally:
                with contextlib.suppress(BadRequest):
                    metrics = await run.metrics()
    finally:
        served.close(metrics)


async def _serving(run: runtime.Run) -> None:
    warn(run)
    ready = {"gateway_url": run.gateway_url, "operator_key": run.operator_key, "ray_address": run.ray_address}
    print(orjson.dumps(ready).decode(), flush=True)
    print(f"rollout-ft: status page: {run.status_url} (it asks for the operator_key)", file=sys.stderr, flush=True)
    await asyncio.Event().wait()
