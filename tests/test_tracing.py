"""Spans without Ray: what each tells, where it hangs, and what it costs when nobody wants them or nobody takes them."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import sys
import threading

import aiohttp
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from spans import Kept, Spans, until
from stack import KEYS, Stack, stack
from test_gateway import Owner, lost
from test_gateway import stage as played

from rollout_ft.config import Config
from rollout_ft.gateway.asgi import Exchange
from rollout_ft.telemetry import conventions as c
from rollout_ft.telemetry.contexts import MAX_TRACESTATE_CHARS, Ids, of, sent
from rollout_ft.telemetry.making import Maker
from rollout_ft.telemetry.otel import OTel
from rollout_ft.telemetry.sending import Sending
from rollout_ft.telemetry.tracing import EXTRA, OFF, Tracing, wanted
from rollout_ft.trial.agents import variables
from rollout_ft.trial.client import Client
from rollout_ft.types import JSON, Outcome, Why

SECRET = "a run's secret"
AGENTS = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ROOT = SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
SAID = "what the agent says"


def tracing_to(kept: Kept, secret: str = SECRET, instance: str = "run/engine-0/1") -> OTel:
    return OTel(Config(), secret, instance, kept)


async def told(tracing: Tracing, kept: Kept) -> Spans:
    await tracing.flush(10)
    return kept.spans


async def turn(s: Stack, sid: str, messages: list[JSON], headers: dict[str, str] | None = None, status: int = 200) -> JSON:
    body = {"messages": messages, "max_tokens": 8}
    sent_headers = {"authorization": f"Bearer {KEYS.session(sid)}", **(headers or {})}
    url = f"{s.url}/sessions/{sid}/v1/chat/completions"
    async with aiohttp.ClientSession() as http, http.post(url, json=body, headers=sent_headers) as answer:
        assert answer.status == status, await answer.read()
        return orjson.loads(await answer.read())


async def two_turns(s: Stack, sid: str, **headers: str) -> list[JSON]:
    messages: list[JSON] = [{"role": "user", "content": SAID}]
    for _ in range(2):
        reply = (await turn(s, sid, messages, dict(headers)))["choices"][0]["message"]
        messages += [reply, {"role": "user", "content": "go on"}]
    return messages[:-1]


# The tree.


async def test_a_trial_its_attempts_turns_and_generations_are_one_whole_tree():
    kept = Kept()
    tracing = tracing_to(kept)
    async with stack(tracing=tracing) as s:
        first = await s.open("t", task_id="sums", group_id="g")
        await two_turns(s, first)
        second = (await s.supervisor.restart_trial("t", 1, True, Why("infra", "the agent's process died")))["session_id"]
        await two_turns(s, second)
        await s.supervisor.end_trial("t", 2, Outcome.COMPLETED, 0.5, "")
    spans = await told(tracing, kept)
    spans.check_whole()
    (trial,) = spans.trials
    assert (trial.of(c.TRIAL), trial.of(c.TASK), trial.of(c.GROUP), trial.of(c.ATTEMPTS)) == ("t", "sums", "g", 2)
    assert (trial.of(c.OUTCOME), trial.of(c.REWARD), trial.failed) == ("completed", 0.5, None)
    one, two = spans.attempts
    assert {one.parent, two.parent} == {trial.id}
    assert (one.failed, one.of(c.REASON)) == ("the agent's process died", "infra")
    assert two.failed is None
    assert [[s.of(c.OUTCOME) for s in spans.turns if s.parent == a.id] for a in (one, two)] == [["fresh"] * 2, ["replayed"] * 2]
    assert [s.of(c.OUTCOME) for s in spans.generations] == ["finished"] * 2
    assert {s.parent for s in spans.generations} == {s.id for s in spans.below(one)}


async def test_a_turn_and_its_generation_tell_what_they_were():
    kept = Kept()
    tracing = tracing_to(kept)
    async with stack(tracing=tracing) as s:
        sid = await s.open("t")
        await turn(s, sid, [{"role": "user", "content": SAID}])
        (node,) = s.host.session(sid).tree.nodes.values()
    spans = await told(tracing, kept)
    (made,), (call,) = spans.turns, spans.generations
    sampled = len(node.turn.output_ids) // 4
    assert made.name == "chat default"
    assert made.attributes == {
        c.OPERATION: "chat", c.PROVIDER: "rollout_ft", c.REQUEST_MODEL: "default", c.CONVERSATION: sid, c.TRIAL: "t", c.ATTEMPT: 1,
        c.ENGINE: "e0", c.INCARNATION: 1, c.OUTCOME: "fresh", c.TURN: node.turn.key, c.DEPTH: 1, c.GENERATIONS: 1,
        c.WEIGHT_VERSION: "v0", c.INPUT_TOKENS: node.tokens - sampled, c.OUTPUT_TOKENS: sampled, c.REUSED: 0, c.STATUS_CODE: 200,
    }  # fmt: skip
    assert call.of(c.FIRST_CHUNK_S) >= 0
    assert {k: v for k, v in call.attributes.items() if k not in (c.FIRST_CHUNK_S, c.RID)} == {
        c.OPERATION: "text_completion", c.PROVIDER: "small", c.REQUEST_MODEL: "default", c.ENGINE: "engine-0", c.INCARNATION: 1,
        c.REQUEST_MAX_TOKENS: 8, c.TURN: node.turn.key, c.GENERATION: 1, c.REUSED: 0, c.OUTCOME: "finished", c.SAMPLED: sampled,
        c.WEIGHT_VERSION: "v0", c.FINISH_REASONS: ("stop",),
    }  # fmt: skip


async def test_no_span_has_anything_in_it_of_what_was_said():
    kept = Kept()
    tracing = tracing_to(kept)
    async with stack(tracing=tracing) as s:
        sid = await s.open("t", metadata={"hint": SAID})
        said = [m["content"] for m in await two_turns(s, sid)]
        await s.supervisor.restart_trial("t", 1, True, Why("environment", f"EnvironmentLost: {SAID}"))
        await s.supervisor.end_trial("t", 2, Outcome.AGENT_FAILED, None, f"ValueError: {SAID}")
    spans = await told(tracing, kept)
    assert spans.trials[0].of(c.CAUSE) == "ValueError"
    assert spans.trials[0].failed == "agent_failed: ValueError"
    assert [a.failed for a in spans.attempts] == ["EnvironmentLost", "ValueError"]
    assert len(said) == 4
    assert not [text for text in said for span in spans if text in repr(span)]


async def test_usage_added_up_over_all_spans_counts_each_token_once():
    kept = Kept()
    tracing = tracing_to(kept)
    async with stack(tracing=tracing) as s:
        sid = await s.open("t")
        await two_turns(s, sid)
        sampled = s.host.session(sid).tokens
    assert sum(span.of(c.OUTPUT_TOKENS) or 0 for span in await told(tracing, kept)) == sampled


# Whose child a turn is.


async def test_a_turn_is_a_child_of_the_agents_own_span_and_names_its_attempt():
    kept = Kept()
    tracing = tracing_to(kept)
    async with stack(tracing=tracing) as s:
        sid = await s.open("t")
        await turn(s, sid, [{"role": "user", "content": SAID}], {"traceparent": AGENTS, "tracestate": "a=1,b=2"})
    spans = await told(tracing, kept)
    (made,), (call,) = spans.turns, spans.generations
    assert (f"{made.trace:032x}", f"{made.parent:016x}") == (AGENTS[3:35], AGENTS[36:52])
    assert made.links == [Ids(SECRET).span(sid)]
    assert (call.trace, call.parent) == (made.trace, made.id)


async def test_an_agent_that_goes_on_from_its_attempts_span_stays_in_the_trials_trace():
    kept = Kept()
    tracing = tracing_to(kept)
    async with stack(tracing=tracing) as s:
        client = Client(s.url, KEYS.operator)
        session = await client.open_session(trial_id="t")
        await client.aclose()
        assert variables(session)["TRACEPARENT"] == session.traceparent
        await turn(s, session.session_id, [{"role": "user", "content": SAID}], {"traceparent": session.traceparent})
    (made,) = (await told(tracing, kept)).turns
    assert (made.trace, made.parent, made.links) == (Ids(SECRET).trace("t"), Ids(SECRET).span(session.session_id), [])


async def test_without_tracing_nobody_hears_of_a_traceparent():
    async with stack() as s:
        client = Client(s.url, KEYS.operator)
        session = await client.open_session(trial_id="t")
        await client.aclose()
        assert session.traceparent == ""
        assert "TRACEPARENT" not in variables(session)


W3C = re.compile(r"[ \t]*(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*|[ \t]*)")
hexes = st.text("0123456789abcdef", min_size=1, max_size=34)
latin = st.characters(max_codepoint=255, exclude_characters="\r\n\0")
fields = st.one_of(hexes, st.sampled_from(["00", "01", "ff", "0" * 32, "0" * 16, "a" * 32, "b" * 16]))
near = st.lists(fields, max_size=6).map("-".join)
hostile = st.one_of(st.sampled_from([AGENTS, AGENTS[:-2] + "ff", AGENTS.upper(), f" {AGENTS}\t"]), near, st.text(latin, max_size=200))
states = st.lists(st.text(latin, max_size=700), max_size=3)


def allowed(values: list[str]) -> str | None:
    """The trace that W3C's rules find in these headers, read from the text of the rules."""
    match = W3C.fullmatch(values[0]) if len(values) == 1 and len(values[0]) <= 128 else None
    return match[2] if match and not (match[1] == "00" and match[5].strip(" \t")) else None


