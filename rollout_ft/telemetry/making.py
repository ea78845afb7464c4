"""Spans, begun and ended.

Owns their ids, whether one is sampled, and what becomes of it when it ends. Made of the library's own parts, but not by its
tracer: that looks at every attribute and takes a lock for each, which costs a turn more than everything else about its spans.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AttributeValue

from rollout_ft.telemetry import conventions as c
from rollout_ft.telemetry.contexts import below

Attributes = dict[str, AttributeValue]
_SCOPE, _NEITHER = InstrumentationScope(c.SCOPE), Status()


@dataclass(slots=True)
class Open:
    """One that has not ended."""

    name: str
    context: SpanContext
    parent: SpanContext | None
    kind: SpanKind
    attributes: Attributes
    links: Sequence[Link]
    began: int
    events: list[Event] = field(default_factory=list[Event])

    def event(self, name: str, attributes: Attributes) -> None:
        self.events.append(Event(name, attributes, time.time_ns()))


class Maker:
    """The environment says what is sampled, and more about the `resource`."""

    def __init__(self, resource: Attributes, processor: SpanProcessor):
        self._resource = Resource.create(resource).merge(OTELResourceDetector().detect())
        self._sampler, self._processor = TracerProvider(resource=self._resource, shutdown_on_exit=False).sampler, processor

    def begin(
        self, name: str, context: SpanContext, parent: SpanContext | None, kind: SpanKind, attributes: Attributes, *,
        links: Sequence[Link] = (), began: int = 0,
    ) -> Open:  # fmt: skip
        """`context`: its own."""
        return Open(name, context, parent, kind, attributes, links, began or time.time_ns())

    @staticmethod
    def child(parent: SpanContext, flags: TraceFlags | None = None) -> SpanContext:
        """Below a span of ours, sampled as that is; `flags`: below an agent's."""
        flags = parent.trace_flags if flags is None else flags
        return SpanContext(parent.trace_id, random.getrandbits(64) or 1, is_remote=False, trace_flags=flags, trace_state=parent.trace_state)

    def flags(self, name: str, trace: int, parent: SpanContext | None) -> TraceFlags:
        result = self._sampler.should_sample(below(parent) if parent else Context(), trace, name)
        return TraceFlags(TraceFlags.SAMPLED if result.decision.is_sampled() else TraceFlags.DEFAULT)

    def end(self, span: Open, error: str = "") -> None:
        """With the words of its error, if it is one."""
        if not span.context.trace_flags.sampled:
            return
        status = Status(StatusCode.ERROR, error) if error else _NEITHER
        made = ReadableSpan(
            span.name, span.context, span.parent, self._resource, span.attributes, span.events, span.links, span.kind, status=status,
            start_time=span.began, end_time=time.time_ns(), instrumentation_scope=_SCOPE,
        )  # fmt: skip
        self._processor.on_end(made)
