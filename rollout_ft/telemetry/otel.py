"""Spans by OpenTelemetry.

Owns what each span carries, and when it begins and ends. It and what it is made of are imported where spans are exported, and
nowhere else. Tokens are in `gen_ai.usage` of turns alone: whoever adds that up over all spans counts each once.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import lru_cache

import orjson
from opentelemetry.context import get_current
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.trace import Link, SpanContext, SpanKind

from rollout_ft.clock import monotonic
from rollout_ft.config import Config
from rollout_ft.engine.generation import Generation
from rollout_ft.session.freshness import DIVERGED
from rollout_ft.session.session import Session
from rollout_ft.telemetry import conventions as c
from rollout_ft.telemetry.contexts import Ids, attached, headers_of, of, sent
from rollout_ft.telemetry.making import Attributes, Maker, Open
from rollout_ft.telemetry.sending import Sending, otlp
from rollout_ft.telemetry.tracing import NO_CALL, USAGE, CallSpan, Tracing, TurnSpan
from rollout_ft.types import JSON, UNSAID, Outcome, Why, split_session_id

MAX_CAUSE_CHARS = 500
_KIND = re.compile(r"[\w .]{1,64}")
MAX_KNOWN = 16_384
"""Attempts whose ids need not be made again."""
_HEADERS = {
    "x-rollout-ft-outcome": c.OUTCOME, "x-rollout-ft-turn": c.TURN, "x-rft-depth": c.DEPTH, "x-rollout-ft-generations": c.GENERATIONS,
    "x-rollout-ft-weight-version": c.WEIGHT_VERSION,
}  # fmt: skip
"""Of an owner's reply."""
_NUMBERS = (c.DEPTH, c.GENERATIONS)
_FAULTS = ("infra", "environment", "agent")
"""Of the reasons for another attempt."""
_GOOD = (Outcome.COMPLETED, Outcome.TRUNCATED)


