"""`rollout-ft status`: what follows from what a gateway says, that it fits a screen, and that a real one is asked right."""

from __future__ import annotations

import asyncio
import contextlib
import io
from pathlib import Path
from typing import Any

import aiohttp.web
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ports import free_port
from rich.console import Console
from test_directory import holding

from rollout_ft.cli.status import Where, follow, screen, summary, where
from rollout_ft.config import Config
from rollout_ft.errors import ConfigError
from rollout_ft.fleet.health import State
from rollout_ft.fleet.listing import WAITS, Rank
from rollout_ft.fleet.looks import _abridged
from rollout_ft.gateway.keys import Keys
from rollout_ft.telemetry.problems import problems
from rollout_ft.testing.local_run import local_run

NOW = 1_000_000.0
WEIGHTS = {"phase": "serving", "mode": "", "released": [], "version": "v3", "versions": ["v3"], "still_since": None, "still_s": 0.0}


def engine(number: int, state: str = "healthy", **changed: Any) -> dict[str, Any]:
    return {
        "engine_id": f"engine-{number}", "state": state, "incarnation": 1, "reason": "", "url": "10.0.0.1:1", "weight_version": "v3",
        "stale": "", "node": "10.0.0.1", "draining": False, "sessions": 4,
    } | changed  # fmt: skip


