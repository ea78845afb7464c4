"""What a log remembers of its entries, in few bytes.

Owns the layout: two digests an entry side by side in one buffer, kinds as shared strings, an index by key. A list of
`Mark` objects with an index of its own costs twice as much, for every turn of every session that lives.

The subtle invariant: a key usually names one entry. The index holds that one, and entries of another kind under the
same key apart.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Mark:
    """What a log remembers of an entry: enough to recognise it, not to read it."""

    kind: str
    key: str
    digest: bytes
    chain: bytes


class Marks:
    """A sequence of marks that only grows."""

    __slots__ = ("_index", "_keys", "_kinds", "_sums", "_twins")

    def __init__(self) -> None:
        self._kinds: list[str] = []
        self._keys: list[str] = []
        self._sums = bytearray()
        self._index: dict[str, int] = {}
        self._twins: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, place: int) -> Mark:
        at = 2 * DIGEST_BYTES * place
        sums = self._sums[at : at + 2 * DIGEST_BYTES]
        return Mark(self._kinds[place], self._keys[place], bytes(sums[:DIGEST_BYTES]), bytes(sums[DIGEST_BYTES:]))

    def append(self, mark: Mark) -> None:
        if mark.key in self._index:
            self._twins[mark.kind, mark.key] = len(self)
        else:
            self._index[mark.key] = len(self)
        self._kinds.append(sys.intern(mark.kind))
        self._keys.append(mark.key)
        self._sums += mark.digest + mark.chain

    def find(self, kind: str, key: str) -> Mark | None:
        place = self._index.get(key)
        if place is not None and self._kinds[place] != kind:
            place = self._twins.get((kind, key))
        return None if place is None else self[place]

    def has_key(self, key: str) -> bool:
        return key in self._index

    def since(self, place: int) -> list[Mark]:
        return [self[each] for each in range(place, len(self))]
