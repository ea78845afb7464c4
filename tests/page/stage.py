"""A real run for a browser to look at: started, broken and filled as its standard input says.

Owns the run and what is done to it. Prints one JSON line when it is up and one for every order that was carried out; ends, and the run
with it, when its standard input is closed. Runs in the project's environment, the browser in its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import orjson
import psutil

import rollout_ft
from rollout_ft.fleet.health import State
from rollout_ft.trial.client import Session
from rollout_ft.types import JSON

OVERRIDES = [
    "run=page", "ray.address=local", "engine.count=3", "engine.args=[--tokens-per-s,'40',--model,hash]", "engine.stream_interval_tokens=2",
    "engine.token_timeout_s=3", "engine.first_token_timeout_s=3", "engine.partial_flush_s=0.5", "fleet.kill_window_s=1",
    "fleet.warmup_s=1", "gateway.max_in_flight=20000", "gateway.max_connections=20000",
]  # fmt: skip
HOSTILE = "<img src=x onerror=alert(1)>"
"""A task's id is whatever its trainer says, an end's cause whatever its harness says: nothing of it may be more than text."""


class Orders:
    def __init__(self, run: rollout_ft.Run):
        self.run = run
        self._playing: set[asyncio.Task[None]] = set()
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._frozen: list[psutil.Process] = []

    async def play(self, prefix: str, count: int, turns: int, tokens: int, ended: bool = True) -> JSON:
        """Trials that go on by themselves; with `ended` each gets an outcome."""
        for i in range(count):
            session = await self.run.open_session(trial_id=f"{prefix}-{i:04}", task_id=f"{HOSTILE}{i % 7}", group_id=f"g{i // 4}", seed=i)
            task = asyncio.create_task(self._agent(session, turns, tokens, ended))
            self._playing.add(task)
            task.add_done_callback(self._playing.discard)
        return {"playing": len(self._playing)}

    async def _agent(self, session: Session, turns: int, tokens: int, ended: bool) -> None:
        messages: list[JSON] = [{"role": "user", "content": f"Trial {session.trial_id}: explain tides."}]
        for turn in range(turns):
            body = {"model": "default", "messages": messages, "max_tokens": tokens}
            headers = {"authorization": f"Bearer {session.api_key}"}
            for attempt in range(60):
                headers["x-stainless-retry-count"] = str(attempt)
                async with self._http.post(f"{session.base_url}/chat/completions", json=body, headers=headers) as answer:
                    said: Any = await answer.json()
                    if answer.status == 200:
                        break
                await asyncio.sleep(0.2)
            messages += [said["choices"][0]["message"], {"role": "user", "content": f"turn {turn}: go on"}]
        if ended:
            await self.end(session.trial_id, "completed", 1.0, "")

    async def open(self, prefix: str, count: int) -> JSON:
        """Sessions that nobody asks for anything."""
        places = asyncio.Semaphore(16)

        async def one(i: int) -> None:
            async with places:
                await self.run.open_session(trial_id=f"{prefix}-{i:05}", task_id=f"task {i % 97}", group_id=f"group {i // 8}")

        await asyncio.gather(*(one(i) for i in range(count)))
        return {}

    async def end(self, trial_id: str, outcome: str, reward: float | None, cause: str) -> JSON:
        return await self.run.client.request("POST", f"/trials/{trial_id}/outcome", {"outcome": outcome, "reward": reward, "cause": cause})

    async def restart(self, trial_id: str) -> JSON:
        return await self.run.client.request("POST", f"/trials/{trial_id}/restart", {"from_attempt": 1})

    async def kill(self, engine: str) -> JSON:
        """The engine's process, as the kernel would that runs out of memory."""
        process = await self._engine(engine)
        process.kill()
        return {"pid": process.pid}

    async def freeze(self, engine: str) -> JSON:
        """The engine's process and all that is below it stand still, and keep their connections."""
        process = await self._engine(engine)
        self._frozen = [process, *process.children(recursive=True)]
        for each in self._frozen:
            each.send_signal(signal.SIGSTOP)
        return {"pid": process.pid}

    async def pause(self) -> JSON:
        return await self.run.client.request("POST", "/fleet/pause", {})

    async def resume(self) -> JSON:
        return await self.run.client.request("POST", "/fleet/resume", {})

    async def whole(self) -> JSON:
        """Returns when every engine is healthy."""
        async with asyncio.timeout(90):
            while not all(e["state"] == State.HEALTHY for e in (await self.run.fleet())["engines"]):
                await asyncio.sleep(0.1)
        return {}

    async def cpu(self) -> JSON:
        """Seconds of CPU that each actor has had."""
        pids: dict[str, int] = await self.run.supervisor.ask("pids")
        return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in pids.items()}

    async def turns(self, seconds: float) -> JSON:
        """How long turns of one token take, one after the other, as their agent sees it."""
        session = await self.run.open_session(trial_id=f"timed-{time.monotonic_ns()}")
        messages: list[JSON] = [{"role": "user", "content": "explain tides"}]
        took: list[float] = []
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.monotonic()
            body = {"model": "default", "messages": messages, "max_tokens": 1}
            headers = {"authorization": f"Bearer {session.api_key}"}
            async with self._http.post(f"{session.base_url}/chat/completions", json=body, headers=headers) as answer:
                said: Any = await answer.json()
            took.append(1000 * (time.monotonic() - began))
            messages = [*messages[-20:], said["choices"][0]["message"], {"role": "user", "content": "go on"}]
            await asyncio.sleep(0.02)
        took.sort()
        return {"turns": len(took), "p50": round(took[len(took) // 2], 1), "p99": round(took[len(took) * 99 // 100], 1)}

    async def _engine(self, engine: str) -> psutil.Process:
        pids: dict[str, int] = await self.run.supervisor.ask("pids")
        actor = next(pid for name, pid in pids.items() if f"/{engine}/" in name)
        below = [p for p in psutil.Process(actor).children(recursive=True) if "small_engine" in " ".join(p.cmdline())]
        return below[-1]  # the first is its guard

    async def aclose(self) -> None:
        for task in self._playing:
            task.cancel()
        for each in self._frozen:
            if each.is_running():
                os.kill(each.pid, signal.SIGCONT)
        await self._http.close()


async def main(overrides: list[str]) -> None:
    lines: asyncio.Queue[bytes] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        for line in sys.stdin.buffer:
            loop.call_soon_threadsafe(lines.put_nowait, line)
        loop.call_soon_threadsafe(lines.put_nowait, b"")

    async with rollout_ft.start(None, [*OVERRIDES, *overrides]) as run:
        orders = Orders(run)
        reading = asyncio.create_task(asyncio.to_thread(read))
        print(orjson.dumps({"url": run.gateway_url, "key": run.operator_key}).decode(), flush=True)
        while line := await lines.get():
            order = orjson.loads(line)
            do: Callable[..., Awaitable[JSON]] = getattr(orders, order.pop("do"))
            try:
                told = await do(**order)
            except Exception as e:
                told = {"error": f"{type(e).__name__}: {e}"}
            print(orjson.dumps(told).decode(), flush=True)
        await orders.aclose()
        await reading


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
