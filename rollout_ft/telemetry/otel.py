"""Spans by OpenTelemetry.

Owns what each span carries, and when it begins and ends. It and what it is made of are imported where spans are exported, and
nowhere else. Tokens are in `gen_ai.usage` of turns alone: whoever adds that up over all spans counts each once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager

import orjson
from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags, get_current_span

from rollout_ft.clock import monotonic
from rollout_ft.config import Config
from rollout_ft.engine.generation import Generation
from rollout_ft.session.freshness import DIVERGED
from rollout_ft.session.session import Session
from rollout_ft.telemetry import conventions as c
from rollout_ft.telemetry.contexts import Ids, attached, below, headers_of, of, sent
from rollout_ft.telemetry.sending import Sending, otlp
from rollout_ft.telemetry.tracing import NO_CALL, USAGE, CallSpan, Tracing, TurnSpan
from rollout_ft.types import JSON, Outcome, split_session_id

MAX_CAUSE_CHARS = 500
_HEADERS = {
    "x-rollout-ft-outcome": c.OUTCOME, "x-rollout-ft-turn": c.TURN, "x-rft-depth": c.DEPTH, "x-rollout-ft-generations": c.GENERATIONS,
    "x-rollout-ft-weight-version": c.WEIGHT_VERSION,
}  # fmt: skip
"""Of an owner's reply."""
_NUMBERS = (c.DEPTH, c.GENERATIONS)
_GOOD = (Outcome.COMPLETED, Outcome.TRUNCATED)


