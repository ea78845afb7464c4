"""What is pushed to an engine beyond generations: pauses, weights, memory.

Owns the one way in which that leaves us. Knows nothing of what it means. An engine that its owner controls has `Never` in
its place: whatever would be pushed is refused, and the gate in front of the engine is all that moves.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import aiohttp
import orjson

from rollout_ft.errors import EngineLost, EngineRefused
from rollout_ft.types import JSON


class Control(Protocol):
    ours: bool
    """Whether anything may be pushed at all."""

    async def send(self, path: str, body: JSON) -> Any:
        """One call, and its answer. Raises EngineRefused with what the engine said, EngineLost when it said nothing."""
        ...

    async def aclose(self) -> None: ...


class HTTPControl:
    """SGLang's routes. Takes as long as it takes: who calls has the deadline."""

    ours = True

    def __init__(self, engine_id: str, url: str):
        self._engine_id, self._url = engine_id, url
        # A fresh connection for each: these are few, and an idle one that the server closes would look like a lost engine.
        connector = aiohttp.TCPConnector(force_close=True)
        self._http = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None))

    async def send(self, path: str, body: JSON) -> Any:
        headers = {"content-type": "application/json"}
        try:
            async with self._http.post(self._url + path, data=orjson.dumps(body), headers=headers) as response:
                content = await response.read()
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as e:
            raise EngineLost(self._engine_id, f"connection: {path}: {type(e).__name__}") from e
        if response.status != 200:
            raise EngineRefused(response.status, f"{path}: {_said(content)}")
        return _parsed(content)

    async def aclose(self) -> None:
        await self._http.close()


class Never:
    """An engine that somebody else owns."""

    ours = False

    async def send(self, path: str, body: JSON) -> Any:
        raise EngineRefused(405, f"{path}: the engine's owner does this at the engine; tell us of it (how: external)")

    async def aclose(self) -> None: ...


def _parsed(content: bytes) -> Any:
    try:
        return orjson.loads(content) if content else None
    except orjson.JSONDecodeError:
        return content.decode(errors="replace")


def _said(content: bytes) -> str:
    """The engine's own words, wherever it put them."""
    answer = _parsed(content)
    if isinstance(answer, dict):
        said = cast(JSON, answer)
        return str(next((said[key] for key in ("message", "error", "detail") if key in said), said))[:500]
    return str(answer)[:500]
