"""`bench …`: what is measured on this machine.

Owns the group and the order of its commands; each of them says itself what it takes.
"""

from __future__ import annotations

import typer

from rollout_ft.cli.commands import bench_faults, bench_turns

app = typer.Typer(no_args_is_help=True, help="Measurements of this machine.")
app.command("overhead")(bench_turns.overhead)
app.command("session")(bench_turns.session)
app.command("store")(bench_faults.store)
app.command("storm")(bench_faults.storm)
app.command("recovery")(bench_faults.recovery)
app.command("trial")(bench_faults.trial)