def fleet(*engines: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """As `GET /fleet` answers."""
    there = list(engines) or [engine(0), engine(1)]
    return {
        "run": "math", "serves": any(e["state"] in ("healthy", "suspect") for e in there), "engines": there,
        "view": {"number": 2, "members": ["math/store-0/1", "math/store-1/1"], "min_replicas": 1}, "weights": WEIGHTS, "warnings": [],
        "nodes": {}, "gateways": ["math/gateway-0/1"], "sessions": sum(e["sessions"] for e in there),
        "metrics": {"rollout_ft/tokens_generated": 9000, "rollout_ft/tokens_reused": 120, "rollout_ft/tokens_wasted": 7},
    } | changed  # fmt: skip


def row(trial_id: str, attention: str = "runs", **changed: Any) -> dict[str, Any]:
    return {
        "trial_id": trial_id, "attempt": 1, "entries": 9, "state": "held", "outcome": None, "engine_id": "engine-0", "attention": attention,
        "why": "", "remedy": "",
    } | changed  # fmt: skip


def overview(of: dict[str, Any], *rows: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """As `GET /overview` answers."""
    states = {"held": len(rows), "idle": 0, "ended": 2, "released": 0, "damaged": 0}
    return {
        "now": NOW, "fleet": _abridged(of), "problems": problems(of, NOW), "recoveries": [], "store_silent": "",
        "turns": {"count": 0, "waits": {}, "turns": [], "silent": []}, "events": {"events": [], "next": "0-0", "missed": False},
        "trials": {"known": 2 + len(rows), "states": states, "outcomes": {"completed": 2}, "restarts": 4, "trials": list(rows), "total": 0},
    } | changed  # fmt: skip


def shown(seen: dict[str, Any], width: int = 100, failed: str = "") -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(screen({"gateway_url": "http://g:1"} | seen, failed))
    return text.getvalue()


def test_a_run_in_which_all_is_well_says_so_in_a_few_lines():
    text = shown(summary(overview(fleet(), row("a"), row("b"))))
    assert not any(word in text for word in ("what to do", "to look at", "recoveries"))
    assert "4 known, 2 held, 2 ended; 4 restarts; 2 completed so far" in text
    assert "9,000 generated, 120 saved, 7 wasted" in text
    assert len(text.splitlines()) < 12


def test_what_is_wrong_stands_above_with_what_to_do():
    dead = engine(1, "dead", reason="killed by SIGKILL (out of memory)")
    seen = summary(overview(fleet(engine(0), dead)))
    text = shown(seen, width=200)
    assert "engine-1 is dead; 4 sessions are there. killed by SIGKILL (out of memory)" in text
    assert "→ Read the log that it names; out of memory:" in text
    assert text.index("what to do") < text.index("sessions  start")
    assert [each["level"] for each in seen["problems"]] == ["bad"]


def test_it_says_which_trials_wait_for_what():
    stuck = row("q7", "stuck", attempt=2, why="no token for 90 s, at engine-0: waits for a place at its engine", remedy="More engines.")
    turns = {"count": 12, "waits": {"tokens": 8, "admission": 4}, "turns": [], "silent": []}
    seen = summary(overview(fleet(), stuck, row("q8"), turns=turns))
    text = shown(seen, width=140)
    assert "12 in flight: 8 for its next token, 4 for a place at its engine" in text
    assert "q7 2 engine-0 no token for 90 s, at engine-0: waits for a place at its engine" in " ".join(text.split())
    assert "→ More engines." in text
    assert [each["trial_id"] for each in seen["attention"]] == ["q7"]


def test_it_says_how_the_run_got_over_what_was_lost():
    lost = {
        "engine": "engine-1", "incarnation": 1, "time": NOW - 90, "reason": "stalled: no token\nfor 2 s", "moved": 8, "resumed": 7,
        "slowest_s": 1.25, "replaced_s": 31.0, "retired": False,
    }  # fmt: skip
    told = [
        {"time": NOW - n, "event": name, "engine": "engine-1", "source": "supervisor", "seq": n}
        for n, name in ((90, "engine.dead"), (80, "session.moved"), (59, "engine.up"))
    ]
    seen = summary(overview(fleet(), recoveries=[lost], events={"events": told, "next": "", "missed": False}))
    text = shown(seen, width=200)
    assert "90 s ago engine-1: back after 31 s, slowest 1.2 s; 8 sessions moved, 7 went on; stalled: no token for 2 s" in text
    assert text.index("59 s ago engine.up engine=engine-1") < text.index("90 s ago engine.dead engine=engine-1")
    assert "session.moved" not in text
    assert "seq" not in text
    for back, said in ((31.0, "back after 31 s, slowest 1.2 s"), (None, "not back yet, slowest 1.2 s")):
        assert f"90 s ago engine-1: {said}" in shown(summary(overview(fleet(), recoveries=[lost | {"replaced_s": back}])), width=80)


@pytest.mark.parametrize("width", [50, 80])
def test_on_a_narrow_terminal_every_engine_is_told_from_the_others_and_its_state_is_whole(width: int):
    there = [engine(n, engine_id=f"engine-{n}", draining=n == 5, reason="a long reason " * 9) for n in range(4, 8)]
    text = shown(summary(overview(fleet(*there, engine(0, engine_id="http://[fd00::1]:30000")))), width)
    for each in there:
        row = next(line for line in text.splitlines() if line.split()[:1] == [each["engine_id"]])
        assert ("healthy, draining" if each["draining"] else "healthy") in row
    assert "http://[fd00::1]:30000" in text


def test_who_does_not_answer_is_named_first():
    turns = {"count": 0, "waits": {}, "turns": [], "silent": ["engine-1"]}
    seen = summary(overview(fleet(), store_silent="the checkpoint store does not answer: in time", turns=turns))
    assert [each["what"] for each in seen["problems"]] == [
        "the checkpoint store does not answer: in time", "engine-1 does not say what is in flight there.",
    ]  # fmt: skip


def test_what_is_grave_comes_before_the_silent_who_are_one_line():
    turns = {"count": 0, "waits": {}, "turns": [], "silent": [f"engine-{i}" for i in range(2, 32)]}
    seen = summary(overview(fleet(engine(0), engine(1, "dead", reason="killed")), turns=turns))
    assert [each["level"] for each in seen["problems"]] == ["bad", "warn"]
    assert seen["problems"][1]["what"] == "engine-2, engine-3, engine-4 and 27 more do not say what is in flight there."


def test_what_is_not_counted_is_said_not_to_be():
    assert summary(overview(fleet(metrics={})))["tokens"] is None
    counts = fleet()["metrics"]
    assert "wasted, since " in shown(summary(overview(fleet(metrics=counts | {"rollout_ft/counted_since": NOW}))))
    assert "wasted, since " not in shown(summary(overview(fleet(metrics=counts))))
    assert "not counted (telemetry.metrics)" in shown(summary(overview(fleet(metrics={}))))


def test_an_engines_address_is_shown_as_it_is():
    text = shown(summary(overview(fleet(engine(0, engine_id="http://[fd00::1]:30000")), row("t", "lost", engine_id="[b]x[/b]"))), width=160)
    assert "http://[fd00::1]:30000" in text
    assert "[b]x[/b]" in text


def test_thousands_of_trials_and_engines_fit_a_screen_and_those_in_trouble_come_first():
    many = [engine(i) for i in range(3000)] + [engine(3000, "dead", reason="killed by SIGKILL (out of memory on the GPU)")]
    rows = [row(f"t{i}", "lost", why="engines, stores and agents failed") for i in range(50)]
    told = [{"time": NOW - i, "event": "engine.doubted", "engine": "e"} for i in range(200)]
    seen = overview(
        fleet(*many, warnings=[f"engine-{i} is odd" for i in range(100)]), *rows, events={"events": told, "next": "", "missed": False}
    )
    text = shown(summary(seen), width=120)
    assert len(text.splitlines()) < 60
    assert "killed by SIGKILL (out of memory" in text
    assert "and 2,989 healthy" in text
    assert "and 95 more" in text
    assert "and at least 42 more: the status page lists them" in text


WORDS = st.text(max_size=300)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(State)), st.booleans(), WORDS), max_size=40),
    st.sampled_from(["serving", "paused", "updating", "offloaded"]), st.lists(st.tuples(st.sampled_from(list(Rank)), WORDS), max_size=20),
    st.dictionaries(st.sampled_from(list(WAITS)), st.integers(1, 9)), st.integers(40, 200),
)  # fmt: skip
def test_any_run_can_be_shown_and_nothing_in_it_moves_the_cursor(
    engines: list[tuple[State, bool, str]], phase: str, rows: list[tuple[Rank, str]], waits: dict[str, int], width: int
):
    made = [engine(i, state.value, draining=draining, reason=reason) for i, (state, draining, reason) in enumerate(engines)]
    seen = fleet(weights=WEIGHTS | {"phase": phase}) | {"engines": made, "serves": False}
    trials = [row(f"t{i}", rank.name.lower(), why=why) for i, (rank, why) in enumerate(rows)]
    text = shown(summary(overview(seen, *trials, turns={"count": 9, "waits": waits, "turns": [], "silent": []})), width)
    assert "math" in text
    assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 for c in text)


