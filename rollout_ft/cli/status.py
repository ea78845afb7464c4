"""`rollout-ft status`: what a run that goes on does just now, on one screen: what is wrong, and what to do.

Owns what of the gateway's overview is shown, and how. Changes nothing. Whatever the run's size, a screen has a bounded number of
lines: trials are counted, and of many engines or trials those in trouble come first.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import orjson
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rollout_ft.cli.directory import held, saved_config, secret_of
from rollout_ft.clock import wall
from rollout_ft.errors import BadRequest, ConfigError
from rollout_ft.fleet.health import State
from rollout_ft.fleet.listing import WAITS
from rollout_ft.gateway.keys import Keys
from rollout_ft.telemetry.eventsfile import last_gateway_url
from rollout_ft.telemetry.explanations import explain
from rollout_ft.telemetry.recent import OF_TRIALS
from rollout_ft.telemetry.totals import COUNTED_SINCE
from rollout_ft.telemetry.words import counted, duration, printable
from rollout_ft.trial.client import Client
from rollout_ft.types import JSON

GATEWAY_URL, OPERATOR_KEY = "ROLLOUT_FT_GATEWAY_URL", "ROLLOUT_FT_OPERATOR_KEY"
ANSWER_S, EVERY_S = 10.0, 2.0
MAX_ROWS = 50
OVERVIEW = f"/overview?limit={MAX_ROWS}&events=200&turns=0"
PAGE_AT = "at the gateway's URL"
NOT = "not counted (telemetry.metrics)"
MAX_ENGINES, MAX_PROBLEMS, MAX_TRIALS, MAX_REMEDIES, MAX_RECOVERIES, MAX_EVENTS, MAX_NAMED = 12, 6, 8, 2, 4, 6, 3
NARROW, MAX_ID = 100, 32
"""Columns below which engines are shown in few, and those that an engine's id has at least."""
_STYLES = {State.HEALTHY: "green", State.DEAD: "bold red", State.RETIRED: "dim"}
_NOT_UP = {"unreachable", "no_supervisor"}
_CALM = {"runs", "done", "idle", "restarted"}
_GRAVE = {"damaged", "stuck", "lost"}


@dataclass(frozen=True, slots=True)
class Where:
    url: str
    key: str = field(repr=False)
    verify: bool = True
    directory: Path | None = field(default=None, compare=False)


def where(directory: Path | None, gateway_url: str, key_file: Path | None) -> Where:
    """Whom to ask, and with which key: what is given, else what the directory has, else the environment. Raises ConfigError."""
    verify, url, key = True, gateway_url, key_file.read_text().strip() if key_file else ""
    if directory is not None:
        verify = not saved_config(directory).gateway.tls_cert  # as the run's own client does
        url, key = url or _last_url(directory), key or Keys(secret_of(directory)).operator
    url, key = url or os.environ.get(GATEWAY_URL, ""), key or os.environ.get(OPERATOR_KEY, "")
    if not url:
        raise ConfigError(f"give a directory that `run` writes to, or --gateway-url (or {GATEWAY_URL}): `serve` prints it")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url} is no URL of a gateway: it begins with http:// or https://, as `rollout-ft serve` prints it")
    if not key:
        raise ConfigError(f"the operator's key is needed: --operator-key-file, or {OPERATOR_KEY}: `serve` prints it")
    return Where(url.rstrip("/"), key, verify, directory)


def _last_url(directory: Path) -> str:
    url = last_gateway_url(directory)
    if not url and held(directory):
        raise ConfigError(f"the run in {directory} is starting: its gateway is not up yet; wait, and ask again")
    if not url:
        raise ConfigError(f"{directory} does not say where its gateway is: no process of the run was up yet; wait, or give --gateway-url")
    return url


