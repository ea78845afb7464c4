"""What a journal remembers: the records, and what is said of bytes that cannot be read.

Owns the vocabulary that the writer, the reader and the replay of a journal share. Knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from rollout_ft.errors import ConfigError


class Appended(msgspec.Struct, frozen=True, array_like=True, tag="append"):
    trial_id: str
    attempt: int
    owner_epoch: int
    seq: int
    kind: str
    key: str
    payload: bytes = b""


class Raised(msgspec.Struct, frozen=True, array_like=True, tag="fence"):
    trial_id: str
    attempt: int
    owner_epoch: int


class Released(msgspec.Struct, frozen=True, array_like=True, tag="release"):
    """A collected trial, as far as it is still remembered: its head, and a note of who released it."""

    trial_id: str
    attempt: int
    owner_epoch: int
    length: int
    chain: bytes
    note: bytes = b""


class Doubted(msgspec.Struct, frozen=True, array_like=True, tag="doubt"):
    """Entries of the trial are lost, and why that is known; without a reason it is whole again."""

    trial_id: str
    reason: str


class Promised(msgspec.Struct, frozen=True, array_like=True, tag="promise"):
    number: int


class Opened(msgspec.Struct, frozen=True, array_like=True, tag="view"):
    number: int
    members: tuple[str, ...]
    min_replicas: int


Record = Appended | Raised | Doubted | Released | Promised | Opened


def trial_of(record: Record) -> str:
    """The trial that a record is about; empty for what concerns the whole store."""
    return "" if isinstance(record, (Promised, Opened)) else record.trial_id


@dataclass(frozen=True, slots=True)
class Place:
    """Where a payload lies: bytes of a segment, and their checksum."""

    segment: int
    offset: int
    length: int
    check: int


@dataclass(frozen=True, slots=True)
class Located:
    """A record, its number in the journal and the place of its payload."""

    record: Record
    number: int
    place: Place


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes that were written otherwise: records `first` to `last` were there and cannot be read.

    `trial_ids` had some of them; unless `attributed`, others may have had some as well.
    """

    file: Path
    offset: int
    length: int
    first: int
    last: int
    trial_ids: frozenset[str]
    attributed: bool

    def __str__(self) -> str:
        whose = f"of trial {', '.join(sorted(self.trial_ids))}" if self.trial_ids else "of trials that nothing names any more"
        return f"{self.file}: {self.length} bytes at byte {self.offset} are damaged: {self.last - self.first + 1} records, {whose}"


@dataclass(frozen=True, slots=True)
class Torn:
    """The end of the journal, written by nobody who was told that it is safe. A writer cuts it."""

    file: Path
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.file}: the last {self.length} bytes, from byte {self.offset} on, are no whole write and are cut"


class JournalDamaged(ConfigError):
    """A journal holds bytes that were never written so; the message names the file and the place."""


class JournalInUse(ConfigError):
    """Another process writes this journal."""
