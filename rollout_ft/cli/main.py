"""`rollout-ft`: the commands, their options, their exit codes.

Owns the parsing of the command line and the translation of errors into one line and a code: 0 done, 1 trials failed
beyond what the config allows, 2 usage or config. What a command does is imported when it is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer
from rich.console import Console

from rollout_ft.errors import BadRequest, ConfigError, RolloutFTError
from rollout_ft.types import JSON

if TYPE_CHECKING:
    from rollout_ft.cli.bench.command import Scale

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="RL rollouts that survive their faults.")
config_app = typer.Typer(no_args_is_help=True, help="The config: what it is, what it may be.")
app.add_typer(config_app, name="config")
trial_app = typer.Typer(no_args_is_help=True, help="The trials of a directory that `run` wrote to, with no cluster.")
app.add_typer(trial_app, name="trial")
bench_app = typer.Typer(no_args_is_help=True, help="Measurements of this machine.")
app.add_typer(bench_app, name="bench")

ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.path=value …", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


@app.command()
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
    result = _run(command.demo(chosen, seed, console, events), json)
    if result is None:
        raise typer.Exit(1)
    if json:
        print(orjson.dumps(result).decode())
    raise typer.Exit(1 if command.failed(result) else 0)


@app.command("demo-sglang")
def demo_sglang(
    python: Annotated[Path, typer.Option(exists=True, help="the Python of an environment that has SGLang")],
    model: Annotated[Path, typer.Option(exists=True, help="model folder; `make demo-sglang` writes one of SmolLM2")],
    engines: Annotated[int, typer.Option(min=2, max=3)] = 2,
    json: AsJson = False,
) -> None:
    """Six trials on real SGLang engines on a CPU; one engine is killed in mid-generation."""
    from rollout_ft.cli import demo_sglang as command

    result = _run(command.demo(python, model, engines, Console(stderr=json)), json)
    if result is None:
        raise typer.Exit(1)
    if json:
        print(orjson.dumps(result).decode())
    raise typer.Exit(1 if command.failed(result) else 0)


@app.command()
def serve(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Start a run and serve it until SIGINT or SIGTERM; prints one JSON line when ready."""
    from rollout_ft.cli.serve import serve as command
    from rollout_ft.config import load

    _run(command(load(config, overrides)))


