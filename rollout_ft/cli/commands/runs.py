"""`serve`, `run`, `resume` and `doctor`: what needs the cluster.

Owns their options and exit codes. What they start is gone when they return, whichever way they end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console

from rollout_ft.cli import foreground
from rollout_ft.cli.options import AsJson, ConfigFile, Overrides


def serve(
    config: ConfigFile = None,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="directory for events and a line a trial, which `status`, `report` read")] = None,
) -> None:
    """Start a run and serve it until SIGINT or SIGTERM; prints one JSON line when ready."""
    from rollout_ft.cli.serve import serve as command
    from rollout_ft.config import load

    foreground.run(command(load(config, overrides), output))


def run(
    output: Annotated[Path, typer.Option(help="directory for results")],
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Run all tasks of the config to their outcomes; where the directory has this run in it, what is left of them."""
    from rollout_ft.cli.run import run as command
    from rollout_ft.config import load

    raise typer.Exit(foreground.result(command(load(config, overrides), output, Console(stderr=True))))


def resume(
    directory: Annotated[Path, typer.Argument(help="what `run` wrote to")],
    overrides: Overrides = None,
) -> None:
    """Go on with a run, wherever the process before this one ended."""
    from rollout_ft.cli.run import resume as command

    raise typer.Exit(foreground.result(command(directory, overrides, Console(stderr=True))))


def doctor(
    config: ConfigFile = None,
    overrides: Overrides = None,
    tokens_per_s: Annotated[float, typer.Option(min=0, help="of one generation, to check the clients' patience; 0: unknown")] = 0,
    json: AsJson = False,
) -> None:
    """Whether the cluster is set up for what is promised on it, and what to set. Exits with 1 when there is a problem."""
    from rollout_ft.cli.doctor.command import code, examine, show
    from rollout_ft.config import load

    found = examine(load(config, overrides), tokens_per_s)
    if json:
        print(orjson.dumps(found).decode())
    else:
        show(found, Console())
    raise typer.Exit(code(found))