async def follow(there: Where, every_s: float, as_json: bool, console: Console) -> None:
    """Once, or again and again until it is cancelled. Raises ConfigError when the first look fails; later ones are shown as failed,
    and as JSON `{gateway_url, time, failed}`."""
    client = Client(there.url, there.key, verify=there.verify, patience_s=0)
    try:
        seen = await look(client, there)
        if as_json:
            _print(seen)
        elif not every_s:
            console.print(screen(seen))
        if every_s:
            await (_print_on(client, there, every_s) if as_json else _show_on(client, there, every_s, seen, console))
    finally:
        await client.aclose()


async def _print_on(client: Client, there: Where, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        try:
            _print(await look(client, there))
        except ConfigError as e:
            _print({"gateway_url": there.url, "time": wall(), "failed": str(e)})


async def _show_on(client: Client, there: Where, every_s: float, seen: JSON, console: Console) -> None:
    """What is below the terminal's last line is cut: the gravest stands above."""
    with Live(screen(seen), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            await asyncio.sleep(every_s)
            try:
                seen, failed = await look(client, there), ""
            except ConfigError as e:
                failed = str(e)
            live.update(screen(seen, failed), refresh=True)


def _print(seen: JSON) -> None:
    print(orjson.dumps(seen).decode(), flush=True)


async def look(client: Client, there: Where) -> JSON:
    """Raises ConfigError, with what to do, where there is no answer."""
    try:
        return {"gateway_url": there.url} | summary(await client.request("GET", OVERVIEW, answer_s=ANSWER_S))
    except BadRequest as e:
        if e.code in _NOT_UP and there.directory is not None and held(there.directory):
            raise ConfigError(f"{e.message}, and a process has the run in {there.directory}: it is starting; wait, and ask again") from None
        known = explain(e.code)
        raise ConfigError(f"{e.message} ({e.code}). {known.remedy if known else ''}".rstrip()) from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"what answers at {there.url} is no gateway of rollout_ft: use the URL that `rollout-ft serve` prints") from None


def summary(overview: JSON) -> JSON:
    """What a script gets: the parts of `GET /overview` that say how the run is, without what concerns no trouble."""
    fleet, trials, turns = overview["fleet"], overview["trials"], overview["turns"]
    return {
        **{name: fleet[name] for name in ("run", "serves", "engines", "view", "weights", "sessions", "gateways")},
        "time": overview["now"], "engine_states": fleet["engine_states"],
        "trials": {"known": trials["known"], **{state: count for state, count in trials["states"].items() if count}},
        "outcomes": trials["outcomes"], "restarts": trials["restarts"], "tokens": tokens(fleet["metrics"]),
        "turns": {"in_flight": turns["count"], "waits": turns["waits"]},
        "problems": sorted([*_silent(overview), *overview["problems"]], key=lambda each: each["level"] != "bad"),
        "attention": [row for row in trials["trials"] if row["attention"] not in _CALM], "recoveries": overview["recoveries"],
        "events": [event for event in overview["events"]["events"] if not event["event"].startswith(OF_TRIALS)],
    }  # fmt: skip


def tokens(metrics: JSON) -> JSON | None:
    """`{generated, reused, wasted, since}` of the run's metrics, `since` its supervisor began; None where nothing is counted."""
    if not metrics:
        return None
    counts = {name: metrics.get(f"rollout_ft/tokens_{name}", 0) for name in ("generated", "reused", "wasted")}
    return counts | {"since": metrics.get(COUNTED_SINCE, 0)}


def _silent(overview: JSON) -> Iterator[JSON]:
    """Who did not answer, so that something is missing here."""
    if overview["store_silent"]:
        remedy = "Trials are shown as they were. Look at the stores: `ray list actors` says whether they live."
        yield {"level": "bad", "what": overview["store_silent"], "why": "", "remedy": remedy}
    if silent := overview["turns"]["silent"]:
        more = f" and {len(silent) - MAX_NAMED:,} more" if len(silent) > MAX_NAMED else ""
        what = f"{', '.join(silent[:MAX_NAMED])}{more} {'do' if len(silent) > 1 else 'does'} not say what is in flight there."
        yield {"level": "warn", "what": what, "why": "", "remedy": "Nothing: what is lost is seen within seconds and replaced."}


# -- the screen -------------------------------------------------------------------------------------------------------


def screen(seen: JSON, failed: str = "") -> RenderableType:
    """`failed`: why this is no longer what is."""
    old = [Text(f"this is how it was at {_clock(seen['time'])}: {failed}", "bold red")] if failed else []
    head = Text.assemble(
        (f"{seen['run']} ", "bold"), ("serves" if seen["serves"] else "serves nothing", "green" if seen["serves"] else "bold red"),
        f"  {seen['gateway_url']}  {_clock(seen['time'])}",
    )  # fmt: skip
    return Group(
        *old, head, _facts(seen), *_problems(seen["problems"]), *_attention(seen["attention"]), _Engines(seen),
        *_recoveries(seen["recoveries"], seen["time"]), *_events(seen["events"], seen["time"]),
    )  # fmt: skip


def _facts(seen: JSON) -> Table:
    weights, view, turns, sampled = seen["weights"], seen["view"], seen["turns"], seen["tokens"]
    waits = ", ".join(f"{count:,} for {WAITS[what][0]}" for what, count in turns["waits"].items())
    replicas = counted(len(view["members"]), "replica")
    told = {
        "trials": _counts(seen["trials"]) + f"; {seen['restarts']:,} restarts; {_counts(seen['outcomes'])} so far",
        "turns": f"{turns['in_flight']:,} in flight" + (f": {waits}" if waits else ""),
        "tokens": f"{sampled['generated']:,} generated, {sampled['reused']:,} saved, {sampled['wasted']:,} wasted" if sampled else NOT,
        "engines": _counts(seen["engine_states"]) + f"; {seen['sessions']:,} sessions",
        "weights": f"{weights['phase']}, version {weights['version'] or 'of the command line'}",
        "store": f"{replicas} in view {view['number']}; {counted(len(seen['gateways']), 'gateway')}",
    }
    if sampled and sampled["since"]:  # a supervisor that was started again has forgotten what was before
        told["tokens"] += f", since {_clock(sampled['since'])}"
    facts = Table.grid(padding=(0, 2))
    for name, said in told.items():
        facts.add_row(name, Text(_plain(said)))
    return facts


def _clock(time: float) -> str:
    return datetime.fromtimestamp(time).strftime("%H:%M:%S")


def _counts(found: JSON) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in found.items()) or "none"