def test_what_is_no_longer_so_is_said_to_be_old():
    assert ": it does not answer" in shown(summary(overview(fleet())), failed="it does not answer")


def a_directory(path: Path, *, events: str, mode: int = 0o600) -> Path:
    (path / "config.json").write_bytes(orjson.dumps(Config().model_dump(mode="json")))
    (path / "events.jsonl").write_text(events)
    (path / "secret").write_text("s3cret")
    (path / "secret").chmod(mode)
    return path


STARTED = '{"event": "run.started", "gateway_url": "http://127.0.0.1:1"}\n{"event": "run.started", "gateway_url": "http://127.0.0.1:2"}\n'


def test_a_directory_says_where_its_gateway_is_now_and_has_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ROLLOUT_FT_GATEWAY_URL", "http://other:1")
    found = where(a_directory(tmp_path, events=STARTED), "", None)
    assert found == Where("http://127.0.0.1:2", Keys("s3cret").operator)
    assert Keys("s3cret").operator not in repr(found)
    assert where(tmp_path, "http://moved:3/", None).url == "http://moved:3"
    with pytest.raises(ConfigError, match="http://"):
        where(tmp_path, "127.0.0.1:8000", None)


def test_without_a_directory_the_options_or_the_environment_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "key").write_text("rft-op-1\n")
    assert where(None, "http://g:1", tmp_path / "key") == Where("http://g:1", "rft-op-1")
    monkeypatch.setenv("ROLLOUT_FT_GATEWAY_URL", "http://g:2")
    monkeypatch.setenv("ROLLOUT_FT_OPERATOR_KEY", "rft-op-2")
    assert where(None, "", None) == Where("http://g:2", "rft-op-2")