@given(st.lists(hostile, max_size=2), states)
def test_a_hostile_header_says_nothing_and_a_good_one_what_it_says(parents: list[str], states: list[str]):
    headers = [(b"traceparent", p.encode("latin-1")) for p in parents] + [(b"tracestate", s.encode("latin-1")) for s in states]
    context = of(sent(headers))
    assert (f"{context.trace_id:032x}" if context.is_valid else None) == allowed(parents)
    assert len(context.trace_state.to_header()) <= MAX_TRACESTATE_CHARS


async def test_a_turn_with_a_hostile_header_is_served_and_hangs_below_its_attempt():
    kept = Kept()
    tracing = tracing_to(kept)
    async with stack(tracing=tracing) as s:
        sid = await s.open("t")
        for parent in ("00-0-0-00", AGENTS + "-x", "ff" + AGENTS[2:], "a" * 8000):
            await turn(s, sid, [{"role": "user", "content": parent[:9]}], {"traceparent": parent, "tracestate": "=" * 8000})
    assert {(t.trace, t.parent) for t in (await told(tracing, kept)).turns} == {(Ids(SECRET).trace("t"), Ids(SECRET).span(sid))}


# Ids.


def test_processes_of_a_run_make_the_same_ids_and_nobody_else_can():
    names = ["t", "t~1", "t~2", "u"]
    ids = [Ids(SECRET), Ids(SECRET), Ids("another")]
    made = [[*(i.trace(n) for n in names), *(i.span(n) for n in names)] for i in ids]
    assert made[0] == made[1]
    assert not set(made[0]) & set(made[2])
    assert len(set(made[0])) == 8


