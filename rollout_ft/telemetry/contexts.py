"""Where a span belongs: the ids of what outlives processes, and W3C's headers.

Owns how both are made and read. What an agent sends is anybody's word: a header that is not as the rules have it says nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterable
from hashlib import blake2b, sha256

from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import NonRecordingSpan, SpanContext, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

MAX_TRACEPARENT_CHARS, MAX_TRACESTATE_CHARS = 128, 512
"""A traceparent that is longer is none; of a tracestate so many have to be passed on, and no more need be."""
_PROPAGATOR, _TRACEPARENT, _TRACESTATE = TraceContextTextMapPropagator(), "traceparent", "tracestate"
_NAMES = {b"traceparent": _TRACEPARENT, b"tracestate": _TRACESTATE}


class Ids:
    """Of trials and attempts, made of their names and the run's secret: whoever holds that makes the same, and nobody else can."""

    def __init__(self, secret: str):
        self._key = sha256(secret.encode()).digest()

    def trace(self, trial_id: str) -> int:
        return self._made("trace", trial_id, 16)

    def span(self, name: str) -> int:
        """`name`: a trial's id, or a session's."""
        return self._made("span", name, 8)

    def _made(self, purpose: str, name: str, size: int) -> int:
        return int.from_bytes(blake2b(f"{purpose}:{name}".encode(), key=self._key, digest_size=size).digest(), "big") or 1


def sent(headers: Iterable[tuple[bytes, bytes]]) -> Context:
    """The span that a request says it is made in; an empty context where it says none."""
    carrier: dict[str, list[str]] = {}
    for name, value in headers:
        if name in _NAMES:
            carrier.setdefault(_NAMES[name], []).append(value.decode("latin-1"))
    parents = carrier.get(_TRACEPARENT, [])
    if len(parents) != 1 or len(parents[0]) > MAX_TRACEPARENT_CHARS:
        return Context()
    if sum(map(len, carrier.get(_TRACESTATE, []))) > MAX_TRACESTATE_CHARS:
        del carrier[_TRACESTATE]
    return _PROPAGATOR.extract(carrier, Context())


logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)  # it would log what an agent sends, with every request


def of(context: Context) -> SpanContext:
    return get_current_span(context).get_span_context()


def below(parent: SpanContext) -> Context:
    return set_span_in_context(NonRecordingSpan(parent), Context())


def headers_of(context: SpanContext) -> dict[str, str]:
    """What says that a request is made in this span."""
    state = {_TRACESTATE: context.trace_state.to_header()} if context.trace_state else {}
    return {_TRACEPARENT: f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}", **state}


@contextlib.contextmanager
def attached(context: Context) -> Generator[None]:
    """What is begun in this block, in tasks of their own as well, begins there."""
    token = attach(context)
    try:
        yield
    finally:
        detach(token)
