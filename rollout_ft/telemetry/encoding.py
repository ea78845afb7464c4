"""Spans as the messages of OTLP.

Owns the one step of sending whose cost follows the spans: the library's own encoding calls Python for every attribute, this one
calls protobuf once a span. The subtle invariant: what is made is what the library makes, field for field; only text that is no
UTF-8, which costs its attribute there or the whole batch, is sent with `?` in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind

Message = dict[str, Any]
"""A message's fields, as protobuf takes them."""
_KINDS = {kind: kind.value + 1 for kind in SpanKind}
_FIELDS: dict[type[Any], str] = {str: "string_value", bool: "bool_value", int: "int_value", float: "double_value"}
_HAS_IS_REMOTE, _IS_REMOTE = 0x100, 0x200
"""In the flags of a span, about its parent, and in those of a link: `SpanFlags` of opentelemetry/proto/trace/v1/trace.proto."""


def encode(spans: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
    """A batch of spans of one `Maker`: all of one resource and scope."""
    resource, scope = spans[0].resource, cast(InstrumentationScope, spans[0].instrumentation_scope)
    request = ExportTraceServiceRequest()
    of_resource = request.resource_spans.add(resource={"attributes": _attributes(resource.attributes)}, schema_url=resource.schema_url)
    encoded = of_resource.scope_spans.add(scope={"name": scope.name}).spans
    for message in map(_span, spans):
        try:
            encoded.add(**message)
        except UnicodeEncodeError:
            encoded.add(**_in_utf8(message))
    return request


def _span(span: ReadableSpan) -> Message:
    mine, parent = cast(SpanContext, span.context), span.parent
    return {
        "trace_id": mine.trace_id.to_bytes(16), "span_id": mine.span_id.to_bytes(8), "trace_state": mine.trace_state.to_header(),
        "parent_span_id": parent.span_id.to_bytes(8) if parent else b"", "flags": _flags(parent),
        "name": span.name, "kind": _KINDS[span.kind], "start_time_unix_nano": span.start_time, "end_time_unix_nano": span.end_time,
        "attributes": _attributes(span.attributes),
        "events": [{"name": e.name, "time_unix_nano": e.timestamp, "attributes": _attributes(e.attributes)} for e in span.events],
        "links": [
            {
                "trace_id": at.context.trace_id.to_bytes(16), "span_id": at.context.span_id.to_bytes(8),
                "attributes": _attributes(at.attributes), "flags": _flags(at.context),
            }
            for at in span.links
        ],
        "status": {"code": span.status.status_code.value, "message": span.status.description},
    }  # fmt: skip


def _flags(context: SpanContext | None) -> int:
    return _HAS_IS_REMOTE | (_IS_REMOTE if context and context.is_remote else 0)


def _attributes(attributes: Mapping[str, Any] | None) -> list[Message]:
    return [{"key": key, "value": _value(value)} for key, value in (attributes or {}).items()]


def _value(value: Any) -> Message:
    field = _FIELDS.get(value.__class__)
    if field is not None:
        return {field: value}
    if isinstance(value, str):  # one of our enumerations
        return {"string_value": str(value)}
    return {"array_value": {"values": [_value(item) for item in value]}}


def _in_utf8(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if isinstance(value, dict):
        return {name: _in_utf8(of) for name, of in cast(Message, value).items()}
    return [_in_utf8(item) for item in cast(list[Any], value)] if isinstance(value, list) else value