def _problems(found: Sequence[JSON]) -> list[RenderableType]:
    """What is wrong, and what to do."""
    lines: list[RenderableType] = []
    for each in found[:MAX_PROBLEMS]:
        style = "bold red" if each["level"] == "bad" else "yellow"
        lines.append(Padding(Text(f"{each['what']} {_plain(each['why'])}".rstrip(), style), (0, 0, 0, 2)))
        lines += [_remedy(each["remedy"])] if each["remedy"] else []
    more = [Text(f"  and {len(found) - MAX_PROBLEMS:,} more", "yellow")] if len(found) > MAX_PROBLEMS else []
    return [Text("what to do", "bold"), *lines, *more] if lines else []


def _remedy(said: str) -> Padding:
    return Padding(Text(f"→ {said}"), (0, 0, 0, 4))


def _attention(rows: Sequence[JSON]) -> list[RenderableType]:
    if not rows:
        return []
    table = Table("trial", "attempt", "engine", "why", box=None, header_style="dim", expand=True)
    for row in rows[:MAX_TRIALS]:
        why = Text(_plain(row["why"]), "red" if row["attention"] in _GRAVE else "", no_wrap=True, overflow="ellipsis")
        table.add_row(Text(row["trial_id"], no_wrap=True, overflow="ellipsis"), str(row["attempt"]), Text(row["engine_id"]), why)
    least = "at least " if len(rows) >= MAX_ROWS else ""
    said = f"  and {least}{len(rows) - MAX_TRIALS:,} more: the status page lists them, {PAGE_AT}"
    more = [Text(said, "dim")] if len(rows) > MAX_TRIALS else []
    remedies = dict.fromkeys(row["remedy"] for row in rows[:MAX_TRIALS] if row["remedy"])
    return [Text("trials to look at", "bold"), table, *map(_remedy, list(remedies)[:MAX_REMEDIES]), *more]


