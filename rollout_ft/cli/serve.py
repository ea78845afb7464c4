"""`rollout-ft serve`: a run for whoever comes.

Owns the line that says where it is. Ends when it is cancelled.
"""

from __future__ import annotations

import asyncio
import sys

import orjson

from rollout_ft import runtime
from rollout_ft.config import Config


def warn(run: runtime.Run) -> None:
    """One line on stderr for each thing that the cluster's shape risks."""
    for warning in run.warnings:
        print(f"rollout-ft: warning: {warning}", file=sys.stderr, flush=True)


async def serve(config: Config) -> None:
    async with runtime.start(config) as run:
        warn(run)
        ready = {"gateway_url": run.gateway_url, "operator_key": run.operator_key, "ray_address": run.ray_address}
        print(orjson.dumps(ready).decode(), flush=True)
        print(f"rollout-ft: status page: {run.status_url} (it asks for the operator_key)", file=sys.stderr, flush=True)
        await asyncio.Event().wait()
