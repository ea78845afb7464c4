"""`rollout-ft run`: all tasks to their outcomes, and the files that say so.

Owns the output directory. A line of `trials.jsonl` is written when its trial has ended, whole, so that a run that is
stopped leaves what it finished.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import orjson
from rich.console import Console

from rollout_ft import runtime
from rollout_ft.clock import monotonic
from rollout_ft.config import Config
from rollout_ft.errors import ConfigError
from rollout_ft.samples.export import write_trajectory
from rollout_ft.telemetry.lines import Lines
from rollout_ft.telemetry.report import report
from rollout_ft.trial.agents import ProcessAgent
from rollout_ft.trial.runner import TrialResult
from rollout_ft.trial.tasks import read_tasks
from rollout_ft.types import JSON, Outcome

_LOST = {Outcome.INFRA_EXHAUSTED, Outcome.ENV_FAILED}


class Output:
    """`DIR/trials.jsonl`, `DIR/events.jsonl`, `DIR/trajectories/`, `DIR/summary.json`, `DIR/report.html`."""

    def __init__(self, directory: Path):
        if (directory / "trials.jsonl").exists():
            raise ConfigError(f"--output: {directory} has a run in it already; choose an empty directory")
        (directory / "trajectories").mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._trials = Lines(directory / "trials.jsonl")
        self._events = Lines(directory / "events.jsonl")
        self.results: list[TrialResult] = []

    def trial(self, result: TrialResult, trajectory: JSON) -> None:
        write_trajectory(self._directory / "trajectories" / f"{result.trial_id}.safetensors", trajectory, result.reward)
        self._trials.append(result.line())
        self._trials.sync()  # the stores forget the trial when this returns
        self.results.append(result)

    def event(self, event: JSON) -> None:
        self._events.append(event)

    def summary(self, seconds: float) -> JSON:
        """Writes and returns the totals of all trials."""
        results = self.results
        made: JSON = {
            "trials": len(results), "outcomes": dict(Counter(r.outcome for r in results)),
            "attempts": sum(r.attempts for r in results), "turns": sum(r.turns for r in results),
            "tokens_generated": sum(r.tokens_generated for r in results), "tokens_reused": sum(r.tokens_reused for r in results),
            "tokens_wasted": sum(r.tokens_wasted for r in results), "seconds": round(seconds, 1),
        }  # fmt: skip
        (self._directory / "summary.json").write_bytes(orjson.dumps(made, option=orjson.OPT_INDENT_2))
        (self._directory / "report.html").write_text(report(made, results))
        return made

    def close(self) -> None:
        self._trials.close()
        self._events.close()


async def run(config: Config, directory: Path, console: Console) -> int:
    """Returns the exit code: 1 when more trials were lost than `trial.max_lost` allows."""
    if not config.trial.tasks or not config.trial.agent:
        raise ConfigError("run needs trial.tasks (a JSON-lines file) and trial.agent (module:function)")
    tasks = read_tasks(config.trial.tasks)
    agent = ProcessAgent(config.trial.agent)
    output = Output(directory)
    began = monotonic()
    try:
        async with runtime.start(config) as started:
            started.on_event = output.event
            await started.run_trials(tasks, agent, on_result=output.trial, release=True)
    finally:
        agent.close()
        summary = output.summary(monotonic() - began)
        output.close()
        console.print(orjson.dumps(summary).decode(), highlight=False, soft_wrap=True)
    return int(sum(r.outcome in _LOST for r in output.results) > config.trial.max_lost)
