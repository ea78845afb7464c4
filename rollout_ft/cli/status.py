"""`rollout-ft status`: what a run that goes on does just now, on one screen.

Owns what is asked of the gateway, what follows from the answers, and how it is shown. Changes nothing. Whatever the run's size, a
screen has a bounded number of lines: trials are counted, and of many engines those in trouble come first.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import orjson
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rollout_ft.cli.directory import saved_config, secret_of
from rollout_ft.clock import wall
from rollout_ft.errors import BadRequest, ConfigError
from rollout_ft.fleet.health import State
from rollout_ft.fleet.weights import Phase
from rollout_ft.gateway.keys import Keys
from rollout_ft.telemetry.eventsfile import read_events
from rollout_ft.telemetry.explanations import explain
from rollout_ft.trial.client import Client
from rollout_ft.types import JSON

GATEWAY_URL, OPERATOR_KEY = "ROLLOUT_FT_GATEWAY_URL", "ROLLOUT_FT_OPERATOR_KEY"
ANSWER_S = 10.0
MAX_ENGINES, MAX_WARNINGS, MAX_NAMED = 20, 8, 3
_STYLES = {State.HEALTHY: "green", State.DEAD: "bold red", State.RETIRED: "dim"}
_ENDS = {
    Phase.PAUSED: "POST /fleet/resume ends it",
    Phase.UPDATING: "the end of its update does, or POST /fleet/weights",
    Phase.OFFLOADED: "memory that is given back and then weights end it",
}
_WAITS = {
    State.RESTARTING: "starts, and serves nothing yet",
    State.DEAD: "is to be started again",
    State.STALE: "waits for weights",
    State.OFFLOADED: "waits for its memory and for weights",
}


@dataclass(frozen=True, slots=True)
class Where:
    url: str
    key: str = field(repr=False)
    verify: bool = True


def where(directory: Path | None, gateway_url: str, key_file: Path | None) -> Where:
    """Whom to ask, and with which key: what is given, else what the directory has, else the environment. Raises ConfigError."""
    verify, url, key = True, gateway_url, key_file.read_text().strip() if key_file else ""
    if directory is not None:
        verify = not saved_config(directory).gateway.tls_cert  # as the run's own client does
        url, key = url or _last_url(directory), key or Keys(secret_of(directory)).operator
    url, key = url or os.environ.get(GATEWAY_URL, ""), key or os.environ.get(OPERATOR_KEY, "")
    if not url:
        raise ConfigError(f"status needs a directory that `run` writes to, or --gateway-url (or {GATEWAY_URL}): `serve` prints it")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is no URL of a gateway: it begins with http:// or https://, as `rollout-ft serve` prints it")
    if not key:
        raise ConfigError(f"status needs the operator's key: --operator-key-file, or {OPERATOR_KEY}: `serve` prints it")
    return Where(url.rstrip("/"), key, verify)


def _last_url(directory: Path) -> str:
    started = [e for e in read_events(directory) if e.get("event") == "run.started"]
    if not started:
        raise ConfigError(f"{directory} does not say where its gateway is: no process of the run was up yet; wait, or give --gateway-url")
    return started[-1]["gateway_url"]


async def follow(there: Where, every_s: float, as_json: bool, console: Console) -> None:
    """Once, or again and again until it is cancelled. Raises ConfigError when the first look fails; later ones are shown as failed."""
    client = Client(there.url, there.key, verify=there.verify, patience_s=0)
    try:
        seen = await look(client, there.url)
        if as_json:
            _print(seen)
        elif not every_s:
            console.print(screen(seen))
        if every_s:
            await (_print_on if as_json else _show_on)(client, there.url, every_s, seen, console)
    finally:
        await client.aclose()


async def _print_on(client: Client, url: str, every_s: float, seen: JSON, console: Console) -> None:
    while True:
        await asyncio.sleep(every_s)
        _print(await look(client, url))


async def _show_on(client: Client, url: str, every_s: float, seen: JSON, console: Console) -> None:
    with Live(screen(seen), console=console, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(every_s)
            try:
                seen, failed = await look(client, url), ""
            except ConfigError as e:
                failed = str(e)
            live.update(screen(seen, failed), refresh=True)


def _print(seen: JSON) -> None:
    print(orjson.dumps(seen).decode(), flush=True)


async def look(client: Client, url: str) -> JSON:
    """Raises ConfigError, with what to do, where there is no answer."""
    try:
        fleet, trials = await asyncio.gather(*(client.request("GET", path, answer_s=ANSWER_S) for path in ("/fleet", "/trials")))
        return {"gateway_url": url} | summary(fleet, trials, wall())
    except BadRequest as e:
        known = explain(e.code)
        raise ConfigError(f"{e.message} ({e.code}). {known.remedy if known else ''}".rstrip()) from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"what answers at {url} is no gateway of rollout_ft: use the URL that `rollout-ft serve` prints") from None


def summary(fleet: JSON, trials: Sequence[JSON], now: float) -> JSON:
    """What a script gets. `now`: wall clock."""
    states = Counter(trial["state"] for trial in trials)
    warnings = list(fleet["warnings"])
    if states["damaged"]:
        warnings.append(f"{states['damaged']} trials are damaged: rollout-ft explain trial_damaged")
    return {
        **{name: fleet[name] for name in ("run", "serves", "engines", "view", "weights", "sessions", "gateways")},
        "engine_states": dict(Counter(engine["state"] for engine in fleet["engines"])),
        "trials": {"known": len(trials), **states},
        "restarts": sum(trial["attempt"] - 1 for trial in trials),
        "warnings": warnings, "waits": waits(fleet, now),
    }  # fmt: skip


def waits(fleet: JSON, now: float) -> list[str]:
    """What waits for what, the gravest first. `now`: wall clock."""
    weights, view, engines = fleet["weights"], fleet["view"], fleet["engines"]
    said: list[str] = []
    least = max(1, view["min_replicas"])
    if len(view["members"]) < least:
        said.append(
            f"every commit waits for the store: {len(view['members'])} replicas, and no fewer than {least} may be (store.min_replicas)"
        )
    if weights["phase"] != Phase.SERVING:
        for_s = now - (weights["still_since"] or now)
        said.append(f"every turn waits for the trainer: {weights['phase']} for {for_s:.0f} s; {_ENDS[weights['phase']]}")
    elif not fleet["serves"]:
        said.append("every turn waits for an engine: none serves")
    for state, what in _WAITS.items():
        those = [engine for engine in engines if engine["state"] == state]
        sessions = sum(engine["sessions"] for engine in those)
        if those:
            said.append(f"{_named(those)} {what}" + (f"; {sessions:,} sessions are there until they are asked for" if sessions else ""))
    closed = [engine for engine in engines if not engine.get("open", True) and engine["state"] in (State.HEALTHY, State.SUSPECT)]
    if closed:
        said.append(f"{_named(closed)} waits for its owner ({closed[0]['held'] or 'not opened yet'})")
    draining = [engine for engine in engines if engine["draining"] and engine["state"] != State.RETIRED]
    if draining:
        said.append(f"{_named(draining)} ends when its turns have, after fleet.drain_timeout_s at the latest")
    return said


def _named(engines: Sequence[JSON]) -> str:
    more = len(engines) - MAX_NAMED
    return ", ".join(engine["engine_id"] for engine in engines[:MAX_NAMED]) + (f" and {more:,} more, each" if more > 0 else "")


# -- the screen -------------------------------------------------------------------------------------------------------


def screen(seen: JSON, failed: str = "") -> RenderableType:
    """`failed`: why this is no longer what is."""
    weights, view = seen["weights"], seen["view"]
    old = [Text(f"this is how it was: {failed}", "bold red")] if failed else []
    head = Text.assemble(
        (f"{seen['run']} ", "bold"), ("serves" if seen["serves"] else "serves nothing", "green" if seen["serves"] else "bold red"),
        f"  {seen['gateway_url']}",
    )  # fmt: skip
    facts = Table.grid(padding=(0, 2))
    facts.add_row("trials", _counts(seen["trials"]) + f"; {seen['restarts']:,} restarts")
    facts.add_row("engines", _counts(seen["engine_states"]) + f"; {seen['sessions']:,} sessions")
    facts.add_row("weights", f"{weights['phase']}, version {weights['version'] or 'of the command line'}")
    facts.add_row("store", f"{len(view['members'])} replicas in view {view['number']}; {len(seen['gateways'])} gateways")
    return Group(
        *old, head, facts, *_lines("waits", seen["waits"], "yellow"), *_lines("warnings", seen["warnings"], "yellow"), _engines(seen)
    )


def _counts(counted: JSON) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counted.items()) or "none"


def _lines(title: str, said: Sequence[str], style: str) -> list[Text]:
    more = [f"and {len(said) - MAX_WARNINGS:,} more"] if len(said) > MAX_WARNINGS else []
    return [Text(title, "bold"), *(Text(f"  {line}", style) for line in [*said[:MAX_WARNINGS], *more])] if said else []


def _engines(seen: JSON) -> Table:
    worst_first = sorted(seen["engines"], key=lambda engine: (engine["state"] == State.HEALTHY, engine["state"] == State.RETIRED))
    left_out = Counter(engine["state"] for engine in worst_first[MAX_ENGINES:])
    table = Table("engine", "state", "version", "sessions", "start", "why", box=None, caption_justify="left")
    table.caption = f"and {_counts(left_out)}" if left_out else None
    for engine in worst_first[:MAX_ENGINES]:
        state = engine["state"] + (", draining" if engine["draining"] else "")
        why = Text(engine["stale"] or engine["reason"], "dim" if state == State.HEALTHY else "", no_wrap=True, overflow="ellipsis")
        table.add_row(
            engine["engine_id"], Text(state, _STYLES.get(engine["state"], "yellow")), Text(engine["weight_version"]),
            f"{engine['sessions']:,}", str(engine["incarnation"]), why,
        )  # fmt: skip
    return table
