"""A run, from Python: started, used, ended.

Owns the life of the supervisor and the lease that keeps the run alive. What it starts it ends, in whatever way the
block is left; a process that is killed leaves a run that ends itself after `orphan_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

from rollout_ft import config as configs
from rollout_ft import rayjob
from rollout_ft.clock import monotonic, wall
from rollout_ft.cluster import Cluster, connect, restore_signals
from rollout_ft.config import Config, TrialConfig
from rollout_ft.engine import installed
from rollout_ft.engine.experts import shape_of
from rollout_ft.engine.parsers import check_names
from rollout_ft.errors import BadRequest, ConfigError
from rollout_ft.fleet import predecessor
from rollout_ft.fleet.crew import Setup
from rollout_ft.fleet.member import Member
from rollout_ft.fleet.node import node_id
from rollout_ft.gateway.dialects.sampling import check_sampling
from rollout_ft.gateway.keys import Keys
from rollout_ft.session import normalizers
from rollout_ft.session.drift import load_renderer
from rollout_ft.session.matcher import load as load_matcher
from rollout_ft.telemetry.account import MISSED
from rollout_ft.telemetry.feed import News
from rollout_ft.telemetry.tracing import wanted
from rollout_ft.trial.agents import Agent, InlineAgent
from rollout_ft.trial.attempt import workshop
from rollout_ft.trial.client import Client, Session
from rollout_ft.trial.environment import Factory
from rollout_ft.trial.runner import OnGroup, OnResult, TrialResult, TrialRunner
from rollout_ft.types import JSON

_log = logging.getLogger("rollout_ft")


class Run:
    """A run that is up. `client` speaks to its gateway with the operator's key."""

    def __init__(
        self, config: Config, setup: Setup, cluster: Cluster, supervisor: Member, gateway_url: str, warnings: tuple[str, ...] = ()
    ):
        self.config, self.setup, self.gateway_url, self.warnings = config, setup, gateway_url, warnings
        self.ray_address = cluster.address
        self.operator_key = Keys(setup.secret).operator
        self.supervisor = supervisor
        self.client = Client(gateway_url, self.operator_key, verify=not config.gateway.tls_cert)
        self.on_event: Callable[[JSON], object] = lambda event: None
        self._cursor = ""

    @property
    def status_url(self) -> str:
        """The page that shows the run; it asks for the operator's key."""
        return rayjob.page(self.gateway_url)

    async def open_session(self, **request: Any) -> Session:
        """`POST /sessions`: see DESIGN section 6 for the fields."""
        return await self.client.open_session(**request)

    async def run_trials(
        self, tasks: Sequence[JSON], agent: Agent | Callable[..., Any], *, concurrency: int | None = None, prefix: str = "",
        config: TrialConfig | None = None, on_result: OnResult | None = None, release: bool = False, resume: bool = False,
        on_group: OnGroup | None = None, earlier: Sequence[TrialResult] = (),
        environment: Factory | None = None, sandboxes: Path | None = None,
    ) -> list[TrialResult]:  # fmt: skip
        """Runs every task to its outcome, restarting what faults ended; results in the order of the tasks.

        With `trial.group_size`, or tasks that name a `group_id`, `on_group` is told what became of each group. The trial that
        was played in the place of a lost one follows it in the results.

        With `release` the run forgets each trial, but for its summary, once `on_result` has put it where it is safe.
        With `resume` trials that exist are gone on with: see `rollout_ft.start`; what an earlier process has the results of,
        in the order in which they came, is `earlier`.
        `agent` is an async function of (task, session) that returns the reward or None, or one of `trial.agents`.
        `environment` makes what `session.environment` acts on, in place of `trial.environment`, and keeps in `sandboxes` what
        outlives processes.
        """
        config, keys = config or self.config.trial, Keys(self.setup.secret)
        where = Path(config.sandbox_dir) / self.config.run if config.sandbox_dir else sandboxes
        async with workshop(config, environment, where) as made:
            runner = TrialRunner(self.client, InlineAgent(agent) if callable(agent) else agent, config, keys.session, resume, made)
            slots = concurrency or config.concurrency
            return await runner.run(
                tasks, concurrency=slots, prefix=prefix, on_result=on_result, release=release, on_group=on_group, earlier=earlier
            )  # fmt: skip

    async def fleet(self) -> JSON:
        return await self.client.get("/fleet")

    async def renew(self, timeout_s: float) -> None:
        """Keeps the run alive, and hands its new events to `on_event`."""
        news: News = await self.supervisor.ask("renew", self._cursor, timeout_s=timeout_s)
        missed = [{"time": wall(), "event": MISSED, "source": "run", "count": news.missed}] if news.missed else []
        for event in [*news.events, *missed]:  # last what has no number: it would be told twice where another is refused
            self.on_event(event)
        self._cursor = news.cursor  # not before: what could not be taken is told again

    async def metrics(self) -> dict[str, float]:
        """The run's metrics as one flat object, for a tracker (`wandb.log(await run.metrics(), step=step)`); about a second old.

        `rollout_ft/NAME` is summed over all labels, `rollout_ft/NAME/VALUE` has one value of the first: `telemetry.metrics` says
        what each is. Counters are those of the run since it began, so that a step's share is a difference. Without Python they are
        `metrics` in `GET /fleet`, and with all their labels on Ray's Prometheus endpoint, as `ray_rollout_ft_NAME`.
        """
        return (await self.fleet())["metrics"]


