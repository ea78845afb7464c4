"""`demo` and `demo-sglang`: the faults and their cure, shown without a setup.

Owns their options and exit codes. Exits with 1 when what was promised was not shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console

from rollout_ft.cli import foreground
from rollout_ft.cli.options import AsJson


def demo(
    seed: Annotated[int, typer.Option(help="plans the faults")] = 7,
    trials: Annotated[int, typer.Option(min=8, max=48)] = 48,
    tasks: Annotated[Path | None, typer.Option(help="task file (default: the shipped quickstart)")] = None,
    events: Annotated[Path | None, typer.Option(help="write every event to this file")] = None,
    json: AsJson = False,
) -> None:
    """Trials under planned faults, by three policies, compared with a run without faults."""
    from rollout_ft.cli import demo as command
    from rollout_ft.trial.tasks import quickstart, read_tasks

    chosen = read_tasks(tasks or quickstart())[:trials]
    console = Console(stderr=json)
    console.print(f"{len(chosen)} trials, seed {seed}: rollout-ft demo --seed {seed} --trials {trials}")
    result = foreground.result(command.demo(chosen, seed, console, events), json)
    if json:
        print(orjson.dumps(result).decode())
    raise typer.Exit(1 if command.failed(result) else 0)


def demo_sglang(
    python: Annotated[Path, typer.Option(exists=True, help="the Python of an environment that has SGLang")],
    model: Annotated[Path, typer.Option(exists=True, help="model folder; `make demo-sglang` writes one of SmolLM2")],
    engines: Annotated[int, typer.Option(min=2, max=3)] = 2,
    json: AsJson = False,
) -> None:
    """Six trials on real SGLang engines on a CPU; one engine is killed in mid-generation."""
    from rollout_ft.cli import demo_sglang as command

    result = foreground.result(command.demo(python, model, engines, Console(stderr=json)), json)
    if json:
        print(orjson.dumps(result).decode())
    raise typer.Exit(1 if command.failed(result) else 0)
