"""The supervisor, as other processes reach it.

Owns the patience with a supervisor that is being restarted: it is named, keeps its name, and rebuilds itself, so that
a caller waits for it instead of failing.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from rollout_ft.checkpoint.view import View
from rollout_ft.clock import monotonic
from rollout_ft.errors import BadRequest, RolloutFTError
from rollout_ft.fleet.crew import actor_name
from rollout_ft.fleet.listing import Query
from rollout_ft.fleet.weights import Command
from rollout_ft.rayapi import ray
from rollout_ft.telemetry.metrics import Readings
from rollout_ft.types import JSON, Outcome, SessionSpec, Why

PATIENCE_S = 30.0
PAUSE_S = 0.1


class RemoteSupervisor:
    def __init__(self, run: str, namespace: str):
        self._name, self._namespace = actor_name(run, "supervisor", 1), namespace
        self._handle: Any = None

    async def ask(self, method: str, *args: Any) -> Any:
        """Calls the supervisor, waiting while it restarts. Raises what it raised, or BadRequest (503)."""
        until = monotonic() + PATIENCE_S
        while True:
            try:
                if self._handle is None:
                    self._handle = await asyncio.to_thread(ray.get_actor, self._name, self._namespace)
                return await getattr(self._handle, method).remote(*args)
            except RayTaskError as e:
                if isinstance(e.cause, RolloutFTError):
                    raise e.cause from None
                raise
            except (RayActorError, ActorUnavailableError, ValueError) as e:
                self._handle = None
                if monotonic() > until:
                    raise BadRequest("the run's supervisor does not answer; is the run still up?", 503, "no_supervisor") from e
                await asyncio.sleep(PAUSE_S)

    async def view(self) -> View:
        return await self.ask("view")

    async def locate(self, sid: str, failed: tuple[str, int] | None) -> JSON:
        return await self.ask("locate", sid, failed)

    async def suspect(self, engine_id: str, incarnation: int, reason: str) -> bool:
        return await self.ask("suspect", engine_id, incarnation, reason)

    async def may_lose(self, engine_id: str, incarnation: int, reason: str) -> bool:
        return await self.ask("may_lose", engine_id, incarnation, reason)

    async def engine_doubted(self, engine_id: str, incarnation: int, reason: str) -> None:
        await self.ask("engine_doubted", engine_id, incarnation, reason)

    async def engine_lost(self, engine_id: str, incarnation: int, reason: str, readings: Readings, events: list[JSON]) -> None:
        await self.ask("engine_lost", engine_id, incarnation, reason, readings, events)

    async def engine_observed(self, engine_id: str, incarnation: int, report: JSON) -> None:
        await self.ask("engine_observed", engine_id, incarnation, report)

    async def resize_fleet(self, count: int) -> JSON:
        return await self.ask("resize_fleet", count)

    async def attach_engines(self, urls: list[str]) -> JSON:
        return await self.ask("attach_engines", urls)

    async def drain_engine(self, engine_id: str) -> JSON:
        return await self.ask("drain_engine", engine_id)

    async def open_session(self, spec: SessionSpec, resume: bool) -> JSON:
        return await self.ask("open_session", spec, resume)

    async def restart_trial(self, trial_id: str, from_attempt: int, resume: bool, why: Why) -> JSON:
        return await self.ask("restart_trial", trial_id, from_attempt, resume, why)

    async def end_trial(self, trial_id: str, attempt: int | None, outcome: Outcome, reward: float | None, cause: str) -> JSON:
        return await self.ask("end_trial", trial_id, attempt, outcome, reward, cause)

    async def release_trial(self, trial_id: str) -> JSON:
        return await self.ask("release_trial", trial_id)

    async def trial(self, trial_id: str) -> JSON:
        return await self.ask("trial", trial_id)

    async def trials(self, query: Query) -> JSON:
        return await self.ask("trials", query)

    async def timeline(self, trial_id: str) -> JSON:
        return await self.ask("timeline", trial_id)

    async def overview(self, query: Query, since: str, events: int, turns: int) -> bytes:
        return await self.ask("overview", query, since, events, turns)

    async def events(self, since: str, limit: int) -> JSON:
        return await self.ask("events", since, limit)

    async def fleet(self) -> JSON:
        return await self.ask("fleet")

    async def command(self, command: Command) -> JSON:
        return await self.ask("command", command)

    async def read_session(self, sid: str, what: str) -> bytes:
        return await self.ask("read_session", sid, what)
