"""SGLang's parsers, in a process of their own.

Owns that process. It costs seconds to import, it matches patterns whose time explodes on text that is made for that,
and it changes modules; so it is not done here. One request at a time; a request that a process dies of is answered
with None, because it would kill the next one as well, and a process that dies otherwise is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import orjson

from rollout_ft.errors import ConfigError
from rollout_ft.session.calls import Call
from rollout_ft.types import JSON

_log = logging.getLogger("rollout_ft")
WORKER = str(Path(__file__).with_name("sglang_worker.py"))
_MAX_REPLY_BYTES = 256 * 2**20
_TRIES = 3
_ANSWER_S = 120
"""Far more than a request may compute: a process that was stopped is replaced as well."""


class _Ended(Exception):
    """The process ended, and not because of what it was asked."""


class SGLangParsers:
    """A `Reader`. `env` is the environment of the process; it starts with the first request, or with `start`."""

    def __init__(self, tool_parser: str, reasoning_parser: str, env: dict[str, str]):
        self._names, self._env = (tool_parser, reasoning_parser), env
        self._process: asyncio.subprocess.Process | None = None
        self._markers = ("", "")
        self._turn = asyncio.Lock()

    async def calls(self, texts: Sequence[str], tools: list[Any]) -> list[tuple[str, list[Call]] | None]:
        reply = await self._ask({"do": "calls", "texts": list(texts), "tools": tools})
        if reply is None:
            return [None for _ in texts]
        found = cast("list[JSON | None]", reply["found"])
        return [None if f is None else (f["text"], [Call(name or "", arguments) for name, arguments in f["calls"]]) for f in found]

    async def reasoning(self, text: str) -> tuple[str, str] | None:
        reply = await self._ask({"do": "reasoning", "text": text})
        return None if reply is None else (reply["reasoning"], reply["text"])

    async def markers(self) -> tuple[str, str]:
        return self._markers

    async def start(self) -> None:
        """Raises ConfigError with SGLang's reason when it cannot be used."""
        async with self._turn:
            try:
                await self._running()
            except _Ended:
                raise ConfigError("model.tool_parser: the process of SGLang's parsers ended at once; its log says why") from None

    async def aclose(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            assert process.stdin is not None
            process.stdin.close()
            await process.wait()

    async def _ask(self, request: JSON) -> JSON | None:
        # Shielded: a reply that nobody waited for any more would be taken for the next one's.
        return await asyncio.shield(asyncio.ensure_future(self._exchange(request)))

    async def _exchange(self, request: JSON) -> JSON | None:
        async with self._turn:
            for _ in range(_TRIES):
                try:
                    async with asyncio.timeout(_ANSWER_S):
                        reply = await _talk(await self._running(), request)
                except (_Ended, TimeoutError):
                    await self.aclose()
                    continue
                if "error" in reply:
                    _log.warning("SGLang's parser failed (%s): the text is delivered as text", reply["error"])
                    return None
                return reply
        _log.error("SGLang's parsers ended %d times: the text is delivered as text", _TRIES)
        return None

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", WORKER, *self._names, env=self._env, limit=_MAX_REPLY_BYTES,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            self._process = process
            ready = await _line(process)
            if "error" in ready:
                await self.aclose()
                raise ConfigError(f"model.tool_parser, model.reasoning_parser: SGLang's parsers cannot be used: {ready['error']}")
            self._markers = (str(ready["opening"]), str(ready["closing"]))
        return self._process


async def _talk(process: asyncio.subprocess.Process, request: JSON) -> JSON:
    assert process.stdin is not None
    try:
        process.stdin.write(orjson.dumps(request) + b"\n")
        await process.stdin.drain()
    except ConnectionError as e:
        raise _Ended from e
    return await _line(process)


async def _line(process: asyncio.subprocess.Process) -> JSON:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line.endswith(b"\n"):
        await process.wait()
        raise _Ended
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as e:  # half a character, as an escape: no client could be sent it
        return {"error": f"what it found is no text: {e}"}
