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
from hypothesis import given
from hypothesis import strategies as st
from ports import free_port
from rich.console import Console

from rollout_ft.cli.status import Where, follow, screen, summary, waits, where
from rollout_ft.config import Config
from rollout_ft.errors import ConfigError
from rollout_ft.fleet.health import State
from rollout_ft.gateway.keys import Keys
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
    } | changed  # fmt: skip


def trials(count: int, state: str = "held", attempt: int = 1) -> list[dict[str, Any]]:
    return [{"trial_id": f"{state}-{i}", "attempt": attempt, "entries": 9, "state": state} for i in range(count)]


def shown(seen: dict[str, Any], width: int = 100, failed: str = "") -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(screen({"gateway_url": "http://g:1"} | seen, failed))
    return text.getvalue()


def test_a_fleet_that_serves_waits_for_nothing():
    assert waits(fleet(), NOW) == []
    assert "waits" not in shown(summary(fleet(), trials(3), NOW))


def test_trials_are_counted_by_their_state():
    seen = summary(fleet(), [*trials(3), *trials(2, "released", attempt=3), *trials(1, "damaged")], NOW)
    assert seen["trials"] == {"known": 6, "held": 3, "released": 2, "damaged": 1}
    assert seen["restarts"] == 4
    assert seen["warnings"] == ["1 trials are damaged: rollout-ft explain trial_damaged"]
    assert "6 known, 3 held, 2 released, 1 damaged; 4 restarts" in shown(seen)


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (fleet(weights=WEIGHTS | {"phase": "paused", "still_since": NOW - 90}), "the trainer: paused for 90 s; POST /fleet/resume ends it"),
        (fleet(weights=WEIGHTS | {"phase": "offloaded", "still_since": NOW - 5}), "the trainer: offloaded for 5 s"),
        (fleet(weights=WEIGHTS | {"phase": "updating", "still_since": NOW}), "the trainer: updating for 0 s"),
        (fleet(engine(0, "retired")), "every turn waits for an engine: none serves"),
        (fleet(engine(0), engine(1, "dead")), "engine-1 is to be started again; 4 sessions are there until they are asked for"),
        (fleet(engine(0), engine(1, "restarting", sessions=0)), "engine-1 starts, and serves nothing yet"),
        (fleet(engine(0), engine(1, "stale")), "engine-1 waits for weights"),
        (fleet(engine(0), engine(1, "offloaded")), "engine-1 waits for its memory and for weights"),
        (fleet(engine(0), engine(1, open=False, held="aborted")), "engine-1 waits for its owner (aborted)"),
        (fleet(engine(0), engine(1, draining=True)), "engine-1 ends when its turns have"),
        (fleet(*(engine(i, "dead") for i in range(9))), "engine-0, engine-1, engine-2 and 6 more, each is to be started again"),
        (fleet(view={"number": 4, "members": ["s"], "min_replicas": 2}), "every commit waits for the store: 1 replicas, and no"),
    ],
)  # fmt: skip
def test_it_says_what_waits_for_what(seen: dict[str, Any], said: str):
    assert any(said in line for line in waits(seen, NOW)), waits(seen, NOW)
    assert said[:30] in shown(summary(seen, [], NOW), width=160)


def test_thousands_of_trials_and_engines_fit_a_screen_and_those_in_trouble_come_first():
    many = [engine(i) for i in range(3000)] + [engine(3000, "dead", reason="killed by SIGKILL (out of memory on the GPU)")]
    seen = summary(fleet(*many, warnings=[f"engine-{i} is odd" for i in range(100)]), trials(5000), NOW)
    text = shown(seen, width=120)
    assert len(text.splitlines()) < 50
    assert "killed by SIGKILL (out of memory" in text
    assert "and 2,981 healthy" in text
    assert "and 92 more" in text


@given(
    st.lists(st.tuples(st.sampled_from(list(State)), st.booleans(), st.text(max_size=300)), max_size=60),
    st.sampled_from(["serving", "paused", "updating", "offloaded"]), st.integers(40, 200),
)  # fmt: skip
def test_any_fleet_can_be_shown(engines: list[tuple[State, bool, str]], phase: str, width: int):
    made = [engine(i, state.value, draining=draining, reason=reason) for i, (state, draining, reason) in enumerate(engines)]
    seen = fleet(weights=WEIGHTS | {"phase": phase}) | {"engines": made, "serves": False}
    assert "math" in shown(summary(seen, trials(5), NOW), width)


def test_what_is_no_longer_so_is_said_to_be_old():
    assert "this is how it was: it does not answer" in shown(summary(fleet(), [], NOW), failed="it does not answer")


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
        assert sum(e["sessions"] for e in seen["engines"]) == seen["sessions"] == 1
        assert (seen["engine_states"], seen["waits"], seen["weights"]["phase"]) == ({"healthy": 2}, [], "serving")
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
        await until("every turn waits for the trainer: paused")
        for server in run.gateways:
            await server.aclose()
        await until("this is how it was: the gateway at")
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


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
