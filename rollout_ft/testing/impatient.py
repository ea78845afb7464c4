"""Agents as they are in the field: an SDK's timeouts and retries, and a router in front that loses replies.

Owns the client's side of a storm. Times are in seconds of a day that is `scale` times faster. The router gives up on a
request that takes longer than it waits and answers 504, while whatever stands behind it goes on; the SDK repeats what it
may repeat, three tries in all, and honours what the server says of retries.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection
from dataclasses import dataclass, field

import aiohttp
import orjson

from rollout_ft.trial.client import Session
from rollout_ft.types import JSON

TRIES = 3
BACKOFF_S, MAX_BACKOFF_S = 0.5, 8.0
RETRIED = {408, 409, 429}


class InternalServerError(Exception):
    """As the SDKs name what their own retries did not mend: the trial's policy counts it as infrastructure."""


@dataclass(frozen=True, slots=True)
class Patience:
    """Of the SDK (`read_s`, which it tells the server where `tells`), and of the router, which tells nobody."""

    scale: float
    read_s: float = 600.0
    router_s: float = 300.0
    tells: bool = True


@dataclass(slots=True)
class Seen:
    """What the clients met: answers by status, and replies that the router lost."""

    statuses: dict[int, int] = field(default_factory=dict[int, int])
    lost: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    broken: int = 0


class Impatient:
    """Plays tasks; `slow` are the (task, turn) whose first reply the router loses when it takes too long."""

    def __init__(self, patience: Patience, slow: Collection[tuple[str, int]] = (), seed: int = 0):
        self._patience, self._slow, self._rng = patience, frozenset(slow), random.Random(seed)
        self._http = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60))
        self.seen = Seen()

    async def play(self, task: JSON, session: Session) -> float:
        """One trial: `tokens` a turn, `tools_s` of tool time after each."""
        messages: list[JSON] = [{"role": "user", "content": f"task {task['task_id']}"}]
        for turn, (tokens, tool_s) in enumerate(zip(task["tokens"], task["tools_s"], strict=True)):
            body: JSON = {"model": "default", "messages": messages, "max_tokens": tokens, "ignore_eos": True}
            reply = await self._ask(session, orjson.dumps(body), (str(task["task_id"]), turn))
            messages += [reply, {"role": "user", "content": f"turn {turn}: go on"}]
            await asyncio.sleep(tool_s / self._patience.scale)
        return 1.0

    async def _ask(self, session: Session, body: bytes, which: tuple[str, int]) -> JSON:
        why = ""
        for attempt in range(TRIES):
            status, headers, content = await self._send(session, body, which, attempt)
            if status == 200:
                return orjson.loads(content)["choices"][0]["message"]
            why = f"{status} {content[:300]!r}"
            told = headers.get("x-should-retry")
            if told == "false" or (told != "true" and status not in RETRIED and 0 < status < 500):
                break
            await asyncio.sleep(self._pause_s(headers, attempt))
        raise InternalServerError(why)

    async def _send(self, session: Session, body: bytes, which: tuple[str, int], attempt: int) -> tuple[int, JSON, bytes]:
        p = self._patience
        sent = {
            "authorization": f"Bearer {session.api_key}", "content-type": "application/json", "x-stainless-retry-count": str(attempt),
        }  # fmt: skip
        if p.tells:
            sent["x-stainless-read-timeout"] = str(p.read_s / p.scale)
        loses = which in self._slow and which not in self.seen.lost
        try:
            async with asyncio.timeout((p.router_s if loses else p.read_s) / p.scale):
                async with self._http.post(f"{session.base_url}/chat/completions", data=body, headers=sent) as response:
                    content = await response.read()
                    status, headers = response.status, {k.lower(): v for k, v in response.headers.items()}
        except TimeoutError:
            if loses:
                self.seen.lost.add(which)
            status, headers, content = (504 if loses else 0), {}, b"timeout"
        except aiohttp.ClientError as e:
            self.seen.broken += 1
            status, headers, content = 0, {}, type(e).__name__.encode()
        self.seen.statuses[status] = self.seen.statuses.get(status, 0) + 1
        return status, headers, content

    def _pause_s(self, headers: JSON, attempt: int) -> float:
        if "retry-after-ms" in headers:
            return float(headers["retry-after-ms"]) / 1000
        if "retry-after" in headers:
            return float(headers["retry-after"]) / self._patience.scale
        backoff = min(MAX_BACKOFF_S, BACKOFF_S * 2**attempt)
        return backoff * (1 - 0.25 * self._rng.random()) / self._patience.scale

    async def aclose(self) -> None:
        await self._http.close()
