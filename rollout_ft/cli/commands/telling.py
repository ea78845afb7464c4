"""`report`, `audit`, `status` and `explain`: what is known of a run, told to people and to scripts.

Owns their options and exit codes. They read: nothing that they do changes a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console

from rollout_ft.cli import foreground
from rollout_ft.cli.options import AsJson, GatewayUrl, OperatorKeyFile


def report(
    directories: Annotated[list[Path], typer.Argument(help="directories that `run` wrote to; the others are compared with the first")],
    output: Annotated[Path | None, typer.Option(help="where the page is written")] = None,
    json: AsJson = False,
) -> None:
    """What became of a run, on one page (report.html, or compared.html of several) and in tables: trials and faults over time,
    recoveries, tokens, the worst trials, and how trials that met faults differ. With --json a page is written where --output says."""
    from rollout_ft.cli import report as command

    runs = command.read(directories)
    found = command.figures(runs)
    if json:
        print(orjson.dumps(found).decode())
    else:
        for table in command.tables(found):
            Console().print(table)
    if output or not json:
        Console(stderr=True).print(f"written: {command.write(runs, output)}", highlight=False, markup=False, soft_wrap=True)


def audit(
    directory: Annotated[Path, typer.Argument(help="what `run` wrote to")],
    json: AsJson = False,
) -> None:
    """Whether a run's events alone, its trials' lines, its summary and its counters agree to the token. Exit code 1 when they do not."""
    from rollout_ft.cli.audit import audited, shown

    made = audited(directory)
    if json:
        print(orjson.dumps(made.line()).decode())
    else:
        for part in shown(made):
            Console().print(part, highlight=False, soft_wrap=isinstance(part, str), markup=not isinstance(part, str))
    raise typer.Exit(1 if made.wrong else 0)


def status(
    directory: Annotated[Path | None, typer.Argument(help="what `run` writes to: says where its gateway is, and has the key")] = None,
    gateway_url: GatewayUrl = "", operator_key_file: OperatorKeyFile = None,
    watch: Annotated[
        float | None,
        typer.Option(min=0, help="look again every so many seconds, until it is stopped; 0: once", show_default="2 on a terminal, else 0"),
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="print only the status page's address, with the key in its fragment")] = False,
    json: AsJson = False,
) -> None:  # fmt: skip
    """What a run that goes on does just now: what is wrong and what to do, trials, turns, tokens, engines, recoveries."""
    from rollout_ft.cli import status as command

    where = command.where(directory, gateway_url, operator_key_file)
    if link:
        return print(f"{where.url}/status#key={where.key}")
    console = Console()
    every_s = watch if watch is not None else command.EVERY_S if console.is_terminal and not json else 0
    foreground.run(command.follow(where, every_s, json, console))


def explain(
    code: Annotated[str, typer.Argument(help="an error's code, an outcome, an engine's state or why it was lost, a wait, an event")] = "",
    json: AsJson = False,
) -> None:
    """What a code means, what usually causes it, and what to do; without one, all of them."""
    from rollout_ft.cli.explain import said_of

    print(said_of(code, json))