class OTel(Tracing):
    def __init__(self, config: Config, secret: str, instance: str, exporter: SpanExporter):
        self._ids, self._sending = Ids(secret), Sending(exporter)
        self._model, self._kind = config.model.name, config.engine.kind
        self._provider = TracerProvider(resource=_resource(config.run, instance), shutdown_on_exit=False, id_generator=self._ids)
        self._provider.add_span_processor(self._sending)
        self._tracer = self._provider.get_tracer(c.SCOPE)
        _, self._role, incarnation = instance.rsplit("/", 2)
        self._incarnation = int(incarnation)

    @classmethod
    def exporting(cls, config: Config, secret: str, instance: str) -> OTel:
        """Raises ImportError."""
        return cls(config, secret, instance, otlp())

    # -- turns and generations ------------------------------------------------------------------------------------

    def turn(self, sid: str, headers: Iterable[tuple[bytes, bytes]], *, chat: bool) -> TurnSpan:
        trial_id, attempt = split_session_id(sid) or ("", 0)
        home, agents, operation = self._attempt(sid), of(sent(headers)), c.CHAT if chat else c.COMPLETION
        parent = agents if agents.is_valid else home
        elsewhere = [Link(home)] if parent.trace_id != home.trace_id else []
        attributes = {
            c.OPERATION: operation, c.PROVIDER: c.SCOPE, c.REQUEST_MODEL: self._model, c.CONVERSATION: sid, c.TRIAL: trial_id,
            c.ATTEMPT: attempt,
        }  # fmt: skip
        name = f"{operation} {self._model}"
        return _Turn(self._tracer.start_span(name, below(parent), SpanKind.SERVER, attributes, elsewhere))

    def under(self, headers: Mapping[bytes, bytes]) -> AbstractContextManager[None]:
        return attached(sent(headers.items()))

    def call(self, generation: Generation) -> CallSpan:
        if not get_current_span().get_span_context().is_valid:
            return NO_CALL
        order, kept = generation.order, len(generation.ids)
        attributes = {
            c.OPERATION: c.COMPLETION, c.PROVIDER: self._kind, c.REQUEST_MODEL: self._model, c.ENGINE: self._role,
            c.REQUEST_MAX_TOKENS: order.max_new_tokens - kept, c.INCARNATION: self._incarnation,
            c.TURN: order.turn_key.rpartition("/")[2], c.GENERATION: generation.calls + 1, c.REUSED: kept,
        }  # fmt: skip
        span = self._tracer.start_span(f"{c.COMPLETION} {self._model}", kind=SpanKind.CLIENT, attributes=attributes)
        return _Call(span, generation)

    # -- trials and attempts --------------------------------------------------------------------------------------

    def attempt_ended(self, session: Session) -> None:
        ended, sid, cause = session.ended, session.id, _cause(session)
        attributes = {
            c.OPERATION: c.AGENT, c.CONVERSATION: sid, **_of_spec(session), c.ATTEMPT: session.attempt, c.CAUSE: cause,
            c.TURNS: len(session.evidence.asked),
        }  # fmt: skip
        failed = ended is None or ended.outcome not in _GOOD
        self._ids.give(self._ids.span(sid))
        parent = self._context(session.spec.trial_id, session.spec.trial_id)
        span = self._tracer.start_span(c.ATTEMPT_SPAN, below(parent), attributes=attributes, start_time=session.attempt_began * 10**9)
        _end(span, (cause or "failed") if failed else "")

    def trial_ended(self, session: Session, counted: JSON) -> None:
        ended, trial_id = session.ended, session.spec.trial_id
        if ended is None:
            return
        attributes = {
            c.OPERATION: c.WORKFLOW, **_of_spec(session), c.OUTCOME: ended.outcome.value, c.CAUSE: _cause(session),
            c.ATTEMPTS: session.attempt, c.TURNS: counted["turns_in_trajectory"], c.GENERATED: counted["tokens_generated"],
            c.WASTED: counted["tokens_wasted"], c.REUSED: counted["tokens_reused"],
            **({} if ended.reward is None else {c.REWARD: ended.reward}),
        }  # fmt: skip
        self._ids.give(self._ids.span(trial_id), self._ids.trace(trial_id))
        span = self._tracer.start_span(c.TRIAL_SPAN, Context(), attributes=attributes, start_time=session.began * 10**9)
        _end(span, "" if ended.outcome in _GOOD else f"{ended.outcome}: {_cause(session)}")

    def traceparent(self, sid: str) -> str:
        return headers_of(self._attempt(sid))["traceparent"]

    def _attempt(self, sid: str) -> SpanContext:
        return self._context((split_session_id(sid) or (sid, 0))[0], sid)

    def _context(self, trial_id: str, name: str) -> SpanContext:
        """Of a span that may be another process's, sampled as that decides: by the trace's id alone."""
        trace = self._ids.trace(trial_id)
        sampled = self._provider.sampler.should_sample(Context(), trace, c.TRIAL_SPAN).decision.is_sampled()
        flags = TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT
        return SpanContext(trace, self._ids.span(name), is_remote=True, trace_flags=TraceFlags(flags))

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
    def __init__(self, span: Span):
        self._span, self._lost, self._error, self._status = span, ("", 0), "", 0

    def pass_on(self, headers: dict[bytes, bytes]) -> None:
        mine = headers_of(self._span.get_span_context())
        headers |= {name.encode(): value.encode("latin-1") for name, value in mine.items()}

    def asked(self, engine_id: str, incarnation: int) -> None:
        engine: dict[str, str | int] = {c.ENGINE: engine_id, c.INCARNATION: incarnation}
        if self._lost not in (("", 0), (engine_id, incarnation)):
            self._span.add_event(c.SESSION_MOVED, engine)
        self._span.set_attributes(engine)

    def owner_lost(self, engine_id: str, incarnation: int, in_flight: bool) -> None:
        self._lost = engine_id, incarnation
        if in_flight:
            self._span.add_event(c.ENGINE_LOST, {c.ENGINE: engine_id, c.INCARNATION: incarnation})

    def answered(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        if status != 200:
            return self.refused(status, _code(body))
        usage = dict(zip((c.INPUT_TOKENS, c.OUTPUT_TOKENS, c.REUSED), map(int, headers.get(USAGE.decode(), "").split()), strict=False))
        known = {name: headers[header] for header, name in _HEADERS.items() if header in headers}
        self._span.set_attributes({**usage, **{k: int(v) if k in _NUMBERS else v for k, v in known.items()}})

    def refused(self, status: int, code: str) -> None:
        self._error, self._status = code, status

    def end(self, status: int) -> None:
        status = status or self._status
        self._span.set_attributes({c.STATUS_CODE: status} if status else {c.CLIENT_LEFT: True})
        if self._error:
            self._span.set_attribute(c.ERROR_TYPE, self._error)
        _end(self._span, self._error if self._status >= 500 else "")


class _Call(CallSpan):
    def __init__(self, span: Span, generation: Generation):
        self._span, self._generation = span, generation
        self._kept, self._began = len(generation.ids), monotonic()
        self._resumes = generation.calls > 0 and not generation.rid  # what another owner had begun

    def when_answered(self, answered: Callable[[], None]) -> Callable[[], None]:
        def told() -> None:
            answered()
            self._span.set_attribute(c.FIRST_CHUNK_S, monotonic() - self._began)
            if self._resumes:
                self._span.add_event(c.SESSION_RESUMED, {c.REUSED: self._kept})

        return told

    def end(self, outcome: str, cause: str) -> None:
        g = self._generation
        self._span.set_attributes({c.OUTCOME: outcome, c.RID: g.rid, c.SAMPLED: max(0, len(g.ids) - self._kept)})
        if g.spans:
            self._span.set_attribute(c.WEIGHT_VERSION, g.spans[-1].version)
        if g.finish:
            self._span.set_attribute(c.FINISH_REASONS, (g.finish,))
        if cause:
            self._span.set_attribute(c.CAUSE, cause[:MAX_CAUSE_CHARS])
        failed = outcome in ("lost", "refused")
        if failed:
            self._span.set_attribute(c.ERROR_TYPE, outcome)
        _end(self._span, cause or outcome if failed else "")


def _end(span: Span, error: str) -> None:
    if error:
        span.set_status(Status(StatusCode.ERROR, error[:MAX_CAUSE_CHARS]))
    span.end()


def _cause(session: Session) -> str:
    """Why the attempt ended. What an agent or its tools raised may have anything in it, as may what a replay differs in: of
    these it is the kind alone."""
    ended = session.ended
    cause = ended.cause if ended else session.fault or "another attempt took its place"
    told = ended is not None and ended.outcome in (Outcome.AGENT_FAILED, Outcome.ENV_FAILED)
    return (cause.partition(": ")[0] if told or cause.startswith(DIVERGED) else cause)[:MAX_CAUSE_CHARS]


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


def _resource(run: str, instance: str) -> Resource:
    """What the environment says of it wins."""
    ours = Resource.create({c.SERVICE: "rollout_ft", c.INSTANCE: instance, c.RUN: run})
    return ours.merge(OTELResourceDetector().detect())
