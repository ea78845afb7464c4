"""Which rows of routed experts a turn has, out of engine calls that may break off.

Owns the rows' arithmetic, the check of what an engine sent and how it is packed. Pure; knows nothing of stores. Row i
routed token i when token i + 1 was made: a row that another call captures later, by a prefill, is a substitute. What an
engine sends and cannot be right is dropped: the tokens are as good without it, and sampling them again would pay a turn
for its routing. What was dropped is missing, and nobody asks for it again in a later turn: it would be a substitute, and
a path would be asked for from its first token on as long as one row is missing.

The subtle invariant: the rows of a turn are in a row, from `start` on. Each call asks for what follows.
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout_ft.types import RoutedExperts

CHARS = 2**18
"""Of base64 at a time, a multiple of what an int32 needs: other threads get their turn in between."""
DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """What one row is: in each of `layers` layers the ids of `topk` of `experts` experts."""

    layers: int
    topk: int
    experts: int

    @property
    def ids(self) -> int:
        return self.layers * self.topk

    @property
    def dtype(self) -> str:
        return "uint8" if self.experts <= 256 else "uint16"

    def chars(self, rows: int) -> int:
        """The length of `rows` rows of int32 in base64."""
        return (4 * rows * self.ids + 2) // 3 * 4


@dataclass(frozen=True, slots=True)
class Piece:
    """What one call sent: rows `start` to `sent`, of which those before `end` count."""

    start: int
    sent: int
    end: int
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Packed:
    """`routed` is None when there is no row; `trouble` says why there are fewer than there should be."""

    routed: RoutedExperts | None = None
    payload: bytes = b""
    trouble: str = ""


class Capture:
    """The rows of one turn so far. `start` is the first that is wanted, `first` the one that made its first sampled token."""

    def __init__(self, shape: Shape, start: int, first: int):
        self.shape, self.start, self.first = shape, start, first
        self.trouble = ""
        self._pieces: list[Piece] = []
        self._substituted: list[tuple[int, int]] = []

    @property
    def end(self) -> int:
        """The first row that is not there."""
        return self._pieces[-1].end if self._pieces else self.start

    def cut(self, sampled: int) -> None:
        """Only the first `sampled` tokens stay: the row that made the next one is still to come."""
        limit = self.first + sampled
        self._pieces = [replace(p, end=min(p.end, limit)) for p in self._pieces if p.start < limit]
        self._substituted = _cut(self._substituted, limit)

    def take(self, kept: int, sampled: int, data: bytes | memoryview, *, recaptured: bool = False) -> None:
        """A call that began with `kept` sampled tokens ended with `sampled`, and sent `data`."""
        start, end = self.end, self.first + sampled
        if end <= start:
            return
        if len(data) != self.shape.chars(end - start):
            self.trouble = f"{len(data)} characters of routed experts, expected {self.shape.chars(end - start)}" if data else "none came"
            return
        self._pieces.append(Piece(start, end, end, data))
        again = max(start, self.first), end if recaptured else self.first + kept
        if again[0] < again[1]:
            self._substituted.append(again)

    def packed(self) -> Packed:
        """All rows, checked, packed and named. Takes long where they are many, and belongs in a thread."""
        shape, parts = self.shape, list[NDArray[Any]]()
        end, trouble = self.start, self.trouble
        for piece in self._pieces:
            try:
                rows = _unpacked(shape, piece)
            except ValueError as e:
                trouble = str(e)
                break
            parts.append(rows[: (piece.end - piece.start) * shape.ids])
            end = piece.end
        if not parts or end == self.start:
            return Packed(trouble=trouble or "none came")
        payload = b"".join(part.data for part in parts)
        digest = digest_of(payload)
        substituted = tuple(_cut(self._substituted, end))
        return Packed(
            RoutedExperts(self.start, end - self.start, shape.layers, shape.topk, shape.dtype, digest, substituted), payload, trouble
        )


def digest_of(payload: bytes) -> str:
    return blake2b(payload, digest_size=DIGEST_BYTES).hexdigest()


def _cut(ranges: Sequence[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    return [(start, min(end, limit)) for start, end in ranges if start < limit]


def _unpacked(shape: Shape, piece: Piece) -> NDArray[Any]:
    """A piece's ids in few bytes. Raises ValueError."""
    packed = np.empty((piece.sent - piece.start) * shape.ids, np.dtype(shape.dtype).newbyteorder("<"))
    at = 0
    for i in range(0, len(piece.data), CHARS):
        ids = np.frombuffer(binascii.a2b_base64(piece.data[i : i + CHARS], strict_mode=True), "<i4")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < shape.experts:
            raise ValueError(f"an expert that is none of {shape.experts}")
        packed[at : at + len(ids)] = ids
        at += len(ids)
    if at != len(packed):
        raise ValueError(f"{at} ids of routed experts, expected {len(packed)}")
    return packed