class OTel(Tracing):
    def __init__(self, config: Config, secret: str, instance: str, exporter: SpanExporter):
        self._ids, self._sending = Ids(secret), Sending(exporter)
        self._model, self._kind = config.model.name, config.engine.kind
        self._maker = Maker({c.SERVICE: "rollout_ft", c.INSTANCE: instance, c.RUN: config.run}, self._sending)
        _, self._role, incarnation = instance.rsplit("/", 2)
        self._incarnation = int(incarnation)
        self._attempt = lru_cache(MAX_KNOWN)(self._attempt_of)

    @classmethod
    def exporting(cls, config: Config, secret: str, instance: str) -> OTel:
        """Raises ImportError."""
        return cls(config, secret, instance, otlp())

    # -- turns and generations ------------------------------------------------------------------------------------

    def turn(self, sid: str, headers: Iterable[tuple[bytes, bytes]], *, chat: bool) -> TurnSpan:
        trial_id, attempt = split_session_id(sid) or ("", 0)
        home, agents, operation = self._attempt(sid), of(sent(headers)), c.CHAT if chat else c.COMPLETION
        name = f"{operation} {self._model}"
        if agents.is_valid:
            parent, mine = agents, self._maker.child(agents, self._maker.flags(name, agents.trace_id, agents))
        else:
            parent, mine = home, self._maker.child(home)
        elsewhere = (Link(home),) if parent.trace_id != home.trace_id else ()
        attributes: Attributes = {
            c.OPERATION: operation, c.PROVIDER: c.SCOPE, c.REQUEST_MODEL: self._model, c.CONVERSATION: sid, c.TRIAL: trial_id,
            c.ATTEMPT: attempt,
        }  # fmt: skip
        return _Turn(self._maker, self._maker.begin(name, mine, parent, SpanKind.SERVER, attributes, links=elsewhere))

    def under(self, headers: Mapping[bytes, bytes]) -> AbstractContextManager[None]:
        return attached(sent(headers.items()))

    def call(self, generation: Generation) -> CallSpan:
        parent = of(get_current())
        if not parent.is_valid:
            return NO_CALL
        order, kept = generation.order, len(generation.ids)
        attributes: Attributes = {
            c.OPERATION: c.COMPLETION, c.PROVIDER: self._kind, c.REQUEST_MODEL: self._model, c.ENGINE: self._role,
            c.REQUEST_MAX_TOKENS: order.max_new_tokens - kept, c.INCARNATION: self._incarnation,
            c.TURN: order.turn_key.rpartition("/")[2], c.GENERATION: generation.calls + 1, c.REUSED: kept,
        }  # fmt: skip
        span = self._maker.begin(f"{c.COMPLETION} {self._model}", self._maker.child(parent), parent, SpanKind.CLIENT, attributes)
        return _Call(self._maker, span, generation)

    # -- trials and attempts --------------------------------------------------------------------------------------

    def attempt_ended(self, session: Session, why: Why = UNSAID) -> None:
        ended, sid, cause = session.ended, session.id, _cause(session, why)
        attributes: Attributes = {
            c.OPERATION: c.AGENT, c.CONVERSATION: sid, **_of_spec(session), c.ATTEMPT: session.attempt, c.CAUSE: cause,
            c.TURNS: len(session.evidence.asked), **({c.REASON: why.reason} if why.reason else {}),
        }  # fmt: skip
        failed = why.reason in _FAULTS if ended is None else ended.outcome not in _GOOD
        error = (cause or "failed") if failed else ""
        self._tell(c.ATTEMPT_SPAN, self._attempt(sid), self._trial(session.spec.trial_id), attributes, session.attempt_began, error)

    def trial_ended(self, session: Session, counted: JSON) -> None:
        ended, trial_id = session.ended, session.spec.trial_id
        if ended is None:
            return
        attributes: Attributes = {
            c.OPERATION: c.WORKFLOW, **_of_spec(session), c.OUTCOME: ended.outcome.value, c.CAUSE: _cause(session),
            c.ATTEMPTS: session.attempt, c.TURNS: counted["turns_in_trajectory"], c.GENERATED: counted["tokens_generated"],
            c.WASTED: counted["tokens_wasted"], c.REUSED: counted["tokens_reused"],
            **({} if ended.reward is None else {c.REWARD: ended.reward}),
        }  # fmt: skip
        error = "" if ended.outcome in _GOOD else f"{ended.outcome}: {_cause(session)}"
        self._tell(c.TRIAL_SPAN, self._trial(trial_id), None, attributes, session.began, error)

    def traceparent(self, sid: str) -> str:
        return headers_of(self._attempt(sid))["traceparent"]

    def _tell(self, name: str, mine: SpanContext, parent: SpanContext | None, made: Attributes, began_s: int, error: str) -> None:
        self._maker.end(self._maker.begin(name, mine, parent, SpanKind.INTERNAL, made, began=began_s * 10**9), error)

    def _trial(self, trial_id: str) -> SpanContext:
        return self._context(trial_id, trial_id)

    def _attempt_of(self, sid: str) -> SpanContext:
        return self._context((split_session_id(sid) or (sid, 0))[0], sid)

    def _context(self, trial_id: str, name: str) -> SpanContext:
        """Of a span that may be another process's, sampled as that decides: by the trace's id alone."""
        trace = self._ids.trace(trial_id)
        flags = self._maker.flags(c.TRIAL_SPAN, trace, None)
        return SpanContext(trace, self._ids.span(name), is_remote=True, trace_flags=flags)

    # -- the way out ----------------------------------------------------------------------------------------------

    @property
    def dropped(self) -> int:
        return self._sending.dropped

    async def flush(self, within_s: float) -> None:
        if not self._sending.failing:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await asyncio.to_thread(self._sending.force_flush)


