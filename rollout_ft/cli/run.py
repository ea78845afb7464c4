"""`rollout-ft run` and `rollout-ft resume`: all tasks to their outcomes, in one process or in several.

Owns the order: what can be refused is refused before anything is written, a run is named on disk before it starts, and
a trial has an outcome in the store before it has a line. So that wherever a process ends, the next one goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import orjson
from rich.console import Console

from rollout_ft import runtime
from rollout_ft.cli import report
from rollout_ft.cli.directory import Directory, create, has_run, reopen, saved_config
from rollout_ft.cli.output import Output
from rollout_ft.cli.progress import Progress
from rollout_ft.cli.serve import warn
from rollout_ft.clock import monotonic, wall
from rollout_ft.config import Config, journalled
from rollout_ft.errors import BadRequest, ConfigError
from rollout_ft.trial.attempt import factory_of
from rollout_ft.trial.board import Board
from rollout_ft.trial.commands import agent_of
from rollout_ft.trial.runner import TrialResult
from rollout_ft.trial.siblings import plays
from rollout_ft.trial.tasks import read_tasks
from rollout_ft.types import JSON, Outcome

_LOST = {Outcome.INFRA_EXHAUSTED, Outcome.ENV_FAILED}


async def run(config: Config, path: Path, console: Console) -> int:
    """Runs all tasks, or what is left of them where `path` has this run in it.

    Returns the exit code: 1 when more trials were lost than `trial.max_lost` allows, or some have no outcome yet.
    """
    if not config.trial.tasks or not (config.trial.agent or config.trial.command):
        raise ConfigError("run needs trial.tasks (a JSON-lines file), and trial.agent (module:function) or trial.command (a program)")
    path = path.absolute()
    if has_run(path):
        return await _finish(reopen(path, config), console)
    tasks = read_tasks(config.trial.tasks)
    plays(tasks, config.trial)
    agent_of(config.trial, path)
    factory_of(config.trial)
    runtime.check(config)
    return await _finish(create(path, config, tasks), console)


async def resume(path: Path, overrides: list[str] | None, console: Console) -> int:
    """Goes on with the run in `path`, wherever the processes before this one ended."""
    path = path.absolute()
    return await _finish(reopen(path, saved_config(path, overrides)), console)


async def _finish(directory: Directory, console: Console) -> int:
    for warning in directory.warnings:
        console.print(f"rollout-ft: {warning}", highlight=False, soft_wrap=True)
    config = directory.config.trial
    board, began = Board(plays(directory.tasks, config), config), monotonic()
    output = Output(directory.path, board, directory.config.telemetry.max_events_bytes)
    if output.complete():
        console.print(f"all {len(output.results)} trials have their outcome", highlight=False)
        return _code(output, directory)
    try:
        if output.owed:
            await _play(directory, output, console)
    finally:
        summary = output.summary(monotonic() - began)
        output.close()
        _report(directory.path, console)
        console.print(orjson.dumps(summary).decode(), highlight=False, soft_wrap=True)
    for lost in output.lost:
        console.print(f"{lost.trial_id} has no outcome yet: {lost.cause}", highlight=False, soft_wrap=True)
    if output.lost:
        console.print(f"go on with: rollout-ft resume {directory.path}", highlight=False, soft_wrap=True)
    return _code(output, directory)


async def _play(directory: Directory, output: Output, console: Console) -> None:
    """Says at once when it was asked to stop: who asked may be short of patience with what has to be ended."""
    playing = asyncio.create_task(_play_out(directory, output, console))
    try:
        await asyncio.shield(playing)
    except asyncio.CancelledError:
        journal = journalled(directory.effective)
        on = f"go on with: rollout-ft resume {directory.path}" if journal else "without a journal it cannot go on"
        console.print(f"stopped; {on}", highlight=False, soft_wrap=True)
        playing.cancel()
        await asyncio.wait({playing})
        raise


async def _play_out(directory: Directory, output: Output, console: Console) -> None:
    config, resumed, earlier = directory.effective, directory.resumed, list(output.results.values())
    agent = agent_of(config.trial, directory.path)
    try:
        if resumed:
            output.event({"time": wall(), "event": "run.resumed", "source": "run", "trials": output.owed})
        last_view = output.last_view() if resumed else 0
        async with runtime.start(config, secret=directory.secret, resume=resumed, last_view=last_view) as started:
            output.event({"time": wall(), "event": "run.started", "source": "run", "gateway_url": started.gateway_url})
            started.on_event = output.event
            warn(started)
            link = f"status page: {started.status_url} (its key: rollout-ft status {directory.path} --link)"
            console.print(link, highlight=False, markup=False, soft_wrap=True)
            progress = Progress(output, monotonic())

            def ended(result: TrialResult, trajectory: JSON) -> None:
                output.trial(result, trajectory)
                _tell(console, progress.ended(result, monotonic()))

            sandboxes = directory.path / "sandboxes"
            telling = asyncio.create_task(_tell_while_quiet(console, progress))
            try:
                await started.run_trials(
                    directory.tasks, agent, on_result=ended, release=True, resume=resumed, earlier=earlier, sandboxes=sandboxes
                )  # fmt: skip
            finally:
                telling.cancel()
                await asyncio.wait({telling})
            with contextlib.suppress(BadRequest):  # the results are there without them
                output.counters(await started.metrics())
    finally:
        agent.close()


async def _tell_while_quiet(console: Console, progress: Progress) -> None:
    while True:
        await asyncio.sleep(progress.quiet_s(monotonic()))
        _tell(console, progress.waited(monotonic()))


def _tell(console: Console, line: str) -> None:
    if line:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _report(path: Path, console: Console) -> None:
    """What a run has is on disk by now: it does not fail for want of a page about it."""
    try:
        report.write([report.reported(path)])
    except Exception as e:
        console.print(f"{path}/report.html was not written ({e}); rollout-ft report {path} does it", highlight=False, soft_wrap=True)


def _code(output: Output, directory: Directory) -> int:
    lost = {trial_id for trial_id, result in output.results.items() if result.outcome in _LOST} - output.replaced
    return int(output.owed > 0 or len(lost) > directory.config.trial.max_lost)