@pytest.mark.parametrize("left_out", ["ROLLOUT_FT_GATEWAY_URL", "ROLLOUT_FT_OPERATOR_KEY"])
def test_what_is_missing_is_named(left_out: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("ROLLOUT_FT_GATEWAY_URL", "ROLLOUT_FT_OPERATOR_KEY"):
        monkeypatch.setenv(name, "http://g:1")
    monkeypatch.delenv(left_out)
    with pytest.raises(ConfigError, match=left_out):
        where(None, "", None)


def test_a_directory_that_cannot_say_it_is_refused_with_the_remedy(tmp_path: Path):
    with pytest.raises(ConfigError, match="no run in it"):
        where(tmp_path, "", None)
    with pytest.raises(ConfigError, match="--gateway-url"):
        where(a_directory(tmp_path, events='{"event": "run.resumed"}\n'), "", None)
    with pytest.raises(ConfigError, match="chmod 600"):
        where(a_directory(tmp_path, events=STARTED, mode=0o644), "", None)


async def test_while_a_run_starts_or_is_gone_on_with_it_is_said_to_start(tmp_path: Path):
    path = tmp_path / "run"
    with holding(path):
        with pytest.raises(ConfigError, match="is starting: its gateway is not up yet; wait"):
            where(path, "", None)
        (path / "events.jsonl").write_text(json_of_start(free_port()))
        with pytest.raises(ConfigError, match="it is starting; wait"):
            await follow(where(path, "", None), 0, False, QUIET)
    with pytest.raises(ConfigError, match="Of a run that has ended"):
        await follow(where(path, "", None), 0, False, QUIET)


def json_of_start(port: int) -> str:
    return orjson.dumps({"event": "run.started", "gateway_url": f"http://127.0.0.1:{port}"}).decode() + "\n"


QUIET = Console(file=io.StringIO())
ENGINES = {"engine": {"count": 2, "args": ["--model", "hash"]}}


async def test_a_run_is_seen_as_it_is(capsys: pytest.CaptureFixture[str]):
    async with local_run(Config.model_validate(ENGINES)) as run:
        await run.whole()
        for trial_id in ("a", "b", "c"):
            await run.client.open_session(trial_id=trial_id)
        await run.client.outcome("b", "completed", 1.0, "", 1)
        await run.client.outcome("c", "completed", 1.0, "", 1)
        await run.client.release("c")
        await follow(Where(run.url, run.keys.operator), 0, True, QUIET)
        seen = orjson.loads(capsys.readouterr().out)
        assert seen["trials"] == {"known": 3, "held": 1, "ended": 1, "released": 1}
        assert seen["outcomes"] == {"completed": 2}
        assert sum(e["sessions"] for e in seen["engines"]) == seen["sessions"] == 1
        assert (seen["engine_states"], seen["problems"], seen["weights"]["phase"]) == ({"healthy": 2}, [], "serving")
        with pytest.raises(ConfigError, match="`operator_key` of `rollout-ft serve`"):
            await follow(Where(run.url, "rft-op-of-another-run"), 0, True, QUIET)
        with pytest.raises(ConfigError, match="no such route"):
            await follow(Where(f"{run.url}/v1", run.keys.operator), 0, True, QUIET)


async def test_a_watch_follows_a_run_and_outlives_its_gateway():
    screens = io.StringIO()

    async def until(text: str) -> None:
        while text not in screens.getvalue():
            await asyncio.sleep(0.01)

    async with local_run(Config.model_validate(ENGINES)) as run:
        await run.whole()
        console = Console(file=screens, width=120, force_terminal=True)
        watching = asyncio.create_task(follow(Where(run.url, run.keys.operator), 0.05, False, console))
        await until("serving, version")
        await run.client.request("POST", "/fleet/pause", {})
        await until("Every turn waits for the trainer: paused")
        for server in run.gateways:
            await server.aclose()
        await until("this is how it was")
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def test_a_watch_as_json_outlives_its_gateway_and_says_so(capsys: pytest.CaptureFixture[str]):
    lines: list[str] = []

    async def until(text: str) -> None:
        while not any(text in line for line in lines):
            await asyncio.sleep(0.01)
            lines.extend(capsys.readouterr().out.splitlines())

    async with local_run(Config.model_validate(ENGINES)) as run:
        await run.whole()
        watching = asyncio.create_task(follow(Where(run.url, run.keys.operator), 0.05, True, QUIET))
        await until('"serves":true')
        for server in run.gateways:
            await server.aclose()
        await until('"failed"')
        lines.clear()
        await until('"failed"')
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        assert {*orjson.loads(lines[-1])} == {"gateway_url", "time", "failed"}


async def test_where_nobody_answers_an_error_says_what_to_do():
    with pytest.raises(ConfigError, match="check the URL that `rollout-ft serve` printed"):
        await follow(Where(f"http://127.0.0.1:{free_port()}", "key"), 0, False, QUIET)


async def test_what_is_no_gateway_is_said_to_be_none():
    async def odd(_: aiohttp.web.Request) -> aiohttp.web.Response:
        return aiohttp.web.Response(text="<html>hello</html>")

    application = aiohttp.web.Application()
    application.router.add_get("/{any}", odd)
    runner = aiohttp.web.AppRunner(application)
    await runner.setup()
    port = free_port()
    try:
        await aiohttp.web.TCPSite(runner, "127.0.0.1", port).start()
        with pytest.raises(ConfigError, match="is no gateway of rollout_ft"):
            await follow(Where(f"http://127.0.0.1:{port}", "key"), 0, False, QUIET)
    finally:
        await runner.cleanup()
