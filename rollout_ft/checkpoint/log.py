"""The append rule: what one trial's log accepts, and from whom.

Owns a trial's log as positions, digests and a fence. Knows nothing of views, replicas, clocks, disks or Ray, and keeps
no payload: a payload is hashed on arrival and kept by whoever stores bodies.

The subtle invariant: a writer is judged before its entry is. A fenced writer is refused even when it repeats an entry
that the log already has, because a success would tell it that it is still the owner.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from rollout_ft.checkpoint.marks import DIGEST_BYTES, Mark, Marks

__all__ = ["GENESIS", "Accepted", "Append", "Entry", "Head", "Mark", "Reason", "Refused", "TrialLog", "digest", "mark"]

GENESIS = bytes(DIGEST_BYTES)

Reason = Literal[
    "stale_attempt",
    "stale_owner",
    "stale_view",
    "frozen",
    "under_replicated",
    "unfenced",
    "gap",
    "conflict",
    "closed",
    "damaged",
]


@dataclass(frozen=True, slots=True)
class Entry:
    """One record of a trial; (`kind`, `key`) makes it idempotent, `payload` is opaque."""

    kind: str
    key: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Append:
    """An entry, the place it must take, and the ownership under which it is written."""

    trial_id: str
    attempt: int
    owner_epoch: int
    seq: int
    entry: Entry


@dataclass(frozen=True, slots=True)
class Head:
    """Where a trial's log ends. Two logs with the same `chain` hold the same entries."""

    attempt: int
    owner_epoch: int
    length: int
    chain: bytes
    released: bool = False
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class Accepted:
    """The entry is in the log; `stored` is False when it already was."""

    head: Head
    stored: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """Why not; `current` is the number that the caller was compared with (attempt, epoch, view, length)."""

    reason: Reason
    current: int


def digest(payload: bytes) -> bytes:
    return blake2b(payload, digest_size=DIGEST_BYTES).digest()


def mark(previous: bytes, entry: Entry, body: bytes | None = None) -> Mark:
    """The mark of `entry` behind the chain `previous`; `body` is its payload's digest where that is known already."""
    body, kind = body or digest(entry.payload), entry.kind.encode()
    # The length keeps ("ab", "c") apart from ("a", "bc").
    link = b"".join((previous, len(kind).to_bytes(4, "big"), kind, entry.key.encode(), body))
    return Mark(entry.kind, entry.key, body, digest(link))


class TrialLog:
    """One trial: its fence, its marks, whether it has been released, and why it is refused, if entries of it are lost."""

    __slots__ = ("_chain", "_length", "_marks", "damaged", "fence", "released")

    def __init__(self) -> None:
        self.fence = (0, 0)
        self.released = False
        self.damaged = ""
        self._marks = Marks()
        self._length = 0
        self._chain = GENESIS

    @property
    def head(self) -> Head:
        return Head(*self.fence, self._length, self._chain, self.released, bool(self.damaged))

    @property
    def length(self) -> int:
        return self._length

    @property
    def last_kind(self) -> str:
        return self._marks[len(self._marks) - 1].kind if self._marks else ""

    def has_key(self, key: str) -> bool:
        return self._marks.has_key(key)

    def chain_at(self, seq: int) -> bytes | None:
        """The chain in front of position `seq`; None where this log cannot tell."""
        if seq == self._length:
            return self._chain
        if seq == 0:
            return GENESIS
        return self._marks[seq - 1].chain if seq < self._length and not self.released else None

    def stale(self, attempt: int, owner_epoch: int) -> Refused | None:
        if attempt < self.fence[0]:
            return Refused("stale_attempt", self.fence[0])
        if (attempt, owner_epoch) < self.fence:
            return Refused("stale_owner", self.fence[1])
        return None

    def raise_fence(self, attempt: int, owner_epoch: int) -> Refused | None:
        refused = self.stale(attempt, owner_epoch)
        if refused is None:
            self.fence = (attempt, owner_epoch)
        return refused

    def append(self, append: Append) -> Accepted | Refused:
        writer = (append.attempt, append.owner_epoch)
        if (refused := self.stale(*writer)) is not None:
            return refused
        if self.released:
            return Refused("closed", self._length)
        if self.damaged:
            return Refused("damaged", self._length)
        # Only a trial that nobody owns may be opened without a fence: a newer owner that has not fenced every replica
        # and read them could put its entry where another replica holds one of the owner before it.
        if writer > self.fence != (0, 0):
            return Refused("unfenced", self.fence[1])
        entry = append.entry
        body = digest(entry.payload)
        known = self._marks.find(entry.kind, entry.key)
        if known is not None:
            return Accepted(self.head, stored=False) if known.digest == body else Refused("conflict", self._length)
        if append.seq != self._length:
            return Refused("gap" if append.seq > self._length else "conflict", self._length)
        self.fence = writer
        self.push(mark(self._chain, entry, body))
        return Accepted(self.head, stored=True)

    def push(self, added: Mark) -> None:
        """Append without judging the writer: for what a replica or a journal already holds."""
        self._marks.append(added)
        self._length += 1
        self._chain = added.chain

    def release(self, length: int | None = None, chain: bytes = b"") -> None:
        """Forget the entries and keep the head, so that the past still cannot write.

        `length` and `chain` are the head's where a journal has kept only that.
        """
        self.released, self.damaged = True, ""
        if length is not None:
            self._length, self._chain = length, chain
        self._marks = Marks()

    def marks(self, from_seq: int = 0) -> list[Mark]:
        return self._marks.since(from_seq)
