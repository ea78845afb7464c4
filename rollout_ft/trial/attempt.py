"""One attempt of a trial: its agent, its environment, its limits.

Owns what lives as long as an attempt, and the end of all of it. What an end means is for `trial.policy`. Whatever the agent
says, an attempt whose environment is gone has no result.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from pathlib import Path

from rollout_ft.clock import monotonic
from rollout_ft.config import TrialConfig
from rollout_ft.disk import remove_tree
from rollout_ft.trial.agents import Agent, raised, resolve
from rollout_ft.trial.client import Client, Session
from rollout_ft.trial.deadlines import Seen, judge, look_in_s
from rollout_ft.trial.environment import Factory
from rollout_ft.trial.policy import AttemptEnd, Blame
from rollout_ft.trial.steps import recorded_of
from rollout_ft.trial.tool_server import ToolServer
from rollout_ft.trial.tools import Rules, Tools
from rollout_ft.types import JSON

_log = logging.getLogger("rollout_ft")


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where environments come from, the directory for what of them outlives processes, and the way to them for agents in
    processes of their own."""

    factory: Factory
    directory: Path
    server: ToolServer


def factory_of(config: TrialConfig) -> Factory | None:
    """What `trial.environment` names, if anything. Raises ConfigError."""
    return resolve(config.environment, "trial.environment")[1] if config.environment else None


@contextlib.asynccontextmanager
async def workshop(config: TrialConfig, factory: Factory | None, directory: Path | None) -> AsyncGenerator[Workshop | None]:
    """The one of a run: `factory`, else what `trial.environment` names, if anything. It ends with the block; a directory that was
    not given does as well. Two runs must not be given the same: their trials may have the same names."""
    made = factory or factory_of(config)
    if made is None:
        yield None
        return
    server = ToolServer()
    with contextlib.nullcontext(directory) if directory is not None else tempfile.TemporaryDirectory(prefix="rollout-ft-") as kept:
        await server.start()
        try:
            yield Workshop(made, Path(kept), server)
        finally:
            await server.aclose()
            with contextlib.suppress(OSError):
                Path(kept).rmdir()  # unless there is something to go on from


class Attempts:
    def __init__(self, client: Client, agent: Agent, config: TrialConfig, workshop: Workshop | None = None):
        self._client, self._agent, self._config, self._workshop = client, agent, config, workshop

    async def run(self, task: JSON, session: Session, lost: int) -> tuple[AttemptEnd, Tools | None]:
        """How the attempt ended; `lost` environments were replaced before it. Nothing of it is left but snapshots."""
        if self._workshop is None:
            return await self._timely(task, session), None
        try:
            tools = await self._tools(self._workshop, task, session, lost)
        except Exception as e:  # of this task's environment, whose factory may be anybody's
            _log.warning("trial %s: its environment cannot be made", session.trial_id, exc_info=True)
            ended = raised(e)
            return (replace(ended, blame=Blame.ENVIRONMENT) if ended.blame is Blame.AGENT else ended), None
        try:
            with self._workshop.server.serving(session.api_key, tools) as url:
                ended = await self._timely(task, replace(session, environment=tools, environment_url=url))
        finally:
            await asyncio.shield(asyncio.ensure_future(tools.close()))
        return tools.failed or ended, tools

    async def over(self, trial_id: str, tools: Tools | None) -> None:
        """The trial is over: nothing is left of its environments."""
        if tools is not None:
            await tools.forget()
        if self._workshop is not None:
            try:
                await asyncio.to_thread(remove_tree, self._workshop.directory / trial_id)
            except OSError as e:
                _log.warning("trial %s: something of its environments is left: %s", trial_id, e)

    async def _tools(self, workshop: Workshop, task: JSON, session: Session, lost: int) -> Tools:
        config, directory = self._config, workshop.directory / session.trial_id
        recorded = [recorded_of(step) for step in (await session.checkpoint())["steps"]] if session.attempt > 1 else []
        rules = Rules(config.record_tools, config.snapshot_every_steps, config.tool_timeout_s, config.max_env_restarts)
        return Tools(workshop.factory, task, session.trial_id, directory, rules, session, recorded, lost)

    async def _timely(self, task: JSON, session: Session) -> AttemptEnd:
        """The agent's end, or that of its time. Who is asked how it goes may be slow: the agent's end is not waited with for that."""
        agent, looking = asyncio.ensure_future(self._agent.run(task, session)), asyncio.create_task(self._late(session))
        try:
            await asyncio.wait({agent, looking}, return_when=asyncio.FIRST_COMPLETED)
            return agent.result() if agent.done() else looking.result()
        finally:
            agent.cancel()
            looking.cancel()
            await asyncio.wait({agent, looking})

    async def _late(self, session: Session) -> AttemptEnd:
        """Returns when a limit has passed, with the end that this is."""
        began, still_s, seen = monotonic(), await self._client.still_s(), Seen(0.0)
        while True:
            await asyncio.sleep(look_in_s(seen, self._config))
            activity: JSON = (await self._client.trial(session.trial_id)).get("activity") or {}
            still = await self._client.still_s() - still_s
            tools = session.environment
            if tools is not None and "quiet_s" in activity:
                activity["quiet_s"] = min(activity["quiet_s"], tools.quiet_s)
            seen = Seen(monotonic() - began, still, tool=tools is not None and tools.busy, **activity)
            late = judge(seen, self._config)
            if late is not None:
                return late
