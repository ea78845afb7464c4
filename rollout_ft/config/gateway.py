"""The gateways: where they listen, what a request may be, and how long it may take.

Owns the keys `gateway.…`. Knows no session and no dialect. A gateway that asks for no key is reached from this machine alone.
"""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rollout_ft.config.base import Seconds, Settings, is_loopback

EVERYWHERE = ("0.0.0.0", "::")
"""Hosts that are every address of a machine, so that nobody can be sent there."""


class GatewayConfig(Settings):
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)
    """0 takes a free one."""
    count: int = Field(default=2, ge=1)
    advertise_url: str = ""
    """What agents are told (`base_url`), when it is not http(s)://host:port; for a host that is every address, a gateway's node."""
    tls_cert: str = ""
    tls_key: str = ""
    open_sessions: Literal["none", "v1", "v2"] = "none"
    """Whether anybody on this machine may open a session without a key, as miles' driver does, and use what it opened: miles'
    session server stands at this port then. `v1` gives its driver one sample a session, `v2` one for each path."""
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    kept_body_bytes: int = Field(default=256 * 2**20, ge=0)
    """Of large bodies that owners have read: of the next one of that session only what is new is sent on. 0 keeps none."""
    max_header_bytes: int = Field(default=32 * 2**10, ge=1024)
    max_headers: int = Field(default=100, ge=10)
    max_id_chars: int = Field(default=256, ge=64)
    """Of an Idempotency-Key."""
    max_json_depth: int = Field(default=64, ge=8, le=200)
    """Of a body; deeper than 254 nothing can be written again."""
    max_connections: int = Field(default=8192, ge=1)
    """Of one gateway; one more is answered 503 and closed."""
    header_timeout_s: Seconds = 20
    """How long the head of a request may take, from the connection or its first byte on."""
    body_timeout_s: Seconds = 60
    """How long the body may take after that."""
    send_timeout_s: Seconds = 60
    """A client that reads nothing of its reply for so long is cut off."""
    max_hold_s: Seconds = 570
    """A plain request is answered 503 after this, and its retry attaches."""
    deadline_margin_s: Seconds = 0.4
    """How long before the client's own read timeout that 503 leaves."""
    keepalive_s: Seconds = 10
    max_in_flight: int = Field(default=4096, ge=1)
    max_in_flight_per_session: int = Field(default=64, ge=1)
    """So that no session takes all of them."""
    ping_s: Seconds = 1
    """Owners with calls in flight are pinged so often; two misses and the supervisor is asked."""

    @model_validator(mode="after")
    def _tls_is_whole(self) -> GatewayConfig:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("gateway.tls_cert and gateway.tls_key go together: set both or none")
        return self

    @model_validator(mode="after")
    def _open_to_this_machine_only(self) -> GatewayConfig:
        if self.open_sessions == "none":
            return self
        advertised = urlsplit(self.advertise_url).hostname if self.advertise_url else self.host
        for key, host in (("host", self.host), ("advertise_url", advertised)):
            if not is_loopback(host or ""):
                message = "gateway.open_sessions asks for no key and is for this machine alone"
                raise ValueError(f"{message}: gateway.{key} must be a loopback address")
        return self
