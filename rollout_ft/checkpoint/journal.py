"""The journal of one store: segments of records that are on disk before anything in them is acknowledged.

Owns the folder while it is open: its lock, the order of writes, when a segment is full, which are deleted. Must not
know what the records mean. To read without owning: `reading.Reading`, or `offline` for whole trials.

One `write` is one append and one fdatasync. The subtle invariant: nothing is written behind what the disk may not have.
After an OSError from `write` the end of the file is unknown, and the journal takes no more: the next start cuts it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rollout_ft.checkpoint import frames, manifest
from rollout_ft.checkpoint.ledger import Ledger
from rollout_ft.checkpoint.manifest import Manifest, SegmentFile, segment_name
from rollout_ft.checkpoint.reading import Reading, journal_names, journal_path
from rollout_ft.checkpoint.records import (
    Damage,
    JournalDamaged,
    JournalInUse,
    Located,
    Opened,
    Place,
    Promised,
    Record,
    Released,
    Torn,
    trial_of,
)
from rollout_ft.disk import sync_folder, write_all
from rollout_ft.errors import ConfigError

__all__ = ["Journal", "journal_names", "journal_path"]

SEGMENT_BYTES = 64 * 1024 * 1024
MAX_RELEASED = 4096


def _inert(point: str) -> None:
    """Nothing happens at the points that are named to `reached`."""


class Journal:
    """An open journal, locked until `close` or the end of the process; `replay` comes before the first `write`."""

    reached: Callable[[str], None] = staticmethod(_inert)
    """Told of every point at which a crash test may end the process."""

    def __init__(self, journal_dir: str | Path, name: str, *, segment_bytes: int | None = None, max_released: int | None = None) -> None:
        self.path = journal_path(journal_dir, name)
        self._segment_bytes = segment_bytes or SEGMENT_BYTES
        self._ledger = Ledger(max_released or MAX_RELEASED)
        self._segments: list[SegmentFile] = []
        self._file, self._size, self._broken = -1, 0, False
        self._number, self._echo, self._mark = 1, "", b""
        self._readers: dict[int, int] = {}
        self.torn: Torn | None = None
        """What `replay` cut."""
        self.damage: list[Damage] = []
        """What it could not read."""
        self._lock = self._locked()

    def _locked(self) -> int:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"store.journal_dir: {self.path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise JournalInUse(f"{self.path} is being written by another process; a journal has one writer") from None
        return lock

    # -- opening --------------------------------------------------------------------------------------------------

    def replay(self) -> Iterator[Located | Damage]:
        """Everything that is there, oldest first; then a torn tail is cut and the journal can be written."""
        reading = Reading(self.path)
        for item in reading:
            if isinstance(item, Located):
                self._ledger.note(item.place.segment, item.number, item.record)
            yield item
        self.torn, self.damage = reading.torn, reading.damage
        self._number, self._echo = reading.next_number, reading.last_trial
        if reading.manifest is None:
            self._create()
        else:
            self._mark, self._segments = reading.manifest.mark, list(reading.manifest.segments)
            self._continue()

    def _create(self) -> None:
        self._mark = os.urandom(frames.MARK_BYTES)
        self._open_new(1)
        sync_folder(self.path.parent)

    def _continue(self) -> None:
        for file in self.path.glob("*.segment"):
            if file.name not in {each.name for each in self._segments}:
                file.unlink()  # made and never named, or taken out and not yet deleted
        last = self._segments[-1]
        if last.end or not (self.path / last.name).exists():
            # The last one is gone: what it held is reported, and another takes its place.
            self._segments[-1] = SegmentFile(last.segment, last.first, last.end or self._number, last.size)
            return self._open_new(last.segment + 1)
        self._file = os.open(self.path / last.name, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        if self.torn is not None:
            os.ftruncate(self._file, self.torn.offset)
            os.fdatasync(self._file)
        self._size = os.fstat(self._file).st_size
        self._drop_unneeded()

    # -- writing --------------------------------------------------------------------------------------------------

    def write(self, records: Sequence[Record]) -> list[Place]:
        """On disk when this returns; OSError when it may not be, and then nothing more can be written."""
        if not records:
            return []
        if self._broken:
            raise OSError("an earlier write failed")
        self._broken = True
        if self._size >= self._segment_bytes:
            self._roll()
        places = self._append(records)
        if any(isinstance(record, (Opened, Promised)) for record in records):
            self._save()
        if any(isinstance(record, Released) for record in records):
            self._drop_unneeded()
        self._broken = False
        return places

    def _append(self, records: Sequence[Record]) -> list[Place]:
        segment, batch, at = self._segments[-1].segment, self._number, self._size
        parts: list[bytes] = []
        places: list[Place] = []
        number, echo = self._number, self._echo
        for record in records:
            head, payload, check = frames.encode(self._mark, number, batch, echo, record)
            parts += (head, payload)
            places.append(Place(segment, at + len(head), len(payload), check))
            at += len(head) + len(payload)
            number, echo = number + 1, trial_of(record)
        self.reached("before write")
        write_all(self._file, b"".join(parts))
        self.reached("written")
        os.fdatasync(self._file)
        self.reached("synced")
        for offset, record in enumerate(records):
            self._ledger.note(segment, batch + offset, record)
        self._number, self._echo, self._size = number, echo, at
        return places

    def _roll(self) -> None:
        last = self._segments[-1]
        self._segments[-1] = SegmentFile(last.segment, last.first, self._number, self._size)
        os.close(self._file)
        self._file = -1
        self._open_new(last.segment + 1)
        self._drop_unneeded()

    def _open_new(self, segment: int) -> None:
        new = SegmentFile(segment, self._number)
        self._file = os.open(self.path / new.name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = 0
        sync_folder(self.path)
        self.reached("segment made")
        self._segments.append(new)
        self._save()
        self.reached("segment named")

    def _save(self) -> None:
        manifest.replace(self.path, Manifest(self._mark, tuple(self._segments), self._ledger.carried()), self.reached)

    def _drop_unneeded(self) -> None:
        """Deletes the full segments without a trial that lives; what they say of the others is carried on."""
        gone = {each.segment for each in self._segments if each.end and not self._ledger.needed(each.segment)}
        if not gone:
            return
        files = [each.name for each in self._segments if each.segment in gone]
        self._segments = [each for each in self._segments if each.segment not in gone]
        self._ledger.drop(gone)
        self._save()
        for name in files:
            self.reached("segment dropped")
            (self.path / name).unlink(missing_ok=True)
        for segment in gone & self._readers.keys():
            os.close(self._readers.pop(segment))

    # -- reading back ---------------------------------------------------------------------------------------------

    def read(self, places: Sequence[Place]) -> list[bytes]:
        """Payloads that `write` or `replay` placed. Raises JournalDamaged."""
        return [self._read(place) for place in places]

    def _read(self, place: Place) -> bytes:
        path = self.path / segment_name(place.segment)
        file = self._readers.get(place.segment)
        if file is None:
            file = self._readers[place.segment] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        payload = os.pread(file, place.length, place.offset)
        if not frames.intact(payload, place.check) or len(payload) != place.length:
            raise JournalDamaged(f"{path}: the {place.length} bytes at byte {place.offset} are not what was written there")
        return payload

    def holds(self, trial_id: str) -> bool:
        """Whether a record of this trial is in some segment: then its release has to be remembered."""
        return self._ledger.holds(trial_id)

    def close(self) -> None:
        for file in (*self._readers.values(), self._file, self._lock):
            if file >= 0:
                os.close(file)
