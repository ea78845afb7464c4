"""The way of spans to the collector.

Owns its limit, and the count of what is dropped. A turn never waits here: what has ended goes into a queue, a thread of the
library sends it. A collector that is gone costs what it does not take, and one line in the log when it goes and when it is back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
_log = logging.getLogger("rollout_ft")


def otlp() -> SpanExporter:
    """The exporter that the environment describes, with an encoding that costs a third of its own. Raises ImportError."""
    from opentelemetry.exporter.otlp.proto.http import trace_exporter

    from rollout_ft.telemetry.encoding import encode

    # It looks for its own here; a version that does not has the cost, and the same messages.
    trace_exporter.encode_spans = encode  # pyright: ignore[reportPrivateImportUsage]
    return trace_exporter.OTLPSpanExporter()


class Sending(BatchSpanProcessor):
    """Of what comes while the queue is full the newest is dropped, and counted."""

    def __init__(self, exporter: SpanExporter):
        self._room = _number("OTEL_BSP_MAX_QUEUE_SIZE", 2048)
        batch = min(_number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512), self._room)
        self._told, self._ended, self._full = Told(exporter), 0, 0
        super().__init__(self._told, self._room, _number("OTEL_BSP_SCHEDULE_DELAY", 5000), batch)

    @property
    def dropped(self) -> int:
        return self._full + self._told.refused

    @property
    def failing(self) -> bool:
        return self._told.failing

    def on_end(self, span: ReadableSpan) -> None:
        if self._ended - self._told.taken >= self._room:
            self._full += 1
            return
        self._ended += 1
        super().on_end(span)


class Told(SpanExporter):
    """An exporter whose failures are counted, and said once until it succeeds again; on the thread that sends."""

    def __init__(self, exporter: SpanExporter):
        self._exporter, self._words = exporter, _Words()
        self.taken = self.refused = 0
        self.failing = False
        logger = logging.getLogger(_EXPORTER)
        logger.handlers, logger.propagate = [self._words], False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        try:
            result = self._exporter.export(spans)
        except Exception as e:
            result, self._words.last = SpanExportResult.FAILURE, repr(e)
        failing = result is not SpanExportResult.SUCCESS
        if failing:
            self.refused += len(spans)
        if failing and not self.failing:
            _log.warning("tracing.failing: spans are dropped until the collector takes them again: %s", self._words.last)
        elif self.failing and not failing:
            _log.warning("tracing.recovered dropped=%d", self.refused)
        self.failing = failing
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


class _Words(logging.Handler):
    """What the exporter said last."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


def _number(name: str, default: int) -> int:
    try:
        return max(1, int(os.environ.get(name, default)))
    except ValueError:
        return default
