"""The run's actors: made, found again by name, watched, killed.

Owns names, Ray's options and Ray's errors. Decides nothing. An actor that is not told by the supervisor that the run
lives ends itself; a death is seen through a call that never returns, in milliseconds and without polling.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError, RayTaskError

from rollout_ft.checkpoint.view import View
from rollout_ft.config import Config, journalled
from rollout_ft.errors import RolloutFTError
from rollout_ft.rayapi import ray

LOCK_MARGIN_S = 15.0


class Gone(RolloutFTError):
    """The actor is dead, or did not answer in time."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What every actor of a run is told when it is made."""

    config: Config
    namespace: str
    secret: str
    faults: bool = False
    loopback: bool = False
    """The cluster is this machine alone: nothing listens on other addresses."""
    last_view: int = 0
    """The highest view that is known to have been open: what the journals have must not be older."""


def actor_name(run: str, role: str, incarnation: int) -> str:
    """DESIGN section 4: `{run}/{role}/{incarnation}`."""
    return f"{run}/{role}/{incarnation}"


@dataclass(frozen=True, slots=True)
class Member:
    """One actor of the run; `role` is `engine-0`, `store-1`, `gateway-0` …"""

    role: str
    incarnation: int
    name: str
    handle: Any

    async def ask(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Calls a method; raises our own errors as they were raised there, Gone when there is no answer."""
        try:
            async with asyncio.timeout(timeout_s):
                return await getattr(self.handle, method).remote(*args)
        except RayTaskError as e:
            if isinstance(e.cause, RolloutFTError):
                raise e.cause from None
            raise
        except (RayError, TimeoutError) as e:
            raise Gone(f"{self.name}: {_why(e)}") from e

    async def death(self) -> str:
        """Returns when the actor is dead, with what Ray says of it."""
        try:
            await self.handle.forever.remote()
        except RayError as e:
            return type(e).__name__
        return "returned"

    def kill(self) -> None:
        """At once; an actor that is dead already is no error."""
        with contextlib.suppress(RayError, ValueError):
            ray.kill(self.handle, no_restart=True)


def _why(e: Exception) -> str:
    """The kind of Ray's error, or our own words where an actor died of them in its constructor."""
    ours = re.search(r"^\s*rollout_ft\.[\w.]+: (.+)$", str(e), re.MULTILINE)
    return ours[1] if ours else type(e).__name__


class Crew:
    def __init__(self, setup: Setup):
        self.setup = setup
        self._run, self._namespace = setup.config.run, setup.namespace

    def engine(self, engine_id: str, incarnation: int, view: View) -> Member:
        from rollout_ft.engine.actor import EngineActor

        return self._make(EngineActor, engine_id, incarnation, self.setup, engine_id, incarnation, view,
                          num_gpus=self.setup.config.engine.num_gpus)  # fmt: skip

    def gateway(self, role: str, incarnation: int, port: int) -> Member:
        from rollout_ft.gateway.actor import GatewayActor

        return self._make(GatewayActor, role, incarnation, self.setup, port)

    def store(self, role: str, incarnation: int, view: View | None) -> Member:
        from rollout_ft.checkpoint.store import create_store_actor

        name = actor_name(self._run, role, incarnation)
        store = self.setup.config.store
        journal = store.journal_dir if journalled(self.setup.config) else None
        handle = create_store_actor(
            name, self._namespace, view, journal, memory_bytes=store.memory_bytes, payload_bytes=store.payload_bytes,
            loopback=self.setup.loopback, patience_s=self.setup.config.orphan_s + LOCK_MARGIN_S,
        )  # fmt: skip
        handle.live.remote(self.setup.config.orphan_s)
        return Member(role, incarnation, name, handle)

    def name(self, role: str, incarnation: int) -> str:
        return actor_name(self._run, role, incarnation)

    def existing(self) -> list[Member]:
        """Every actor of the run that Ray still knows, the supervisor left out."""
        found: list[Member] = []
        for each in ray.util.list_named_actors(all_namespaces=True):
            run, _, rest = each["name"].partition("/")
            role, _, incarnation = rest.partition("/")
            if each["namespace"] != self._namespace or run != self._run or role == "supervisor":
                continue
            with contextlib.suppress(ValueError):
                handle = ray.get_actor(each["name"], self._namespace)
                found.append(Member(role, int(incarnation), each["name"], handle))
        return found

    def _make(self, actor: Any, role: str, incarnation: int, *args: Any, **options: Any) -> Member:
        name = actor_name(self._run, role, incarnation)
        settings = {"name": name, "namespace": self._namespace, "lifetime": "detached", **options}
        return Member(role, incarnation, name, actor.options(**settings).remote(*args))
