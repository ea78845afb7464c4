"""`rollout-ft serve`: a run for whoever comes.

Owns the line that says where it is. Ends when it is cancelled.
"""

from __future__ import annotations

import asyncio

import orjson

from rollout_ft import runtime
from rollout_ft.config import Config


async def serve(config: Config) -> None:
    async with runtime.start(config) as run:
        ready = {"gateway_url": run.gateway_url, "operator_key": run.operator_key, "ray_address": run.ray_address}
        print(orjson.dumps(ready).decode(), flush=True)
        await asyncio.Event().wait()
