"""The load generator's process, as the benchmark sees it.

Owns its start and its end: it ends when its stdin closes, however the block is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import msgspec

from rollout_ft.cli.bench.loads import LINE_BYTES, Load, LoadFailed, Result, Step


@dataclass(frozen=True, slots=True)
class Generator:
    """Clients that wait for their next step."""

    process: asyncio.subprocess.Process

    async def begin(self, load: Load) -> None:
        """Returns when all clients are there."""
        await self._send(load)
        await self.take()

    async def take(self, *, turns: int = 0, seconds: float = 0.0) -> Result:
        """Has every client take so many turns more, or turns for so long. Raises LoadFailed."""
        await self._send(Step(turns, seconds))
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise LoadFailed(f"the load generator ended with exit code {await self.process.wait()}")
        result = msgspec.json.decode(line, type=Result)
        if result.error:
            raise LoadFailed(result.error)
        return result

    async def _send(self, what: Load | Step) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(what) + b"\n")
        await self.process.stdin.drain()


@contextlib.asynccontextmanager
async def generator(load: Load) -> AsyncGenerator[Generator]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rollout_ft.cli.bench.loadgen", start_new_session=True, limit=LINE_BYTES,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    made = Generator(process)
    try:
        await made.begin(load)
        yield made
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()
