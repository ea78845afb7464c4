"""Spans as OTLP's messages: the library's own encoding says what they are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags, TraceState
from spans import collector

from rollout_ft.telemetry import encoding
from rollout_ft.telemetry.making import Attributes, Maker
from rollout_ft.telemetry.sending import Sending, otlp
from rollout_ft.types import Outcome

VALUES = st.one_of(
    st.text(max_size=8), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.sampled_from(Outcome),
    st.lists(st.text(max_size=8), max_size=3).map(tuple),
)  # fmt: skip
ATTRIBUTES = st.dictionaries(st.text(min_size=1, max_size=8), VALUES, max_size=6)
CONTEXTS = st.builds(
    SpanContext, st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans(), st.just(TraceFlags(TraceFlags.SAMPLED)),
    st.sampled_from([TraceState(), TraceState([("one", "1"), ("two", "2")])]),
)  # fmt: skip
ROOT = SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


class Ended(SpanProcessor):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


def batch(draw: Callable[[st.SearchStrategy[Any]], Any]) -> list[ReadableSpan]:
    ended = Ended()
    maker = Maker({"service.name": "rollout_ft", **draw(ATTRIBUTES)}, ended)
    for _ in range(draw(st.integers(1, 4))):
        links = [Link(context, draw(ATTRIBUTES)) for context in draw(st.lists(CONTEXTS, max_size=2))]
        parent, kind = draw(st.none() | CONTEXTS), draw(st.sampled_from(SpanKind))
        span = maker.begin(draw(st.text(max_size=8)), draw(CONTEXTS), parent, kind, draw(ATTRIBUTES), links=links)
        for name in draw(st.lists(st.text(max_size=8), max_size=2)):
            span.event(name, draw(ATTRIBUTES))
        maker.end(span, draw(st.sampled_from(["", "went wrong"])))
    return ended.spans


@given(st.data())
def test_a_batch_is_what_the_library_makes_of_it(data: st.DataObject):
    spans = batch(data.draw)
    assert encoding.encode(spans) == encode_spans(spans)


def made(attributes: Attributes, error: str = "") -> ReadableSpan:
    ended = Ended()
    maker = Maker({}, ended)
    maker.end(maker.begin("a span", ROOT, None, SpanKind.INTERNAL, attributes), error)
    return ended.spans[0]


def test_text_that_is_no_utf8_costs_nothing_else_of_the_batch():
    sent = encoding.encode([made({"good": "one"}), made({"bad\udc80": ("\ud800",), "good": 2}, "broken \udfff"), made({"good": "three"})])
    first, second, third = sent.resource_spans[0].scope_spans[0].spans
    assert [span.attributes[-1].key for span in (first, second, third)] == ["good"] * 3
    assert (second.attributes[0].key, second.attributes[0].value.array_value.values[0].string_value) == ("bad?", "?")
    assert second.status.message == "broken ?"


async def test_what_the_exporter_sends_is_encoded_so(monkeypatch: pytest.MonkeyPatch):
    batches: list[int] = []

    def counted(spans: list[ReadableSpan]) -> object:
        batches.append(len(spans))
        return encode(spans)

    encode = encoding.encode
    monkeypatch.setattr(encoding, "encode", counted)
    async with collector() as (url, received):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        sending = Sending(otlp())
        for number in range(3):
            sending.on_end(made({"number": number}))
        await asyncio.to_thread(sending.shutdown)
        assert batches == [3]
        assert sorted(span.of("number") for span in received) == [0, 1, 2]