@pytest.mark.parametrize("share", ["0", "0.5", "1"])
async def test_a_sampled_trial_is_sampled_whole(share: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", share)
    kept = Kept()
    tracing = tracing_to(kept)
    trials = [f"t{i}" for i in range(8)]
    async with stack(tracing=tracing) as s:
        for trial in trials:
            await two_turns(s, await s.open(trial))
            await s.supervisor.end_trial(trial, 1, Outcome.COMPLETED, None, "")
    spans = await told(tracing, kept)
    counted = {trial: len(spans.of_trial(trial)) for trial in trials}
    assert set(counted.values()) <= {0, 6}
    assert {"0": sum(counted.values()) == 0, "0.5": True, "1": sum(counted.values()) == 48}[share]


# Faults.


async def spent(x: Exchange) -> None:
    await x.reply(500, b'{"error": {"message": "m", "type": "t", "code": "turn_budget_spent", "param": null}}')


async def test_a_turn_whose_owner_is_lost_says_so_and_where_it_went():
    kept = Kept()
    tracing = tracing_to(kept)
    async with played(2, tracing=tracing) as s:
        s.owners[0].answers = [lost]
        assert (await s.chat()).status == 200
    (made,) = (await told(tracing, kept)).turns
    assert made.events == {
        c.ENGINE_LOST: {c.ENGINE: "e0", c.INCARNATION: 1},
        c.SESSION_MOVED: {c.ENGINE: "e1", c.INCARNATION: 1},
    }
    assert (made.of(c.ENGINE), made.failed) == ("e1", None)


async def test_a_turn_that_fails_is_an_error_with_the_code_that_its_client_got():
    kept = Kept()
    tracing = tracing_to(kept)
    async with played(1, tracing=tracing) as s:
        s.owners[0].answers = [spent]
        assert (await s.chat()).status == 500
        assert (await s.chat(headers={"idempotency-key": "k" * 999})).status == 400
    failed, refused = (await told(tracing, kept)).turns
    assert (failed.of(c.STATUS_CODE), failed.of(c.ERROR_TYPE), failed.failed) == (500, "turn_budget_spent", "turn_budget_spent")
    assert (refused.of(c.STATUS_CODE), refused.of(c.ERROR_TYPE), refused.failed) == (400, "id_too_long", None)


async def test_a_client_that_leaves_is_told_of():
    kept = Kept()
    tracing = tracing_to(kept)
    async with played(1, tracing=tracing) as s:
        owner: Owner = s.owners[0]
        owner.answers = [owner.held]
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.3):
                await s.chat()
        await owner.reported.wait()
        await until(lambda: not s.gateway.in_flight)
    (made,) = (await told(tracing, kept)).turns
    assert (made.of(c.CLIENT_LEFT), made.of(c.STATUS_CODE), made.failed) == (True, None, None)


