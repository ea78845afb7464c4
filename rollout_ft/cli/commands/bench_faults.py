"""`bench store`, `storm`, `recovery` and `trial`: what is kept, what faults cost, and how soon it goes on.

Owns their options. Ray tells on stdout of what was killed, and with `--json` that is no place for it.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console

from rollout_ft.cli import foreground
from rollout_ft.cli.options import AsJson, TokensIn, TokensOut
from rollout_ft.types import JSON


def store(
    seconds: Annotated[float, typer.Option(min=0.1, help="of each load")] = 2,
    sessions: Annotated[str, typer.Option(help="loads of so many sessions at once")] = "1,32,256",
    resumed: Annotated[int, typer.Option(min=1, help="sessions that are written and had back")] = 1000,
    tokens: Annotated[int, typer.Option(min=2000, help="of each of them")] = 32_768,
    journal_dir: Annotated[Path | None, typer.Option(help="where journals are written (default: the temporary directory)")] = None,
    recoveries: Annotated[int, typer.Option(min=0, help="times that an engine's actor and nodes are lost on a cluster of four nodes")] = 1,
    json: AsJson = False,
) -> None:
    """Commits into the checkpoint store, against a plain dictionary actor and full snapshots; what is kept; how long it
    takes to have sessions back, and to go on when an actor or a node is lost."""
    from rollout_ft.cli.bench.recovery import recovery, table
    from rollout_ft.cli.bench.store import Scale, bench

    if not all(each.isdigit() and int(each) for each in sessions.split(",")):
        raise typer.BadParameter("write numbers, as 1,32,256", param_hint="--sessions")
    scale = Scale(seconds, tuple(map(int, sessions.split(","))), resumed, tokens, journal_dir)
    console = Console(stderr=json)
    figures = foreground.result(bench(scale, console), json)
    if recoveries:
        with contextlib.redirect_stdout(sys.stderr):  # Ray tells of what was killed
            lost: JSON = foreground.result(recovery(recoveries), json)
        console.print(table(lost))
        figures |= lost
    if json:
        print(orjson.dumps(figures).decode())


def storm(
    trials: Annotated[int, typer.Option(min=8)] = 500,
    engines: Annotated[int, typer.Option(min=2)] = 33,
    scale: Annotated[float, typer.Option(min=1, help="how much faster than in the field time goes")] = 40,
    seed: Annotated[int, typer.Option(help="makes the load and plans the faults")] = 7,
    json: AsJson = False,
) -> None:
    """Replies that a router loses, engines that are killed and that hang, under each policy, against a run without faults; then
    load up to five times what the engines can run."""
    import uvloop

    from rollout_ft.cli.bench import storm, sweep

    console, wanted = Console(stderr=json), storm.Scale(trials, engines, scale=scale, seed=seed)

    async def both() -> JSON:
        return {**await storm.bench(wanted, console), "load": await sweep.sweep(wanted, console)}

    figures = foreground.result(both(), json, uvloop.new_event_loop)
    if json:
        print(orjson.dumps(figures).decode())


def recovery(
    runs: Annotated[int, typer.Option(min=1, help="of each fault")] = 10,
    seed: Annotated[int, typer.Option(help="plans the faults")] = 7,
    json: AsJson = False,
) -> None:
    """How soon a lost engine, actor or node is seen, and its sessions have their next token, on a cluster of four nodes."""
    from rollout_ft.cli.bench.recovery import bench, faults_table

    console = Console(stderr=json)

    def show(siege: Any) -> None:
        tokens = max(siege.next_token_s, default=0.0)
        console.print(f"{siege.blow.value}: seen after {siege.detect_s or 0:.2f} s, next tokens within {tokens:.2f} s", highlight=False)

    with contextlib.redirect_stdout(sys.stderr):  # Ray tells of what was killed
        figures: JSON = foreground.result(bench(runs, seed=seed, show=show), json)
    if json:
        print(orjson.dumps(figures).decode())
    else:
        console.print(faults_table(figures))


def trial(
    turns: Annotated[str, typer.Option(help="of the trials")] = "10,50,200",
    runs: Annotated[int, typer.Option(min=1, help="of each; medians are shown")] = 3,
    tokens_in: TokensIn = 100, tokens_out: TokensOut = 60,
    tokens_per_s: Annotated[float, typer.Option(min=0, help="of the engine; 0: as fast as it can")] = 500,
    json: AsJson = False,
) -> None:  # fmt: skip
    """Seconds and tokens of a restart by replay, and from scratch: a trial is killed before its last turn, and comes back there."""
    from rollout_ft.cli.bench import trial

    if not all(each.isdigit() and int(each) > 1 for each in turns.split(",")):
        raise typer.BadParameter("write numbers above 1, as 10,50,200", param_hint="--turns")
    scale = trial.Scale(tuple(map(int, turns.split(","))), runs, tokens_in, tokens_out, tokens_per_s)
    figures = foreground.result(trial.bench(scale, Console(stderr=json)), json)
    if json:
        print(orjson.dumps(figures).decode())
