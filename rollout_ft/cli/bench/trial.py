"""`rollout-ft bench trial`: what it costs to start a trial again, by replay and from scratch.

Owns the trials, their order and the names of the figures (DESIGN section 7). Every trial is killed once, before its last turn;
what counts is from there to where its next attempt is at the same place: that the end of its process is seen, another is
started, and all turns are had again. Engines are as fast as they are told to be, and tools take no time.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from rollout_ft import runtime
from rollout_ft.cli.bench.machine import machine
from rollout_ft.cli.bench.tables import of_machine, titled
from rollout_ft.cli.bench.trialagent import lives
from rollout_ft.config import Config, TrialConfig
from rollout_ft.errors import RolloutFTError
from rollout_ft.runtime import Run
from rollout_ft.trial.agents import ProcessAgent
from rollout_ft.types import JSON, Outcome, Recovery

AGENT = "rollout_ft.cli.bench.trialagent:run"
KINDS = {"replay": Recovery.RESUME, "normalized": Recovery.RESUME, "scratch": Recovery.RESTART}
"""`normalized` is a replay whose agent writes the time into every message: each is found by `session.normalizers`."""


class NotMeasured(RolloutFTError):
    """A trial did not go as it has to for its figures to mean anything."""


@dataclass(frozen=True, slots=True)
class Scale:
    turns: tuple[int, ...] = (10, 50, 200)
    runs: int = 3
    tokens_in: int = 100
    tokens_out: int = 60
    tokens_per_s: float = 500


@dataclass(frozen=True, slots=True)
class Restart:
    """One: seconds until the trial was where it had been, and the tokens that the engines sampled meanwhile."""

    seconds: float
    tokens: int


def settings(scale: Scale, directory: str) -> Config:
    longest = max(scale.turns) * (scale.tokens_in + scale.tokens_out + 20)
    return Config.model_validate(
        {
            "run": "bench", "ray": {"address": "local"},
            "model": {"context_tokens": max(131072, 2 * longest)},
            "engine": {
                "count": 1,
                "args": ["--model", "hash", "--tokens-per-s", f"{scale.tokens_per_s:g}", "--count-file", f"{directory}/{{engine}}.count"],
            },
            "sampling": {"parameters": {"max_tokens": scale.tokens_out, "ignore_eos": True}},
            "session": {"normalizers": ["timestamps"]},
        }
    )  # fmt: skip


async def bench(scale: Scale, console: Console) -> JSON:
    """Prints the table; returns `{turns: {replay_s, scratch_s, replay_tokens, scratch_tokens, …}}` and what belongs to it."""
    facts = machine()
    console.print(of_machine(facts))
    with tempfile.TemporaryDirectory(prefix="rft-trial-") as directory:
        async with runtime.start(settings(scale, directory)) as run:
            agent = ProcessAgent(AGENT)
            try:
                restarts = {turns: await _restarts(run, agent, scale, turns, Path(directory), console) for turns in scale.turns}
            finally:
                agent.close()
    made: JSON = {str(turns): figures(found) for turns, found in restarts.items()}
    console.print(table(made, scale))
    sizes = {"runs": scale.runs, "tokens_in": scale.tokens_in, "tokens_out": scale.tokens_out, "tokens_per_s": scale.tokens_per_s}
    return {**made, **sizes, "machine": facts}


async def _restarts(
    run: Run, agent: ProcessAgent, scale: Scale, turns: int, directory: Path, console: Console
) -> dict[str, list[Restart]]:  # fmt: skip
    found: dict[str, list[Restart]] = {kind: [] for kind in KINDS}
    for number in range(scale.runs):
        for kind, recovery in KINDS.items():  # in turn: whatever else the machine does meets all
            with console.status(f"{turns} turns, {kind}, {number + 1} of {scale.runs}"):
                found[kind].append(await _restart(run, agent, scale, f"{kind}-{turns}-{number}", recovery, turns, directory))
    return found


async def _restart(run: Run, agent: ProcessAgent, scale: Scale, name: str, recovery: Recovery, turns: int, directory: Path) -> Restart:
    notes = directory / f"{name}.jsonl"
    text = "word " * scale.tokens_in
    task = {"task_id": name, "turns": turns, "text": text, "clock": name.startswith("normalized"), "notes": str(notes)}
    (result,) = await run.run_trials([task], agent, config=TrialConfig(recovery=recovery, concurrency=1))
    if (result.outcome, result.attempts, result.divergences) != (Outcome.COMPLETED, 2, 0):
        raise NotMeasured(f"{name}: {result.outcome} after {result.attempts} attempts, {result.divergences} divergences: {result.cause}")
    (killed, before), (back, after) = lives(notes)
    return Restart(back - killed, after - before)


def figures(restarts: dict[str, list[Restart]]) -> JSON:
    """Medians over the runs."""
    made: JSON = {}
    for kind, found in restarts.items():
        made[f"{kind}_s"] = round(median(each.seconds for each in found), 3)
        made[f"{kind}_tokens"] = round(median(each.tokens for each in found))
    return made


def table(made: JSON, scale: Scale) -> Table:
    """`made` by the number of turns; `clock` is the replay that needs a normalizer."""
    title = f"a trial that is killed before its last turn; {scale.tokens_out} tokens a turn at {scale.tokens_per_s:g} tokens/s"
    shown = titled(title, "turns", "replay s", "clock s", "scratch s", "tokens", "clock", "scratch")
    for turns, row in made.items():
        times = (f"{row[f'{kind}_s']:,.2f}" for kind in KINDS)
        shown.add_row(turns, *times, *(f"{row[f'{kind}_tokens']:,}" for kind in KINDS))
    return shown
