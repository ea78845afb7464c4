"""Which files a journal is made of, and what is remembered of those that are gone.

Owns the file `MANIFEST`: its two copies of the same thing, and how it is replaced at once. A segment that it does not
name holds nothing that counts: one that is made is named before the first record goes into it, and one that is deleted
is taken out of it first.

The subtle invariant: what it carries are records with their numbers, and replay puts them at their place among those
of the segments. A view and a promise are carried as soon as they are written, so that no single damage loses them.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from struct import Struct as Layout

import msgspec

from rollout_ft.checkpoint.records import JournalDamaged, Record
from rollout_ft.disk import sync_folder, write_all

NAME = "MANIFEST"
_MAGIC = b"RFTJRNL2"
_HEAD = Layout("<8sII")


def segment_name(segment: int) -> str:
    return f"{segment:08d}.segment"


class SegmentFile(msgspec.Struct, frozen=True, array_like=True):
    """Records `first` to `end` (exclusive) in `size` bytes; both are 0 for the last one, which is written."""

    segment: int
    first: int
    end: int = 0
    size: int = 0

    @property
    def name(self) -> str:
        return segment_name(self.segment)


class Carried(msgspec.Struct, frozen=True, array_like=True):
    number: int
    record: Record


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    mark: bytes
    segments: tuple[SegmentFile, ...]
    carried: tuple[Carried, ...] = ()


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Manifest).decode


def encode(manifest: Manifest) -> bytes:
    blob = _encode(manifest)
    return 2 * (_HEAD.pack(_MAGIC, len(blob), zlib.crc32(blob)) + blob)


def decode(data: bytes) -> Manifest | None:
    """From whichever copy is whole; None when neither is."""
    half = len(data) // 2
    for copy in (data[:half], data[half:]):
        if len(copy) < _HEAD.size:
            continue
        magic, length, check = _HEAD.unpack_from(copy)
        blob = copy[_HEAD.size :]
        if magic == _MAGIC and length == len(blob) and check == zlib.crc32(blob):
            return _decode(blob)
    return None


def read(folder: Path) -> Manifest | None:
    """None when there is none: nothing was ever written here. Raises JournalDamaged."""
    try:
        data = (folder / NAME).read_bytes()
    except FileNotFoundError:
        if any(file.stat().st_size for file in folder.glob("*.segment")):
            raise JournalDamaged(f"{folder / NAME} is missing and there are segments: nobody knows which of them count") from None
        return None
    manifest = decode(data)
    if manifest is None:
        raise JournalDamaged(
            f"{folder / NAME} is damaged in both of its copies ({len(data)} bytes, from byte 0 on); "
            "use another replica's journal, or move the folder away to start without it"
        )
    return manifest


def replace(folder: Path, manifest: Manifest, reached: Callable[[str], None]) -> None:
    """On disk when this returns: the old one or the new one is there, whatever happens."""
    temporary = folder / f"{NAME}.new"
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(file, encode(manifest))
        reached("manifest written")
        os.fsync(file)
    finally:
        os.close(file)
    reached("manifest synced")
    os.rename(temporary, folder / NAME)
    reached("manifest renamed")
    sync_folder(folder)