@app.command()
def run(
    output: Annotated[Path, typer.Option(help="directory for results")],
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Run all tasks of the config to their outcomes; where the directory has this run in it, what is left of them."""
    from rollout_ft.cli.run import run as command
    from rollout_ft.config import load

    code = _run(command(load(config, overrides), output, Console(stderr=True)))
    raise typer.Exit(1 if code is None else code)


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(help="what `run` wrote to")],
    overrides: Overrides = None,
) -> None:
    """Go on with a run, wherever the process before this one ended."""
    from rollout_ft.cli.run import resume as command

    code = _run(command(directory, overrides, Console(stderr=True)))
    raise typer.Exit(1 if code is None else code)


@app.command()
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


RunDirectory = Annotated[Path, typer.Argument(help="what `run` wrote to")]


@trial_app.command("list")
def trial_list(directory: RunDirectory, json: AsJson = False) -> None:
    """Every trial: its state, outcome, reward, attempts and turns. Exits with 1 when something cannot be read."""
    from rich.table import Table

    from rollout_ft.cli.trials import COLUMNS, Past

    listed = Past(directory).listed()
    damaged = [f"{row['trial_id']}: {row['cause']}" for row in listed["trials"] if row["state"] == "damaged"]
    if json:
        print(orjson.dumps(listed).decode())
    else:
        table = Table(*COLUMNS, box=None)
        for row in listed["trials"]:
            table.add_row(*("" if row[name] is None else str(row[name]) for name in COLUMNS))
        Console().print(table)
        for why in (*listed["unreadable"], *damaged):
            Console(stderr=True).print(why, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1 if damaged or listed["unreadable"] else 0)


@trial_app.command("show")
def trial_show(directory: RunDirectory, trial_id: Annotated[str, typer.Argument()], json: AsJson = False) -> None:
    """What was said in a trial, turn by turn, and where each reply came from."""
    from rollout_ft.cli.trials import Past, lines

    shown = Past(directory).shown(trial_id)
    print(orjson.dumps(shown).decode() if json else "\n".join(lines(shown)))
    raise typer.Exit(1 if shown["state"] == "damaged" else 0)


@trial_app.command("export")
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


@app.command()
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


@app.command("audit")
def audit_command(
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


@app.command()
def status(
    directory: Annotated[Path | None, typer.Argument(help="what `run` writes to: says where its gateway is, and has the key")] = None,
    gateway_url: Annotated[str, typer.Option(help="what `serve` printed (else ROLLOUT_FT_GATEWAY_URL)")] = "",
    operator_key_file: Annotated[Path | None, typer.Option(help="has the operator's key (else ROLLOUT_FT_OPERATOR_KEY)")] = None,
    watch: Annotated[
        float | None,
        typer.Option(min=0, help="look again every so many seconds, until it is stopped; 0: once", show_default="2 on a terminal, else 0"),
    ] = None,
    link: Annotated[bool, typer.Option("--link", help="print only the status page's address, with the key in its fragment")] = False,
    json: AsJson = False,
) -> None:
    """What a run that goes on does just now: what is wrong and what to do, trials, turns, tokens, engines, recoveries."""
    from rollout_ft.cli import status as command

    where = command.where(directory, gateway_url, operator_key_file)
    if link:
        return print(f"{where.url}/status#key={where.key}")
    console = Console()
    every_s = watch if watch is not None else command.EVERY_S if console.is_terminal and not json else 0
    _run(command.follow(where, every_s, json, console))


@app.command()
def explain(
    code: Annotated[str, typer.Argument(help="an error's code, an outcome, an engine's state, or the reason why it was lost")] = "",
    json: AsJson = False,
) -> None:
    """What a code means, what usually causes it, and what to do; without one, all of them."""
    from rollout_ft.cli.explain import said_of

    print(said_of(code, json))


@config_app.command("show")
def config_show(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """The whole config, with what the file and the overrides set."""
    from rollout_ft.config import load

    print(orjson.dumps(load(config, overrides).model_dump(mode="json"), option=orjson.OPT_INDENT_2).decode())


@config_app.command("schema")
def config_schema() -> None:
    """The JSON schema of the config."""
    from rollout_ft.config import Config

    print(orjson.dumps(Config.model_json_schema(), option=orjson.OPT_INDENT_2).decode())


@config_app.command("template")
def config_template(config: ConfigFile = None, overrides: Overrides = None, json: AsJson = False) -> None:
    """What the model's chat template does, and whether conversations can be continued with it token by token."""
    from rollout_ft.cli.template import report
    from rollout_ft.config import load

    print(report(load(config, overrides), json))


Sessions = Annotated[int, typer.Option(min=1, help="how many at once")]
Turns = Annotated[int, typer.Option(min=1, help="of each session")]
TokensIn = Annotated[int, typer.Option(min=1, help="new tokens of a request")]
TokensOut = Annotated[int, typer.Option(min=1, help="tokens of a reply")]
ProfileDir = Annotated[Path | None, typer.Option(help="run py-spy on all our processes under load, and write their stacks there")]


@bench_app.command("overhead")
def bench_overhead(
    sessions: Sessions = 64, turns: Turns = 50, tokens_in: TokensIn = 650, tokens_out: TokensOut = 300,
    rounds: Annotated[int, typer.Option(min=0, help="with telemetry and without it, in turn; 0: none")] = 12,
    profile: ProfileDir = None, json: AsJson = False,
) -> None:  # fmt: skip
    """Latency, CPU and memory that a turn costs over talking to the engine directly, and what telemetry has of that."""
    from rollout_ft.cli.bench.command import Scale
    from rollout_ft.cli.bench.phases import Sizes

    _bench(Scale(Sizes(sessions, turns, tokens_in, tokens_out), rounds=rounds), profile, json)


@bench_app.command("session")
def bench_session(
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


@bench_app.command("store")
def bench_store(
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
    figures = _run(bench(scale, console), json)
    if figures is None:
        raise typer.Exit(1)
    if recoveries:
        with contextlib.redirect_stdout(sys.stderr):  # Ray tells of what was killed
            lost: JSON | None = _run(recovery(recoveries), json)
        if lost is None:
            raise typer.Exit(1)
        console.print(table(lost))
        figures |= lost
    if json:
        print(orjson.dumps(figures).decode())


@bench_app.command("storm")
def bench_storm(
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

    figures = _run(both(), json, uvloop.new_event_loop)
    if figures is None:
        raise typer.Exit(1)
    if json:
        print(orjson.dumps(figures).decode())


@bench_app.command("recovery")
def bench_recovery(
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
        figures: JSON | None = _run(bench(runs, seed=seed, show=show), json)
    if figures is None:
        raise typer.Exit(1)
    if json:
        print(orjson.dumps(figures).decode())
    else:
        console.print(faults_table(figures))


@bench_app.command("trial")
def bench_trial(
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
    figures = _run(trial.bench(scale, Console(stderr=json)), json)
    if figures is None:
        raise typer.Exit(1)
    if json:
        print(orjson.dumps(figures).decode())


def _bench(scale: Scale, profile: Path | None, json: bool) -> None:
    from rollout_ft.cli.bench.command import bench

    figures = _run(bench(scale, Console(stderr=json), profile), json)
    if figures is None:
        raise typer.Exit(1)
    if json:
        print(orjson.dumps(figures).decode())


def _run(work: Coroutine[Any, Any, Any], json: bool = False, loop: Callable[[], asyncio.AbstractEventLoop] | None = None) -> Any:
    """Runs it to its end; SIGINT and SIGTERM cancel it, so that everything it started is ended. With `json` what Ray says on the way
    does not go where the result does."""

    async def cancellable() -> Any:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            return await task
        return None

    aside = contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext()
    with aside, asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(cancellable())


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
