"""`rollout-ft`: the commands, their options, their exit codes.

Owns the list of commands and the translation of errors into one line and a code: 0 done, 1 trials failed beyond what the
config allows, 2 usage or config. The options of a command are in `cli.commands`. What it does is imported when it is called.
"""

from __future__ import annotations

import errno

import typer
from rich.console import Console

from rollout_ft.cli.commands import benches, configs, demos, runs, telling, trials
from rollout_ft.errors import BadRequest, ConfigError, RolloutFTError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="RL rollouts that survive their faults.")
app.add_typer(configs.app, name="config")
app.add_typer(trials.app, name="trial")
app.add_typer(benches.app, name="bench")
app.command()(demos.demo)
app.command("demo-sglang")(demos.demo_sglang)
app.command()(runs.serve)
app.command()(runs.run)
app.command()(runs.resume)
app.command()(runs.doctor)
app.command()(telling.report)
app.command()(telling.audit)
app.command()(telling.status)
app.command()(telling.explain)


def main() -> None:
    try:
        app()
    except ConfigError as e:
        Console(stderr=True).print(f"rollout-ft: {e}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            Console(stderr=True).print(f"rollout-ft: {e.strerror}: make room, then run it again", highlight=False)
            raise SystemExit(2) from None
        if e.filename is None:
            raise
        message = f"rollout-ft: {e.filename}: {e.strerror}; choose another path, or make this one usable"
        Console(stderr=True).print(message, highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    except (BadRequest, RolloutFTError) as e:
        Console(stderr=True).print(f"rollout-ft: {type(e).__name__}: {e}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
