"""Where the payloads of one trial lie: the newest in an open segment, the others sealed.

Owns when a segment is sealed and how a payload is found again. Must not know what `put` and `get` are: inside the
actor they are Ray's object store, which can spill to disk; in a process they keep the bytes.

The subtle invariant: sealing moves bytes and never loses them. When `put` fails, the payload stays in the open segment
and the commit that caused the sealing is as good as any other.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

Put = Callable[[list[bytes]], Any]
Get = Callable[[Any], Awaitable[list[bytes]]]

SEAL_ENTRIES = 64
SEAL_BYTES = 256 * 1024
LARGE_BYTES = 100_000

_log = logging.getLogger(__name__)


def keep(payloads: list[bytes]) -> list[bytes]:
    return payloads


async def kept(segment: list[bytes]) -> list[bytes]:
    return segment


@dataclass(frozen=True, slots=True)
class _Sealed:
    """The payload is number `place` of the segment behind `ref`."""

    ref: Any
    place: int


class Segments:
    """The payloads of a trial, in the order of its log."""

    __slots__ = ("_get", "_open", "_open_bytes", "_put", "_slots", "total_bytes")

    def __init__(self, put: Put = keep, get: Get = kept) -> None:
        self._put, self._get = put, get
        self._slots: list[bytes | _Sealed] = []
        self._open: list[int] = []
        self._open_bytes = 0
        self.total_bytes = 0

    def __len__(self) -> int:
        return len(self._slots)

    def append(self, payload: bytes) -> int:
        """Its number among the payloads."""
        place = len(self._slots)
        self._slots.append(payload)
        self.total_bytes += len(payload)
        if len(payload) > LARGE_BYTES:
            self._move([place])
            return place
        self._open.append(place)
        self._open_bytes += len(payload)
        if len(self._open) >= SEAL_ENTRIES or self._open_bytes >= SEAL_BYTES:
            self.seal()
        return place

    def seal(self) -> None:
        """Close the open segment; also when the trial ends."""
        places, self._open, self._open_bytes = self._open, [], 0
        if places:
            self._move(places)

    async def read(self, from_seq: int = 0, to_seq: int | None = None) -> list[bytes]:
        slots = self._slots[from_seq:to_seq]
        sealed = {id(slot.ref): slot.ref for slot in slots if isinstance(slot, _Sealed)}
        opened = {name: await self._get(ref) for name, ref in sealed.items()}
        return [opened[id(slot.ref)][slot.place] if isinstance(slot, _Sealed) else slot for slot in slots]

    def _move(self, places: list[int]) -> None:
        payloads = [slot for slot in (self._slots[place] for place in places) if isinstance(slot, bytes)]
        try:
            ref = self._put(payloads)
        except Exception:
            _log.exception("a segment of %d payloads could not be sealed and stays in memory", len(payloads))
            return
        for number, place in enumerate(places):
            self._slots[place] = _Sealed(ref, number)
