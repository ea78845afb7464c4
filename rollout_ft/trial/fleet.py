"""The fleet's weights, in a trainer's hands.

Owns the trainer's calls in Python: `Fleet` where there is an event loop, `SyncFleet` where there is none. Knows nothing of
engines. Every call is safe to repeat, and is repeated while nobody answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, Literal, TypeVar

from rollout_ft.trial.client import Client
from rollout_ft.types import JSON

Mode = Literal["abort", "in_place", "retract"]
How = Literal["disk", "tensor", "distributed", "ipc", "external"]
ANSWER_S = 900.0
"""How long one call may take: longer than `fleet.update_timeout_s`, after which an engine is given up."""
T = TypeVar("T")


class Fleet:
    """Every call returns `{ok, engines: {engine_id: {ok, error, version, stale, …}}, weights}`: an engine that did not do it is
    named there. Raises BadRequest when none did."""

    def __init__(self, client: Client, answer_s: float = ANSWER_S):
        self._client, self._answer_s = client, answer_s

    async def pause(self, mode: Mode = "abort") -> JSON:
        """Nothing is sampled from now on, and no deadline runs. What is in flight goes on after `resume`."""
        return await self._post("pause", {"mode": mode})

    async def resume(self) -> JSON:
        return await self._post("resume", {})

    async def update(self, version: str, how: How = "disk", *, path: str = "", body: JSON | None = None) -> JSON:
        """Loads the weights `version` on every engine, after bringing memory back that was given up.

        `disk`: from the directory `path`. `tensor`, `distributed`, `ipc`: `body` is what SGLang's own route takes. `external`:
        you did it at the engines yourself, and they are asked whether they say so."""
        return await self._post("weights", {"version": version, "how": how, "path": path, "body": body or {}})

    async def offload(self, *tags: str) -> JSON:
        """The engines give their memory up, all of it unless tags say which; `update` brings it back."""
        return await self._post("offload", {"tags": list(tags)})

    async def state(self) -> JSON:
        """`GET /fleet`: `weights` has the phase and the versions, `engines` each engine's state, `warnings` what needs you."""
        return await self._client.get("/fleet")

    @contextlib.asynccontextmanager
    async def paused(self, mode: Mode = "abort") -> AsyncGenerator[None]:
        """A pause for as long as the block takes; it ends however the block does."""
        await self.pause(mode)
        try:
            yield
        finally:
            await self.resume()

    async def _post(self, what: str, body: JSON) -> JSON:
        return await self._client.request("POST", f"/fleet/{what}", body, answer_s=self._answer_s)


class SyncFleet:
    """`Fleet` for a trainer without an event loop: its calls return when they are done. Close it, or use it as a block."""

    def __init__(self, gateway_url: str, operator_key: str, *, verify: bool = True, answer_s: float = ANSWER_S):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout_ft fleet", daemon=True)
        self._thread.start()
        self._client = self._run(_client(gateway_url, operator_key, verify))
        self._fleet = Fleet(self._client, answer_s)

    def pause(self, mode: Mode = "abort") -> JSON:
        return self._run(self._fleet.pause(mode))

    def resume(self) -> JSON:
        return self._run(self._fleet.resume())

    def update(self, version: str, how: How = "disk", *, path: str = "", body: JSON | None = None) -> JSON:
        return self._run(self._fleet.update(version, how, path=path, body=body))

    def offload(self, *tags: str) -> JSON:
        return self._run(self._fleet.offload(*tags))

    def state(self) -> JSON:
        return self._run(self._fleet.state())

    @contextlib.contextmanager
    def paused(self, mode: Mode = "abort") -> Generator[None]:
        self.pause(mode)
        try:
            yield
        finally:
            self.resume()

    def close(self) -> None:
        """Twice is once."""
        if self._thread.is_alive():
            self._run(self._client.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> SyncFleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _client(gateway_url: str, operator_key: str, verify: bool) -> Client:
    """Made where it is used: a connection belongs to its event loop."""
    return Client(gateway_url, operator_key, verify=verify)
