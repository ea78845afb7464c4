"""What a run tells of itself: metrics, spans, events.

Owns the keys `telemetry.…`. Where spans are sent is not among them: OpenTelemetry's own variables say that.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rollout_ft.config.base import Settings


class TelemetryConfig(Settings):
    metrics: bool = True
    """Turns are counted and timed, for Ray's Prometheus endpoint and `run.metrics()`; without, both are empty."""
    tracing: Literal["auto", "on", "off"] = "auto"
    """OpenTelemetry spans of trials, attempts, turns and engine calls, which `rollout-ft[tracing]` sends where the standard
    environment variables say (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_BSP_MAX_QUEUE_SIZE, …), those of the process
    that starts the run: `auto` where they name an endpoint; `on` without one sends to this machine."""
    max_events_bytes: int = Field(default=256 * 2**20, ge=4 * 2**20)
    """How much of a disk the events of a run may take; of older ones the account is kept, which is as long as what is under way, and
    comes on top: so it may not be less than 4 MiB."""
