"""`trial list`, `show` and `export`: the trials of a directory that `run` wrote to; `restart`: one of a run that goes on.

Owns their options and exit codes. They need no cluster, and leave the directory as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console

from rollout_ft.cli import foreground
from rollout_ft.cli.options import AsJson, GatewayUrl, OperatorKeyFile, RunDirectory

app = typer.Typer(
    no_args_is_help=True, help="The trials of a run: of the directory that `run` wrote to, with no cluster, or of its gateway."
)


@app.command("list")
def trial_list(directory: RunDirectory, json: AsJson = False) -> None:
    """Every trial: its state, outcome, reward, attempts, turns and cause. Exits with 1 when something cannot be read."""
    from rollout_ft.cli.trials import Past, table

    listed = Past(directory).listed()
    damaged = [f"{row['trial_id']}: {row['cause']}" for row in listed["trials"] if row["state"] == "damaged"]
    if json:
        print(orjson.dumps(listed).decode())
    else:
        console = Console()
        for line in table(listed["trials"], console.width if console.is_terminal else None):
            print(line)
        for why in (*listed["unreadable"], *damaged):
            Console(stderr=True).print(why, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1 if damaged or listed["unreadable"] else 0)


@app.command("show")
def trial_show(directory: RunDirectory, trial_id: Annotated[str, typer.Argument()], json: AsJson = False) -> None:
    """What was said in a trial, turn by turn, and where each reply came from."""
    from rollout_ft.cli.trials import Past, lines

    shown = Past(directory).shown(trial_id)
    print(orjson.dumps(shown).decode() if json else "\n".join(lines(shown)))
    raise typer.Exit(1 if shown["state"] == "damaged" else 0)


@app.command("export")
def trial_export(
    directory: RunDirectory,
    trial_ids: Annotated[list[str] | None, typer.Argument(help="default: all that have an outcome")] = None,
    *,
    output: Annotated[Path, typer.Option(help="directory for the trajectories")],
    unfinished: Annotated[bool, typer.Option("--unfinished", help="also trials without an outcome, as far as they came")] = False,
    parquet: Annotated[bool, typer.Option("--parquet", help="and all of them as one samples.parquet, a row a path")] = False,
    json: AsJson = False,
) -> None:
    """Write trajectories as `run` does, one safetensors file a trial. Exits with 1 when one that was named was not written."""
    from rollout_ft.cli.trials import Past

    past = Past(directory)
    done = past.export(output, trial_ids or [], unfinished=unfinished)
    if parquet:
        done |= past.samples(output, done["exported"])
    if json:
        print(orjson.dumps(done).decode())
    else:
        for trial_id, why in done["skipped"].items():
            Console(stderr=True).print(f"{trial_id}: {why}", highlight=False, markup=False, soft_wrap=True)
        rows = f", {done['samples']} samples in samples.parquet" if parquet else ""
        rows += f"; {len(done['left_out'])} trials do not count in their groups, and are not among them" if done.get("left_out") else ""
        print(f"{len(done['exported'])} exported to {output}{rows}")
    raise typer.Exit(1 if trial_ids and done["skipped"] else 0)


@app.command("restart")
def trial_restart(
    which: Annotated[list[str], typer.Argument(metavar="[DIRECTORY] TRIAL_ID", help="without a directory the options say where")],
    scratch: Annotated[bool, typer.Option("--scratch", help="begin from nothing, not from the checkpoint")] = False,
    from_attempt: Annotated[int | None, typer.Option(min=1, help="only if it is at this attempt", show_default="the present one")] = None,
    cause: Annotated[str, typer.Option(help="why, for those who read the trial's timeline")] = "",
    gateway_url: GatewayUrl = "", operator_key_file: OperatorKeyFile = None, json: AsJson = False,
) -> None:  # fmt: skip
    """Begin a trial's next attempt, though its agent goes on: the old attempt's next request is refused. Asked twice with the same
    --from-attempt it happens once."""
    from rollout_ft.cli.restart import restart
    from rollout_ft.cli.status import where

    if len(which) > 2:
        raise typer.BadParameter("one directory at most, and one trial", param_hint="[DIRECTORY] TRIAL_ID")
    *directory, trial_id = which
    there = where(Path(directory[0]) if directory else None, gateway_url, operator_key_file)
    made = foreground.result(restart(there, trial_id, from_attempt, scratch=scratch, cause=cause))
    behind = f"behind {made['turns']} turns" if made["turns"] else "from nothing"
    print(orjson.dumps(made).decode() if json else f"{trial_id} is at attempt {made['attempt']}, which begins {behind}")