@contextlib.asynccontextmanager
async def start(
    config: str | Path | Config | None = None, overrides: list[str] | dict[str, Any] | None = None, *,
    secret: str = "", faults: bool = False, resume: bool = False, last_view: int = 0,
) -> AsyncGenerator[Run]:  # fmt: skip
    """Joins a Ray cluster or starts one, and starts a run in it; ends the run when the block is left.

    With `resume` it goes on with a run of the same name and secret: with its actors where they still live under the
    same config, else from its journal, which must not be older than `last_view`.

    Raises ConfigError for what cannot be started, naming the key to change; DataLost where nothing is left to go on from.
    """
    loaded = config if isinstance(config, Config) else configs.load(config, overrides)
    check(loaded)
    await installed.check(loaded, here=False)
    _, untraced = wanted(loaded.telemetry.tracing, os.environ)
    if untraced and loaded.telemetry.tracing == "on":
        raise ConfigError(f"telemetry.tracing on: {untraced}")
    cluster = await asyncio.to_thread(connect, loaded.ray, job_config=rayjob.job_config(loaded))
    restore_signals()
    try:
        async with within(cluster, loaded, secret=secret, faults=faults, resume=resume, last_view=last_view) as run:
            yield run
    finally:
        await asyncio.to_thread(cluster.leave)


@contextlib.asynccontextmanager
async def within(
    cluster: Cluster, config: Config, *, secret: str = "", faults: bool = False, resume: bool = False, last_view: int = 0
) -> AsyncGenerator[Run]:
    """A run in a cluster that this process is connected to, with a config that was checked; see `start`."""
    secret, alone = secret or secrets.token_hex(32), bool(cluster.temp_dir)
    otel, untraced = wanted(config.telemetry.tracing, os.environ)
    setup = Setup(config, config.ray.namespace, secret, faults, loopback=alone, home=node_id(), last_view=last_view, otel=otel)
    supervisor = await predecessor.supervisor(setup, resume=resume)
    try:
        if faults:
            from rollout_ft.testing.faults import create_plan

            create_plan(setup)
        started = await supervisor.ask("start")
        await asyncio.to_thread(rayjob.announce, config, started["gateway_url"])
        warnings = [*started["warnings"], *([f"nothing is traced (telemetry.tracing): {untraced}"] if untraced else [])]
        run = Run(config, setup, cluster, supervisor, started["gateway_url"], tuple(warnings))
        renewing = asyncio.create_task(_renew(run))
        try:
            yield run
        finally:
            renewing.cancel()
            await run.client.aclose()
            with contextlib.suppress(Exception):  # what ended the block is the error to see
                await run.renew(timeout_s=10)
    finally:
        with contextlib.suppress(Exception):
            await supervisor.ask("stop", timeout_s=30)
        await asyncio.to_thread(supervisor.kill)


def check(config: Config) -> None:
    """Everything that can be refused before anything is started. Raises ConfigError."""
    load_renderer(config)
    load_matcher(config.session.matcher)
    normalizers.load(tuple(config.session.normalizers))
    shape_of(config)
    check_names(config.model)
    try:
        check_sampling(config.sampling.parameters, config.session.max_output_tokens)
    except BadRequest as e:
        raise ConfigError(f"sampling.parameters: {e}") from None


async def _renew(run: Run) -> None:
    """Keeps the run alive and collects its events; a supervisor that is being rebuilt is waited for."""
    pause_s, said = min(1.0, run.config.orphan_s / 10), set[tuple[object, ...]]()
    while True:
        began = monotonic()
        try:
            await run.renew(timeout_s=run.config.orphan_s / 2)
            said.clear()
        except Exception as e:  # whatever it is, the run is kept alive
            kind = (type(e), getattr(e, "errno", None))
            if kind not in said:
                _log.warning("run.not_renewed: %s: %s; it is tried again, and what it tells is kept until then", type(e).__name__, e)
            said.add(kind)
        await asyncio.sleep(max(0.05, pause_s - (monotonic() - began)))
