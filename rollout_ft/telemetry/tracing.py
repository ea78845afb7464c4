"""Spans of what happens to a trial: trial → attempt → turn → generation.

Owns what is told when, and whether anybody is told. The classes here are the twins that do nothing: whoever traces calls them
without asking, and no part of OpenTelemetry is imported for them. What does something is in `otel`, chosen once when an actor
starts. No span has anything in it of what was said.

The subtle invariant: a span is made by one process, where what it tells of ends. Trials and attempts outlive processes; their
ids are made of their names, so that turns hang below them wherever they are made, and they themselves are told of when the
store has their end.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from rollout_ft.types import JSON, UNSAID, Why

if TYPE_CHECKING:
    from rollout_ft.engine.generation import Generation
    from rollout_ft.session.session import Session

USAGE = b"x-rft-usage"
"""Of an owner's reply to a gateway that traces: tokens of the prompt, sampled, and of these reused."""
TRACEPARENT = b"traceparent"
EXTRA = "rollout-ft[tracing]"
LOST_FLUSH_S, LAST_FLUSH_S = 0.25, 2.0
"""How long the last spans of a process are waited for: where others wait for its end, and where nobody does."""
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_log = logging.getLogger("rollout_ft")


class TurnSpan:
    """One request for a turn, at the gateway."""

    def pass_on(self, headers: dict[bytes, bytes]) -> None:
        """Into the headers of the call to the session's owner."""

    def asked(self, engine_id: str, incarnation: int) -> None:
        """Who owns the session, as far as is known."""

    def owner_lost(self, engine_id: str, incarnation: int, in_flight: bool) -> None:
        """The owner cannot be reached, or says that it is none; `in_flight`: the call had begun there."""

    def answered(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """What there is for the client."""

    def refused(self, status: int, code: str) -> None:
        """What the client is told, where no owner said so."""

    def end(self, status: int) -> None:
        """The request is over; with status 0, and not refused, its client had left."""


class CallSpan:
    """One call of an engine."""

    def when_answered(self, answered: Callable[[], None]) -> Callable[[], None]:
        """The same, told of the first token as well."""
        return answered

    def end(self, outcome: str, cause: str) -> None:
        """`outcome` as in the metric `generations`."""


NO_TURN, NO_CALL, _NOWHERE = TurnSpan(), CallSpan(), nullcontext()


class Tracing:
    """Nobody is told."""

    def turn(self, sid: str, headers: Iterable[tuple[bytes, bytes]], *, chat: bool) -> TurnSpan:
        """A request for a turn has come in, with these headers; `chat`: in messages."""
        return NO_TURN

    def under(self, headers: Mapping[bytes, bytes]) -> AbstractContextManager[None]:
        """What is begun in this block belongs to the turn that the gateway's headers name."""
        return _NOWHERE

    def call(self, generation: Generation) -> CallSpan:
        """An engine is about to be called for this."""
        return NO_CALL

    def attempt_ended(self, session: Session, why: Why = UNSAID) -> None:
        """The store has the end of the session's attempt; `why` another follows, where one does."""

    def trial_ended(self, session: Session, counted: JSON) -> None:
        """The store has the end of the session's trial; `counted` is its metadata."""

    def traceparent(self, sid: str) -> str:
        """Of the attempt, in W3C's words, for what its agent traces itself; empty where nobody is told."""
        return ""

    @property
    def dropped(self) -> int:
        """Spans that could not be sent."""
        return 0

    async def flush(self, within_s: float) -> None:
        """Sends what waits; not for longer than that, and not to a collector that is not there."""


OFF = Tracing()


class Traced(Protocol):
    """What every actor is told: `fleet.crew.Setup`."""

    @property
    def otel(self) -> dict[str, str] | None: ...
    @property
    def secret(self) -> str: ...
    @property
    def config(self) -> Any: ...


def tracing_of(setup: Traced, instance: str) -> Tracing:
    """What an actor tells its spans; `instance` names it."""
    if setup.otel is None:
        return OFF
    os.environ |= setup.otel
    try:
        from rollout_ft.telemetry.otel import OTel

        return OTel.exporting(setup.config, setup.secret, instance)
    except ImportError as e:  # on this node
        _log.warning("tracing.off instance=%s: install %s: %s", instance, EXTRA, e)
        return OFF
    except Exception as e:  # a setting of the exporter's: the run goes on without its spans
        _log.warning("tracing.off instance=%s: %r: look at the OTEL_… variables", instance, e)
        return OFF


def wanted(mode: str, env: Mapping[str, str]) -> tuple[dict[str, str] | None, str]:
    """The environment that actors are to export spans with, None where they are not; and why not, where that may be a mistake."""
    named = any(env.get(name) for name in _ENDPOINTS)
    if mode == "off" or (mode == "auto" and (not named or env.get("OTEL_TRACES_EXPORTER") == "none" or _disabled(env))):
        return None, ""
    hindrance = _hindrance(env)
    return (None, hindrance) if hindrance else ({k: v for k, v in env.items() if k.startswith("OTEL_")}, "")


def _disabled(env: Mapping[str, str]) -> bool:
    return env.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def _hindrance(env: Mapping[str, str]) -> str:
    if _disabled(env):
        return "OTEL_SDK_DISABLED is true: unset it"
    if env.get("OTEL_TRACES_EXPORTER", "otlp") not in ("otlp", ""):
        return f"OTEL_TRACES_EXPORTER is {env['OTEL_TRACES_EXPORTER']}: spans are sent with otlp alone"
    protocol = next((env[name] for name in _PROTOCOLS if env.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        return f"the protocol is to be {protocol}: spans are sent with http/protobuf alone, mostly to port 4318"
    return "" if installed() else f"the exporter is not installed: pip install '{EXTRA}'"


def installed() -> bool:
    try:
        return all(map(importlib.util.find_spec, ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")))
    except ModuleNotFoundError:
        return False
