"""One actor of the run: asked, watched, killed.

Owns Ray's errors and the patience with a call. Decides nothing. The death of a process is seen through a call that never
returns, in milliseconds and without polling; that of a node is not, for Ray takes up to a minute to see it: see `pulse`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from rollout_ft.errors import RolloutFTError
from rollout_ft.rayapi import ray

REPEATS = 20
REPEAT_PAUSE_S = 0.1


class Gone(RolloutFTError):
    """The actor is dead, or did not answer in time; `dead`: Ray says that its process has ended."""

    def __init__(self, message: str, dead: bool = False):
        super().__init__(message, dead)
        self.message, self.dead = message, dead

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Member:
    """One actor of the run; `role` is `engine-0`, `store-1`, `gateway-0` …"""

    role: str
    incarnation: int
    name: str
    handle: Any

    async def ask(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Calls a method; raises our own errors as they were raised there, Gone when there is no answer.

        An answer that was lost on the way is asked for again: every method is idempotent.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._repeated(method, *args)
        except RayTaskError as e:
            if isinstance(e.cause, RolloutFTError):
                raise e.cause from None
            raise
        except (RayError, TimeoutError) as e:
            raise Gone(f"{self.name}: {_why(e)}", isinstance(e, ActorDiedError)) from e

    async def _repeated(self, method: str, *args: Any) -> Any:
        call = getattr(self.handle, method)
        for _ in range(REPEATS):
            try:
                return await call.remote(*args)
            except ActorUnavailableError:
                await asyncio.sleep(REPEAT_PAUSE_S)
        return await call.remote(*args)

    async def death(self) -> str:
        """Returns when the actor is dead, with what Ray says of it."""
        while True:
            try:
                await self.handle.forever.remote()
            except ActorUnavailableError:
                await asyncio.sleep(REPEAT_PAUSE_S)  # a call that was lost is no death
            except RayError as e:
                return type(e).__name__
            else:
                return "returned"

    def kill(self) -> None:
        """At once; an actor that is dead already is no error. Blocks while Ray's control plane does not answer."""
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self.handle, no_restart=True)


async def quietly(call: Awaitable[object]) -> None:
    """For what is only told: one that does not hear it will be seen to be gone, or ask."""
    with contextlib.suppress(Gone):
        await call


def _why(e: Exception) -> str:
    """The kind of Ray's error, or our own words where an actor died of them in its constructor."""
    ours = re.search(r"^\s*rollout_ft\.[\w.]+: (.+)$", str(e), re.MULTILINE)
    return ours[1] if ours else type(e).__name__