@dataclass(frozen=True, slots=True)
class _Engines:
    seen: JSON

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _engines(self.seen, narrow=options.max_width < NARROW)


def _engines(seen: JSON, *, narrow: bool) -> Table:
    """Where it is narrow, ids and states are whole, and what is seldom asked for is left out."""
    worst_first = sorted(seen["engines"], key=lambda engine: (engine["state"] == State.HEALTHY, engine["state"] == State.RETIRED))
    shown: Counter[str] = Counter(engine["state"] for engine in worst_first[:MAX_ENGINES])
    left_out = Counter[str](seen["engine_states"]) - shown
    states = [engine["state"] + (", draining" if engine["draining"] else "") for engine in worst_first[:MAX_ENGINES]]
    table = Table(box=None, caption_justify="left", header_style="dim")
    table.caption = f"and {_counts(left_out)}" if left_out else None
    ids = max((len(engine["engine_id"]) for engine in worst_first[:MAX_ENGINES]), default=0)
    table.add_column("engine", overflow="fold", min_width=min(ids, MAX_ID))
    table.add_column("state", min_width=max(map(len, states), default=0))
    for name in ("sessions",) if narrow else ("version", "sessions", "start"):
        table.add_column(name)
    table.add_column("why")
    for engine, state in zip(worst_first, states, strict=False):
        said = _plain(engine["stale"] or engine["reason"])
        why = Text(said, "dim" if state == State.HEALTHY else "", no_wrap=True, overflow="ellipsis")
        sessions, version, start = f"{engine['sessions']:,}", Text(engine["weight_version"]), str(engine["incarnation"])
        counts = (sessions,) if narrow else (version, sessions, start)
        table.add_row(Text(engine["engine_id"]), Text(state, _STYLES.get(engine["state"], "yellow")), *counts, why)
    return table


def _recoveries(found: Sequence[JSON], now: float) -> list[Text]:
    lines: list[Text] = []
    for lost in found[:MAX_RECOVERIES]:
        back = (
            "retired" if lost["retired"] else f"back after {lost['replaced_s']:.0f} s" if lost["replaced_s"] is not None else "not back yet"
        )
        slowest = f", slowest {lost['slowest_s']:.1f} s" if lost["resumed"] else ""
        went = f"{lost['moved']:,} sessions moved, {lost['resumed']:,} went on"
        text = f"  {_ago(now - lost['time'])} ago {lost['engine']}: {back}{slowest}; {went}; {_plain(lost['reason'])}"
        lines.append(Text(text, no_wrap=True, overflow="ellipsis"))
    return [Text("recoveries", "bold"), *lines] if lines else []


def _events(events: Sequence[JSON], now: float) -> list[Text]:
    """The newest first."""
    newest = sorted(events, key=lambda event: -event["time"])[:MAX_EVENTS]
    lines = [Text(f"  {_ago(now - e['time'])} ago {e['event']} {_said(e)}", "dim", no_wrap=True, overflow="ellipsis") for e in newest]
    return [Text("what happened", "bold"), *lines] if lines else []


def _said(event: JSON) -> str:
    fields = {key: value for key, value in event.items() if key not in ("time", "event", "source", "seq") and value not in ("", None, [])}
    return _plain(" ".join(f"{key}={value}" for key, value in fields.items()))


def _ago(seconds: float) -> str:
    return duration(max(0.0, round(seconds)))


def _plain(said: str) -> str:
    """On one line, whatever an engine's log has in it."""
    return printable(" ".join(said.split()))
