"""Entries of a trial's log as bytes.

Owns the names of their kinds and how they are encoded. Pure.
"""

from __future__ import annotations

import msgspec

from rollout_ft.types import Answered, Ended, Opened, Step, Turn

SessionEntry = Opened | Turn | Answered | Ended | Step

FAULT = "fault:"
"""Before the reason, in an `Answered.failed`: what failed is the attempt, not one request."""

_TYPES = {"open": Opened, "turn": Turn, "answer": Answered, "outcome": Ended, "step": Step}
KINDS = tuple(_TYPES)


def encode_entry(entry: SessionEntry) -> tuple[str, bytes]:
    """`(kind, payload)` of a checkpoint entry."""
    kind = next(k for k, t in _TYPES.items() if type(entry) is t)
    return kind, msgspec.msgpack.encode(entry)


def decode_entry(kind: str, payload: bytes) -> SessionEntry:
    return msgspec.msgpack.decode(payload, type=_TYPES[kind])
