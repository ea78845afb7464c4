"""An owner of engines, as slime is one: it acts on them directly and tells nobody. And what it starts: small engines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from ports import free_port
from ray_run import MARK

from rollout_ft.clock import monotonic

IDLE_WITHIN_S = 20


@dataclass
class Owner:
    """`abort_s` is how long it waits between two aborts of an engine that is not idle: slime's 3 s."""

    urls: list[str]
    abort_s: float = 3.0
    aborts: int = 0
    http: aiohttp.ClientSession = field(default_factory=aiohttp.ClientSession)

    async def post(self, url: str, path: str, body: Any = None) -> tuple[int, bytes]:
        async with self.http.post(url + path, json=body or {}) as answer:
            return answer.status, await answer.read()

    async def get(self, url: str, path: str) -> Any:
        async with self.http.get(url + path) as answer:
            return await answer.json()

    async def load(self, url: str) -> int:
        ranks = (await self.get(url, "/v1/loads?include=core"))["loads"]
        return sum(rank["num_running_reqs"] + rank["num_waiting_reqs"] for rank in ranks)

    async def abort_until_idle(self, limit_s: float = IDLE_WITHIN_S) -> None:
        """slime's `abort_servers_until_idle`, which waits for ever, with a limit."""
        async with asyncio.timeout(limit_s):
            await asyncio.gather(*map(self._abort_until_idle, self.urls))

    async def _abort_until_idle(self, url: str) -> None:
        while True:
            self.aborts += 1
            await self.post(url, "/abort_request", {"abort_all": True})
            if await self.load(url) <= 0:
                return
            await asyncio.sleep(self.abort_s)

    async def becomes_idle(self) -> None:
        """Without an abort: what had been sent just before is taken back."""
        while any([await self.load(url) for url in self.urls]):
            await asyncio.sleep(0.05)

    async def stays_idle(self, for_s: float) -> None:
        until = monotonic() + for_s
        while monotonic() < until:
            assert [await self.load(url) for url in self.urls] == [0] * len(self.urls)
            await asyncio.sleep(0.05)

    async def flush(self, tries: int = 60, pause_s: float = 1.0) -> int:
        """slime's `flush_cache`: how many tries it took. An engine that never gets idle fails."""
        return max(await asyncio.gather(*(self._flush(url, tries, pause_s) for url in self.urls)))

    async def _flush(self, url: str, tries: int, pause_s: float) -> int:
        for n in range(1, tries + 1):
            if (await self.post(url, "/flush_cache"))[0] == 200:
                return n
            await asyncio.sleep(pause_s)
        raise TimeoutError("Timeout while flushing cache.")

    async def pause(self, mode: str = "abort") -> None:
        await asyncio.gather(*(self.post(url, "/pause_generation", {"mode": mode}) for url in self.urls))

    async def go_on(self) -> None:
        await asyncio.gather(*(self.post(url, "/continue_generation") for url in self.urls))

    async def name(self, version: str, *urls: str) -> None:
        """New weights, as far as the version tells."""
        body = {"new_version": version, "abort_all_requests": False}
        await asyncio.gather(*(self.post(url, "/update_weight_version", body) for url in urls or self.urls))

    async def update(self, version: str) -> None:
        """slime's `update_weights`: pause, flush, load, continue."""
        await self.pause()
        await self.flush()
        await self.name(version)
        await self.go_on()


@dataclass
class Engines:
    """One process, an engine at each port."""

    process: subprocess.Popen[bytes]
    urls: list[str]
    command: list[str]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    async def again(self) -> None:
        """Another start at the same ports."""
        self.process = _start(self.command)
        await _up(self)


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    """Without the mark of a run: what is its owner's outlives it."""
    env = {k: v for k, v in os.environ.items() if k != MARK}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**env, "PYTHONPATH": os.getcwd()})


async def _up(engines: Engines) -> None:
    async with asyncio.timeout(30), aiohttp.ClientSession() as http:
        for url in engines.urls:
            while True:
                assert engines.process.poll() is None
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(url + "/ready") as answer:
                        if answer.status == 200:
                            break
                await asyncio.sleep(0.02)


async def start_engines(count: int, *arguments: str, tokens_per_s: float = 100) -> Engines:
    ports = [free_port() for _ in range(count)]
    command = [sys.executable, "-m", "rollout_ft.testing.small_engine", "--model", "hash", "--incremental-streaming-output"]
    command += ["--port", ",".join(map(str, ports)), "--tokens-per-s", str(tokens_per_s), *arguments]
    engines = Engines(_start(command), [f"http://127.0.0.1:{p}" for p in ports], command)
    await _up(engines)
    return engines


@contextlib.asynccontextmanager
async def owned(count: int, *arguments: str, tokens_per_s: float = 100, abort_s: float = 3.0) -> AsyncGenerator[tuple[Owner, Engines]]:
    engines = await start_engines(count, *arguments, tokens_per_s=tokens_per_s)
    owner = Owner(list(engines.urls), abort_s)
    try:
        yield owner, engines
    finally:
        await owner.http.close()
        engines.kill()


def versions_of(turns: Sequence[Any]) -> set[str]:
    return {span.version for turn in turns for span in turn.version_spans}