class _Turn(TurnSpan):
    def __init__(self, maker: Maker, span: Open):
        self._maker, self._span = maker, span
        self._lost, self._error, self._status = ("", 0), "", 0

    def pass_on(self, headers: dict[bytes, bytes]) -> None:
        mine = headers_of(self._span.context)
        headers |= {name.encode(): value.encode("latin-1") for name, value in mine.items()}

    def asked(self, engine_id: str, incarnation: int) -> None:
        engine: Attributes = {c.ENGINE: engine_id, c.INCARNATION: incarnation}
        if self._lost not in (("", 0), (engine_id, incarnation)):
            self._span.event(c.SESSION_MOVED, engine)
        self._span.attributes |= engine

    def owner_lost(self, engine_id: str, incarnation: int, in_flight: bool) -> None:
        self._lost = engine_id, incarnation
        if in_flight:
            self._span.event(c.ENGINE_LOST, {c.ENGINE: engine_id, c.INCARNATION: incarnation})

    def answered(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        if status != 200:
            return self.refused(status, _code(body))
        usage = dict(zip((c.INPUT_TOKENS, c.OUTPUT_TOKENS, c.REUSED), map(int, headers.get(USAGE.decode(), "").split()), strict=False))
        known = {name: headers[header] for header, name in _HEADERS.items() if header in headers}
        self._span.attributes |= {**usage, **{k: int(v) if k in _NUMBERS else v for k, v in known.items()}}

    def refused(self, status: int, code: str) -> None:
        self._error, self._status = code, status

    def end(self, status: int) -> None:
        status = status or self._status
        self._span.attributes |= {c.STATUS_CODE: status} if status else {c.CLIENT_LEFT: True}
        if self._error:
            self._span.attributes[c.ERROR_TYPE] = self._error
        self._maker.end(self._span, self._error if self._status >= 500 else "")


class _Call(CallSpan):
    def __init__(self, maker: Maker, span: Open, generation: Generation):
        self._maker, self._span, self._generation = maker, span, generation
        self._kept, self._began = len(generation.ids), monotonic()
        self._resumes = generation.calls > 0 and not generation.rid  # what another owner had begun

    def when_answered(self, answered: Callable[[], None]) -> Callable[[], None]:
        def told() -> None:
            answered()
            self._span.attributes[c.FIRST_CHUNK_S] = monotonic() - self._began
            if self._resumes:
                self._span.event(c.SESSION_RESUMED, {c.REUSED: self._kept})

        return told

    def end(self, outcome: str, cause: str) -> None:
        g, told, failed = self._generation, self._span.attributes, outcome in ("lost", "refused")
        told |= {c.OUTCOME: outcome, c.RID: g.rid, c.SAMPLED: max(0, len(g.ids) - self._kept)}
        if g.spans:
            told[c.WEIGHT_VERSION] = g.spans[-1].version
        if g.finish:
            told[c.FINISH_REASONS] = (g.finish,)
        if cause:
            told[c.CAUSE] = cause[:MAX_CAUSE_CHARS]
        if failed:
            told[c.ERROR_TYPE] = outcome
        self._maker.end(self._span, (cause or outcome)[:MAX_CAUSE_CHARS] if failed else "")


def _cause(session: Session, why: Why = UNSAID) -> str:
    """Why the attempt ended. What an agent or its tools raised may have anything in it, as may what a replay differs in: of
    these it is the kind alone."""
    ended = session.ended
    cause = ended.cause if ended else session.fault or why.cause
    told = ended.outcome in (Outcome.AGENT_FAILED, Outcome.ENV_FAILED) if ended else why.reason in ("agent", "environment")
    if not told and not cause.startswith(DIVERGED):
        return cause[:MAX_CAUSE_CHARS]
    kind = cause.partition(": ")[0]
    return kind if _KIND.fullmatch(kind) else (ended.outcome.value if ended else why.reason)


def _of_spec(session: Session) -> dict[str, str]:
    spec = session.spec
    return {c.TRIAL: spec.trial_id, c.TASK: spec.task_id, c.GROUP: spec.group_id, c.MODE: spec.mode}


def _code(body: bytes) -> str:
    """Of an error's body, in either dialect."""
    try:
        error: JSON = orjson.loads(body)["error"]
        return str(error.get("code") or error["type"])
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return "unknown"
