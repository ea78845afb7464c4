"""The supervisor, as the driver of one engine knows it.

Owns the reports about the engine, of which only the last matters: one that is overtaken is not sent.
"""

from __future__ import annotations

import asyncio
import logging

from rollout_ft.fleet.remote import RemoteSupervisor

_log = logging.getLogger("rollout_ft")


class Overseer:
    def __init__(self, supervisor: RemoteSupervisor, engine_id: str, incarnation: int):
        self._supervisor, self._who = supervisor, (engine_id, incarnation)
        self._told = self._to_tell = ""
        self._telling: asyncio.Task[None] | None = None

    async def may_lose(self, reason: str) -> bool:
        """While there is nobody to say so, nothing is given up: it is asked again."""
        try:
            return await self._supervisor.may_lose(*self._who, reason)
        except Exception:
            _log.exception("the supervisor could not be asked whether the engine may be given up (%s)", reason)
            return False

    def doubted(self, reason: str) -> None:
        self._to_tell = reason
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        try:
            while bool(self._told) != bool(self._to_tell):
                self._told = self._to_tell
                await self._supervisor.engine_doubted(*self._who, self._told)
        except Exception:
            _log.exception("the supervisor could not be told that the engine is in doubt")
        finally:
            self._telling = None