# Nobody wants them.


QUIET = """
import asyncio, sys
sys.path.insert(0, "tests")
import aiohttp
from stack import KEYS, stack

async def main():
    async with stack() as s, aiohttp.ClientSession() as http:
        sid = await s.open("t")
        for text in "abc":
            url, body = f"{s.url}/sessions/{sid}/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "max_tokens": 8}
            async with http.post(url, json=body, headers={"authorization": f"Bearer {KEYS.session(sid)}"}) as answer:
                assert answer.status == 200
        return s.engine.calls

turns = asyncio.run(main())
print(turns, sorted(m for m in sys.modules if m.split(".")[0] == "opentelemetry"))
"""


def test_nothing_is_imported_where_nothing_is_traced():
    ended = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=50, check=False)
    assert ended.stdout.strip() == "3 []", ended.stderr


ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.mark.parametrize(
    ("mode", "env", "traced", "why"),
    [
        ("auto", {}, False, ""),
        ("off", ENDPOINT, False, ""),
        ("auto", {**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, False, ""),
        ("auto", {**ENDPOINT, "OTEL_SDK_DISABLED": "true"}, False, ""),
        ("on", {"OTEL_SDK_DISABLED": "True"}, False, "unset it"),
        ("auto", {**ENDPOINT, "OTEL_TRACES_EXPORTER": "console"}, False, "otlp alone"),
        ("auto", {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, False, "http/protobuf alone"),
        ("auto", ENDPOINT, True, ""),
        ("auto", {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c/v1/traces", "OTEL_SERVICE_NAME": "mine", "HOME": "/"}, True, ""),
        ("on", {}, True, ""),
    ],
)
def test_the_environment_says_whether_spans_are_sent(
    mode: str, env: dict[str, str], traced: bool, why: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rollout_ft.telemetry.tracing.installed", lambda: True)
    passed_on, hindrance = wanted(mode, env)
    assert passed_on == ({k: v for k, v in env.items() if k != "HOME"} if traced else None)
    assert why in hindrance
    assert bool(why) == bool(hindrance)


def test_an_exporter_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rollout_ft.telemetry.tracing.installed", lambda: False)
    passed_on, hindrance = wanted("auto", ENDPOINT)
    assert passed_on is None
    assert f"pip install '{EXTRA}'" in hindrance


# Nobody takes them.


def ended_spans(tracing: OTel, count: int) -> None:
    for i in range(count):
        tracing.turn(f"t{i}~1", [], chat=True).end(200)


def test_a_collector_that_hangs_holds_up_nothing_and_what_finds_no_room_is_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    go = threading.Event()

    def hang() -> SpanExportResult:
        go.wait(30)
        return SpanExportResult.SUCCESS

    kept = Kept(answer=hang)
    tracing = tracing_to(kept)
    ended_spans(tracing, 1000)
    came = tracing.dropped
    go.set()
    asyncio.run(tracing.flush(30))
    assert 1000 - 3 * 16 <= came < 1000
    assert len(kept.spans) + tracing.dropped == 1000


def test_a_collector_that_is_gone_is_one_warning_and_a_count(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    answers = [SpanExportResult.FAILURE, SpanExportResult.FAILURE, SpanExportResult.SUCCESS]
    sending = Sending(Kept(answer=lambda: answers.pop(0)))
    maker = Maker({}, sending)
    with caplog.at_level(logging.WARNING, "rollout_ft"):
        for expected in (5, 10, 10):
            for _ in range(5):
                maker.end(maker.begin("a span", ROOT, None, SpanKind.INTERNAL, {}))
            sending.force_flush()
            assert (sending.dropped, sending.failing) == (expected, bool(answers))
    said = [r.getMessage() for r in caplog.records if r.name == "rollout_ft"]
    assert [line.partition(":")[0].partition(" ")[0] for line in said] == ["tracing.failing", "tracing.recovered"]


async def test_the_run_counts_what_was_dropped():
    kept = Kept(answer=lambda: SpanExportResult.FAILURE)
    tracing = tracing_to(kept)
    async with stack(tracing=tracing) as s:
        await turn(s, await s.open("t"), [{"role": "user", "content": SAID}])
        await told(tracing, kept)
        assert s.gateway.readings().counts["spans_dropped",] == 2


def test_what_does_nothing_can_be_called_like_what_does():
    mine = {name for name in vars(Tracing) if not name.startswith("_")}
    assert mine <= {name for name in vars(OTel) if not name.startswith("_")}
    assert OFF.dropped == 0
