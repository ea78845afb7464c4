"""`bench overhead` and `session`: what a turn costs.

Owns their options. Both are one measurement of different lengths.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer
from rich.console import Console

from rollout_ft.cli import foreground
from rollout_ft.cli.options import AsJson, TokensIn, TokensOut

if TYPE_CHECKING:
    from rollout_ft.cli.bench.command import Scale

Sessions = Annotated[int, typer.Option(min=1, help="how many at once")]
Turns = Annotated[int, typer.Option(min=1, help="of each session")]
ProfileDir = Annotated[Path | None, typer.Option(help="run py-spy on all our processes under load, and write their stacks there")]


def overhead(
    sessions: Sessions = 64, turns: Turns = 50, tokens_in: TokensIn = 650, tokens_out: TokensOut = 300,
    rounds: Annotated[int, typer.Option(min=0, help="runs with telemetry and without it, side by side; 0: none")] = 12,
    profile: ProfileDir = None, json: AsJson = False,
) -> None:  # fmt: skip
    """Latency, CPU and memory that a turn costs over talking to the engine directly, and what telemetry has of that."""
    from rollout_ft.cli.bench.command import Scale
    from rollout_ft.cli.bench.phases import Sizes

    _bench(Scale(Sizes(sessions, turns, tokens_in, tokens_out), rounds=rounds), profile, json)


def session(
    sessions: Sessions = 64, turns: Turns = 50, tokens_in: TokensIn = 650, tokens_out: TokensOut = 300,
    wide: Annotated[int, typer.Option(min=0, help="sessions that grow to 128k tokens; 0: none")] = 8,
    long: Annotated[int, typer.Option(min=0, help="tokens of the one long session; 0: none")] = 1_000_000,
    paced: Annotated[float, typer.Option(min=0, help="tokens/s of engines whose tokens come one by one; 0: none")] = 150,
    profile: ProfileDir = None, json: AsJson = False,
) -> None:  # fmt: skip
    """What `overhead` measures, and how it grows: to 128k and 1M tokens, with tokens that come one by one, while a
    trajectory is collected."""
    from rollout_ft.cli.bench.command import Scale
    from rollout_ft.cli.bench.phases import Sizes

    _bench(Scale(Sizes(sessions, turns, tokens_in, tokens_out), wide, long, paced), profile, json)


def _bench(scale: Scale, profile: Path | None, json: bool) -> None:
    from rollout_ft.cli.bench.command import bench

    figures = foreground.result(bench(scale, Console(stderr=json), profile), json)
    if json:
        print(orjson.dumps(figures).decode())
