"""Agents that keep every byte they receive: the load of the multi-node tests and of the recovery benchmark.

Owns the client's side of a history. An agent behaves as the SDKs do: it waits, repeats what failed with a mark, and
builds each request on the last reply. The same task and the same replies give the same requests.
"""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import orjson

from rollout_ft.clock import wall
from rollout_ft.testing.history import Received
from rollout_ft.trial.client import Session
from rollout_ft.types import JSON

TRIES = 40
PAUSE_S = 0.1


class Load:
    """`received`: every reply that came whole; `tokens_at`: when the last one of each trial came, on the wall clock."""

    def __init__(self, *, read_timeout_s: float = 60.0):
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=read_timeout_s))
        self._read_timeout_s = read_timeout_s
        self.received: list[Received] = []
        self.replies: dict[str, list[float]] = {}

    async def agent(self, task: JSON, session: Session) -> float:
        """Plays `turns` turns; the reward says how many of its tries failed."""
        messages: list[JSON] = [{"role": "user", "content": f"task {task['task_id']}"}]
        failed = 0
        for turn in range(int(task["turns"])):
            body = orjson.dumps({"model": "default", "messages": messages, "max_tokens": task.get("max_tokens", 48)})
            reply, tries = await self._ask(session, body)
            failed += tries
            messages += [reply, {"role": "user", "content": f"turn {turn}: go on"}]
        return float(failed)

    async def _ask(self, session: Session, body: bytes) -> tuple[JSON, int]:
        """The reply, and how many tries failed before it."""
        url = f"{session.base_url}/chat/completions"
        why = ""
        for attempt in range(TRIES):
            headers = {
                "authorization": f"Bearer {session.api_key}", "content-type": "application/json",
                "x-stainless-retry-count": str(attempt), "x-stainless-read-timeout": str(self._read_timeout_s),
            }  # fmt: skip
            try:
                async with self._http.post(url, data=body, headers=headers) as response:
                    content = await response.read()
                    if response.status == 200:
                        return self._keep(session, response.headers["x-rollout-ft-turn"], content), attempt
                    why = f"{response.status} {content[:300]!r}"
                    if response.headers.get("x-should-retry") == "false" or response.status < 429:
                        raise InternalServerError(why)
            except (aiohttp.ClientError, TimeoutError) as e:
                why = f"{type(e).__name__}: {e}"
            await asyncio.sleep(PAUSE_S)
        raise InternalServerError(f"{TRIES} tries, the last: {why}")

    def _keep(self, session: Session, turn: str, content: bytes) -> Any:
        self.received.append(Received(session.trial_id, session.attempt, turn, content))
        self.replies.setdefault(session.trial_id, []).append(wall())
        return orjson.loads(content)["choices"][0]["message"]

    async def aclose(self) -> None:
        await self._http.close()


class InternalServerError(Exception):
    """As the SDKs name what their own retries did not mend: the trial's policy counts it as infrastructure."""
