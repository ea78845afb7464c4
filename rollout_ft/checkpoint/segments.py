"""Where the payloads of one trial lie: the newest in an open segment, the others sealed, the oldest on disk alone.

Owns when a segment is sealed, how much all of them hold in memory, and how a payload is found again. Must not know what
`put`, `get` and `load` are: inside the actor they are Ray's object store, which can spill to disk, and the journal.

The subtle invariant: moving bytes never loses them. When `put` fails the payload stays in the open segment, and the
commit that caused the sealing is as good as any other. Memory is given up only for what the journal has on disk.
"""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain
from typing import Any

from rollout_ft.checkpoint.records import Place

Put = Callable[[list[bytes]], Any]
Get = Callable[[Any], Awaitable[list[bytes]]]
Load = Callable[[Sequence[Place]], Awaitable[list[bytes]]]

SEAL_ENTRIES = 64
SEAL_BYTES = 1024 * 1024
LARGE_BYTES = 100_000

_log = logging.getLogger(__name__)


def keep(payloads: list[bytes]) -> list[bytes]:
    return payloads


async def kept(segment: list[bytes]) -> list[bytes]:
    return segment


async def nothing(places: Sequence[Place]) -> list[bytes]:
    raise LookupError(f"{len(places)} payloads are said to be on disk and there is no journal")


class _Sealed:
    """Payloads `numbers` of a trial, behind `ref`."""

    __slots__ = ("numbers", "ref", "size")

    def __init__(self, ref: Any, numbers: list[int], size: int) -> None:
        self.ref, self.numbers, self.size = ref, numbers, size


class Memory:
    """How much the payloads of all trials may hold in memory, and where they are kept beside it."""

    def __init__(self, put: Put = keep, get: Get = kept, load: Load = nothing, limit: int | None = None) -> None:
        self.put, self.get, self.load, self.limit = put, get, load, limit
        self.used = 0
        self._sealed: deque[tuple[Segments, _Sealed]] = deque()
        self._released = 0

    def sealed(self, owner: Segments, segment: _Sealed) -> None:
        if self.limit is not None:
            self._sealed.append((owner, segment))

    def released(self, segments: int) -> None:
        """So many sealed segments are of no use any more; they are looked for when they are half of all."""
        self._released += segments
        if self.limit is not None and 2 * self._released > len(self._sealed):
            self._sealed = deque((owner, segment) for owner, segment in self._sealed if not owner.released)
            self._released = 0

    def fit(self) -> None:
        """Past the limit the oldest sealed segments are left to the journal, as far as it has them."""
        while self.limit is not None and self.used > self.limit and self._sealed:
            owner, segment = self._sealed[0]
            if not owner.leave(segment):
                return
            self._sealed.popleft()


class Segments:
    """The payloads of a trial, in the order of its log. A slot without bytes or segment is on disk."""

    __slots__ = ("_held", "_memory", "_open", "_open_bytes", "_places", "_slots", "released", "total_bytes")

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._slots: list[bytes | _Sealed | None] = []
        self._places = array("Q")
        self._open: list[int] = []
        self._open_bytes = 0
        self._held = 0
        self.total_bytes = 0
        self.released = False

    def __len__(self) -> int:
        return len(self._slots)

    def append(self, payload: bytes) -> int:
        """Its number among the payloads."""
        number = len(self._slots)
        self._slots.append(payload)
        self.total_bytes += len(payload)
        self._hold(len(payload))
        if len(payload) > LARGE_BYTES:
            self._move([number])
            return number
        self._open.append(number)
        self._open_bytes += len(payload)
        if len(self._open) >= SEAL_ENTRIES or self._open_bytes >= SEAL_BYTES:
            self.seal()
        return number

    def seal(self) -> None:
        """Close the open segment; also when the trial ends."""
        numbers, self._open, self._open_bytes = self._open, [], 0
        if numbers:
            self._move(numbers)

    def on_disk(self, number: int, place: Place) -> None:
        """Payloads come to disk in their order."""
        assert len(self._places) == 4 * number
        self._places.extend((place.segment, place.offset, place.length, place.check))

    def leave(self, segment: _Sealed) -> bool:
        """Give its memory up; False when it is not on disk yet."""
        if self.released or not segment.numbers:
            return True
        if 4 * segment.numbers[-1] >= len(self._places):
            return False
        for number in segment.numbers:
            self._slots[number] = None
        self._hold(-segment.size)
        return True

    def release(self) -> None:
        """Nothing of it is needed any more."""
        segments = {id(slot): slot for slot in self._slots if isinstance(slot, _Sealed)}
        for segment in segments.values():
            segment.ref = None
        self._slots.clear()
        self._hold(-self._held)
        self.released = True
        self._memory.released(len(segments))

    async def compact(self) -> None:
        """One segment instead of several, of a trial that has ended. Large payloads stay by themselves."""
        several = list({id(slot): slot for slot in self._slots if isinstance(slot, _Sealed)}.values())
        several = [segment for segment in several if len(segment.numbers) > 1 or segment.size <= LARGE_BYTES]
        if len(several) < 2:
            return
        refs = [segment.ref for segment in several]
        found = [number for segment in several for number in segment.numbers]
        payloads = dict(zip(found, chain(*[await self._memory.get(ref) for ref in refs]), strict=True))
        if any(self.released or self._slots[segment.numbers[0]] is not segment for segment in several):
            return  # it was released meanwhile, or left to the journal
        numbers = sorted(payloads)
        try:
            ref = self._memory.put([payloads[number] for number in numbers])
        except Exception:
            _log.exception("%d segments could not be joined and stay as they are", len(several))
            return
        whole = _Sealed(ref, numbers, sum(map(len, payloads.values())))
        for number in numbers:
            self._slots[number] = whole
        for segment in several:
            segment.ref, segment.numbers = None, []
        self._memory.sealed(self, whole)

    async def read(self, from_seq: int = 0, to_seq: int | None = None) -> list[bytes]:
        slots = list(enumerate(self._slots))[from_seq:to_seq]
        # Of each segment all that is needed, now: while this waits, `compact` may join it with others and empty it.
        sealed = {id(slot): (slot.ref, slot.numbers) for _, slot in slots if isinstance(slot, _Sealed)}
        places = [self._place(number) for number, slot in slots if slot is None]
        opened = {name: await self._memory.get(ref) for name, (ref, _) in sealed.items()}
        loaded = iter(await self._memory.load(places) if places else [])
        payloads: list[bytes] = []
        for number, slot in slots:
            if isinstance(slot, _Sealed):
                payloads.append(opened[id(slot)][bisect_left(sealed[id(slot)][1], number)])
            else:
                payloads.append(next(loaded) if slot is None else slot)
        return payloads

    def _place(self, number: int) -> Place:
        return Place(*self._places[4 * number : 4 * number + 4])

    def _hold(self, size: int) -> None:
        self._held += size
        self._memory.used += size

    def _move(self, numbers: list[int]) -> None:
        payloads = [slot for slot in (self._slots[number] for number in numbers) if isinstance(slot, bytes)]
        try:
            ref = self._memory.put(payloads)
        except Exception:
            _log.exception("a segment of %d payloads could not be sealed and stays in memory", len(payloads))
            return
        segment = _Sealed(ref, numbers, sum(map(len, payloads)))
        for number in numbers:
            self._slots[number] = segment
        self._memory.sealed(self, segment)
