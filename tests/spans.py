"""Spans as tests look at them: kept in memory, or received as OTLP over HTTP by a collector on this machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import StatusCode

from rollout_ft.telemetry import conventions as c


@dataclass(frozen=True)
class Span:
    """`parent` is 0 for a root; `failed` tells the error of its status, if that is one."""

    name: str
    trace: int
    id: int
    parent: int
    attributes: dict[str, Any]
    events: dict[str, dict[str, Any]]
    links: list[int]
    failed: str | None
    began: int
    ended: int
    process: str = ""

    def of(self, name: str) -> Any:
        return self.attributes.get(name)


class Spans(list[Span]):
    def named(self, name: str) -> list[Span]:
        return sorted((s for s in self if s.name.startswith(name)), key=lambda s: s.began)

    @property
    def trials(self) -> list[Span]:
        return self.named(c.TRIAL_SPAN)

    @property
    def attempts(self) -> list[Span]:
        return sorted(self.named(c.ATTEMPT_SPAN), key=lambda s: s.of(c.ATTEMPT))

    @property
    def turns(self) -> list[Span]:
        return self.named(c.CHAT)

    @property
    def generations(self) -> list[Span]:
        return self.named(c.COMPLETION)

    def below(self, span: Span) -> list[Span]:
        return [s for s in self if s.parent == span.id]

    def of_trial(self, trial_id: str) -> Spans:
        """All spans of the traces that have one of this trial."""
        traces = {s.trace for s in self if s.of(c.TRIAL) == trial_id}
        return Spans(s for s in self if s.trace in traces)

    def check_whole(self) -> None:
        """One root, no id twice, and nobody's parent is missing."""
        ids = [s.id for s in self]
        assert len(ids) == len(set(ids)), sorted(s.name for s in self)
        assert [s.name for s in self if not s.parent] == [c.TRIAL_SPAN]
        assert not [s.name for s in self if s.parent and s.parent not in ids]


@dataclass
class Kept(SpanExporter):
    """An exporter that keeps what it is given. `answer` is what it says to that."""

    spans: Spans = field(default_factory=Spans)
    answer: Callable[[], SpanExportResult] = lambda: SpanExportResult.SUCCESS

    def export(self, spans: Any) -> SpanExportResult:
        self.spans += [_of_sdk(span) for span in spans]
        return self.answer()

    def shutdown(self) -> None: ...


def _of_sdk(span: ReadableSpan) -> Span:
    context = span.get_span_context()
    assert context is not None
    failed = span.status.description or "" if span.status.status_code is StatusCode.ERROR else None
    events = {e.name: dict(e.attributes or {}) for e in span.events}
    parent, links = span.parent.span_id if span.parent else 0, [link.context.span_id for link in span.links]
    attributes = dict(span.attributes or {})
    return Span(
        span.name, context.trace_id, context.span_id, parent, attributes, events, links, failed, span.start_time or 0, span.end_time or 0
    )


@contextlib.asynccontextmanager
async def collector() -> AsyncIterator[tuple[str, Spans]]:
    """Its URL, and what it has received."""
    received = Spans()

    async def traces(request: web.Request) -> web.Response:
        message = ExportTraceServiceRequest.FromString(await request.read())
        received.extend(_of_otlp(message))
        return web.Response(body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf")

    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/traces", traces)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", received
    finally:
        await runner.cleanup()


def _of_otlp(message: Any) -> list[Span]:
    def number(raw: bytes) -> int:
        return int.from_bytes(raw, "big")

    return [
        Span(
            s.name, number(s.trace_id), number(s.span_id), number(s.parent_span_id), _values(s.attributes),
            {e.name: _values(e.attributes) for e in s.events}, [number(link.span_id) for link in s.links],
            s.status.message if s.status.code == 2 else None, s.start_time_unix_nano, s.end_time_unix_nano,
            _values(of.resource.attributes).get(c.INSTANCE, ""),
        )
        for of in message.resource_spans
        for scope in of.scope_spans
        for s in scope.spans
    ]  # fmt: skip


def _values(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value") or "string_value") for a in attributes}


async def until(condition: Callable[[], bool]) -> None:
    """Returns when it holds; the test's time limit is the limit."""
    while not condition():
        await asyncio.sleep(0.02)
