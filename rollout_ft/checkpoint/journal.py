"""The journal of one store: an append-only file that is on disk before anything in it is acknowledged.

Owns the file: its lock, its frames, what a torn tail is and what damage is. Must not know what the records mean.

One batch is one frame (mark, length, CRC, records) and one fdatasync. The subtle invariant: frames are written one
after the other, so only the last can be torn. A bad frame with a good one behind it is damage, and damage is an error:
cutting there would silently drop what was acknowledged (a SQLite WAL does cut there: hence a file of our own). The
mark is random per file, so that no payload can imitate a frame.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import Struct as Layout
from urllib.parse import quote, unquote

import msgspec

from rollout_ft.errors import ConfigError

_MAGIC = b"RFTJRNL1"
_HEADER = Layout("<8s8sI")
_FRAME = Layout("<8sII")


class Appended(msgspec.Struct, frozen=True, array_like=True, tag="append"):
    trial_id: str
    attempt: int
    owner_epoch: int
    kind: str
    key: str
    payload: bytes


class Raised(msgspec.Struct, frozen=True, array_like=True, tag="fence"):
    trial_id: str
    attempt: int
    owner_epoch: int


class Released(msgspec.Struct, frozen=True, array_like=True, tag="release"):
    trial_id: str


class Promised(msgspec.Struct, frozen=True, array_like=True, tag="promise"):
    number: int


class Opened(msgspec.Struct, frozen=True, array_like=True, tag="view"):
    number: int
    members: tuple[str, ...]
    min_replicas: int


Record = Appended | Raised | Released | Promised | Opened

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Record])


class JournalDamaged(ConfigError):
    """A journal holds bytes that were never written so; the message names the file and the place."""


class JournalInUse(ConfigError):
    """Another process writes this journal."""


def journal_path(journal_dir: str | Path, name: str) -> Path:
    return Path(journal_dir) / f"{quote(name, safe='')}.journal"


def journal_names(journal_dir: str | Path) -> list[str]:
    """The stores that have a journal in `journal_dir`: start each under its old name, then `recover_view`."""
    return sorted(unquote(path.stem) for path in Path(journal_dir).glob("*.journal"))


class Journal:
    """An open journal, locked until `close` or the end of the process; `replay` comes before the first `write`."""

    def __init__(self, journal_dir: str | Path, name: str) -> None:
        self.path = journal_path(journal_dir, name)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise JournalInUse(f"{self.path} is being written by another process; a journal has one writer") from None
        self._mark = b""

    def replay(self) -> Iterator[Record]:
        """Every record, oldest first; a torn tail is cut."""
        size = os.fstat(self._file).st_size
        if size < _HEADER.size:
            self._create()
            return
        with mmap.mmap(self._file, size, access=mmap.ACCESS_READ) as data:
            magic, self._mark, check = _HEADER.unpack_from(data, 0)
            if magic != _MAGIC or check != zlib.crc32(self._mark):
                raise JournalDamaged(f"{self.path} does not begin as a journal; move it away to start without it")
            place = _HEADER.size
            while (end := self._frame_end(data, place)) is not None:
                try:
                    records = _decoder.decode(data[place + _FRAME.size : end])
                except msgspec.ValidationError as error:
                    raise JournalDamaged(f"{self.path}: the record at byte {place} makes no sense: {error}") from error
                yield from records
                place = end
            self._refuse_damage(data, place)
        if place < size:
            os.ftruncate(self._file, place)
            os.fdatasync(self._file)
        os.lseek(self._file, 0, os.SEEK_END)

    def write(self, records: Sequence[Record]) -> None:
        """On disk when this returns; OSError when it may not be, and then nothing more may be written."""
        if not records:
            return
        body = _encoder.encode(records)
        frame = memoryview(_FRAME.pack(self._mark, len(body), zlib.crc32(body)) + body)
        while frame:
            frame = frame[os.write(self._file, frame) :]
        os.fdatasync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def _create(self) -> None:
        self._mark = os.urandom(8)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, _HEADER.pack(_MAGIC, self._mark, zlib.crc32(self._mark)), 0)
        os.lseek(self._file, 0, os.SEEK_END)
        os.fsync(self._file)
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def _frame_end(self, data: mmap.mmap, place: int) -> int | None:
        """Where the frame at `place` ends; None when there is no whole frame."""
        if place + _FRAME.size > len(data):
            return None
        mark, length, check = _FRAME.unpack_from(data, place)
        end = place + _FRAME.size + length
        if mark != self._mark or end > len(data) or zlib.crc32(data[place + _FRAME.size : end]) != check:
            return None
        return end

    def _refuse_damage(self, data: mmap.mmap, place: int) -> None:
        behind = data.find(self._mark, place + 1)
        while behind != -1:
            if self._frame_end(data, behind) is not None:
                raise JournalDamaged(
                    f"{self.path}: the record at byte {place} is damaged and good ones follow at byte {behind}; "
                    f"use another replica's journal, or cut this one at {place} to lose what follows"
                )
            behind = data.find(self._mark, behind + 1)
