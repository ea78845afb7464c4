"""The gateway, as harnesses, trainers and our own runner use it.

Owns the operator's side of the HTTP interface, with a patience that fits a gateway that may be restarting. Every call
is safe to repeat.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson

from rollout_ft.clock import monotonic
from rollout_ft.errors import BadRequest
from rollout_ft.trial.steps import Recorded, recorded_of
from rollout_ft.types import JSON

if TYPE_CHECKING:
    from rollout_ft.trial.tools import Tools

PATIENCE_S = 300.0
"""How long a run that cannot serve is waited for: engines take minutes to load, and a trial is worth more."""
MAX_PAUSE_S = 2.0
ANSWER_S = 60.0


@dataclass(frozen=True, slots=True)
class Session:
    """One attempt's session: what an agent needs is `base_url` and `api_key`."""

    session_id: str
    trial_id: str
    attempt: int
    base_url: str
    api_key: str
    turns: int
    client: Client
    environment: Tools | None = None
    """What the agent's tools act on, where the trial has one: `await session.environment.step({…})`."""
    environment_url: str = ""
    """The same for an agent in a process of its own: `trial.remote`."""
    traceparent: str = ""
    """Of the attempt's span, where the run is traced: what the agent traces itself belongs below it."""

    async def messages(self) -> list[JSON]:
        """For an agent that starts from messages: the conversation of earlier attempts up to the last reply that they asked for,
        which the agent goes on behind; nothing in a first attempt. Its environment goes on from there as well."""
        if self.attempt == 1:
            return []
        path = f"/sessions/{self.session_id}/checkpoint"
        checkpoint = await self.client.request("POST", path, key=self.api_key)
        if self.environment is not None:
            self.environment.begin_at(checkpoint["steps_before"])
        return checkpoint["messages"]

    async def checkpoint(self) -> JSON:
        """`GET /sessions/{id}/checkpoint`: what earlier attempts left."""
        return await self.client.request("GET", f"/sessions/{self.session_id}/checkpoint", key=self.api_key)

    async def record_step(self, number: int, action: JSON, result: JSON, snapshot: str = "") -> Recorded:
        """What is recorded as this step of the attempt's environment: this, or what was before it. Raises BadRequest."""
        body = {"number": number, "action": action, "result": result, "snapshot": snapshot}
        return recorded_of(await self.client.request("POST", f"/sessions/{self.session_id}/steps", body))

    async def trajectory(self) -> JSON:
        """Token-exact paths: `GET /sessions/{id}/trajectory`. `samples.routed.array_of` reads their `routed_experts`."""
        return await self.client.trajectory(self.session_id, self.api_key)

    async def records(self) -> JSON:
        return await self.client.request("GET", f"/sessions/{self.session_id}", key=self.api_key)


class Client:
    def __init__(self, gateway_url: str, operator_key: str, *, verify: bool = True, patience_s: float = PATIENCE_S):
        self._url, self._key, self._patience_s = gateway_url, operator_key, patience_s
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=15, ssl=verify)
        self._http = aiohttp.ClientSession(connector=connector)

    async def open_session(self, **request: Any) -> Session:
        """Opens a trial's session; a call whose answer was lost gives the same one."""
        return self._session(await self.request("POST", "/sessions", request, idempotency_key=uuid.uuid4().hex))

    async def restart(self, trial_id: str, from_attempt: int, checkpoint: bool, reason: str = "asked", cause: str = "") -> Session:
        """`reason` is one of `types.RESTARTS`."""
        body = {"from_attempt": from_attempt, "checkpoint": checkpoint, "reason": reason, "cause": cause[:4096]}
        return self._session(await self.request("POST", f"/trials/{trial_id}/restart", body))

    async def outcome(self, trial_id: str, outcome: str, reward: float | None, cause: str, attempt: int) -> JSON:
        body = {"outcome": outcome, "reward": reward, "cause": cause, "attempt": attempt}
        return await self.request("POST", f"/trials/{trial_id}/outcome", body)

    async def release(self, trial_id: str) -> JSON:
        """The trajectory is safe where it belongs: the run may forget it, but for the trial's summary."""
        return await self.request("POST", f"/trials/{trial_id}/release")

    async def trial(self, trial_id: str) -> JSON:
        return await self.get(f"/trials/{trial_id}")

    async def trajectory(self, session_id: str, session_key: str) -> JSON:
        return await self.request("GET", f"/sessions/{session_id}/trajectory", key=session_key)

    async def still_s(self) -> float:
        """How long the fleet has not generated because its trainer wanted it so, since the run began."""
        return (await self.get("/fleet"))["weights"]["still_s"]

    async def get(self, path: str) -> Any:
        return await self.request("GET", path)

    async def request(
        self, method: str, path: str, body: JSON | None = None, *, key: str = "", idempotency_key: str = "", answer_s: float = ANSWER_S
    ) -> Any:
        """One call, repeated while nobody can serve it. Raises BadRequest with the status and the server's words.

        `answer_s`: how long one try may take."""
        headers = {"authorization": f"Bearer {key or self._key}"}
        if idempotency_key:
            headers["idempotency-key"] = idempotency_key
        data = orjson.dumps(body) if body is not None else None
        until, pause_s = monotonic() + self._patience_s, 0.1
        timeout = aiohttp.ClientTimeout(total=answer_s)
        while True:
            try:
                async with self._http.request(method, self._url + path, data=data, headers=headers, timeout=timeout) as response:
                    content = await response.read()
                    if response.status < 300:
                        return orjson.loads(content) if content else None
                    if response.status != 503 or monotonic() > until:
                        raise _error(response.status, content)
            except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as e:
                if monotonic() > until:
                    raise BadRequest(f"the gateway at {self._url} does not answer: {str(e) or type(e).__name__}", 503, "unreachable") from e
            await asyncio.sleep(pause_s)
            pause_s = min(MAX_PAUSE_S, pause_s * 1.5)

    def _session(self, opened: JSON) -> Session:
        names = ("session_id", "trial_id", "attempt", "base_url", "api_key", "turns")
        return Session(**{k: opened[k] for k in names}, client=self, traceparent=opened.get("traceparent", ""))

    async def aclose(self) -> None:
        await self._http.close()


def _error(status: int, content: bytes) -> BadRequest:
    try:
        error = orjson.loads(content)["error"]
        return BadRequest(str(error["message"]), status, str(error["code"]), error.get("param"))
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return BadRequest(content.decode(errors="replace")[:500] or f"HTTP {status}", status, "unknown")
