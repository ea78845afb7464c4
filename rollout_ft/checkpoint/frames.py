"""Records as frames of a file: encoded, found again, told from what is none.

Owns the layout: mark, lengths, two checksums, the record without its payload, the payload. Pure: it sees bytes, never
a file. The mark is random per journal, so that no payload can imitate a frame.

The subtle invariant: a frame says more than its record needs, so that damage can be attributed. Its number shows how
many records a bad stretch held, its echo whose the record before it was, its batch which records one write held: the
disk may keep the pages of one unfinished write in any order, and a hole inside the last one is a torn tail, no damage.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct as Layout

import msgspec

from rollout_ft.checkpoint.records import Appended, Record

MARK_BYTES = 8
_HEAD = Layout("<8sIII")
_CHECK = Layout("<I")
HEAD_BYTES = _HEAD.size + _CHECK.size


class Meta(msgspec.Struct, frozen=True, array_like=True):
    """`batch`: number of the first record of the same write; `echo`: the trial of the record before."""

    number: int
    batch: int
    echo: str
    record: Record


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame whose head is good; `whole` says whether its payload is, too."""

    offset: int
    end: int
    meta: Meta
    payload_at: int
    check: int
    whole: bool


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes that are no frame, up to the next one or the end."""

    offset: int
    end: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Meta).decode


def encode(mark: bytes, number: int, batch: int, echo: str, record: Record) -> tuple[bytes, bytes, int]:
    """`(head, payload, checksum of the payload)`, to be written one after the other."""
    payload = b""
    if isinstance(record, Appended):
        payload, record = record.payload, msgspec.structs.replace(record, payload=b"")
    check = zlib.crc32(payload)
    meta = _encode(Meta(number, batch, echo, record))
    head = _HEAD.pack(mark, len(meta), len(payload), check)
    return b"".join((head, _CHECK.pack(zlib.crc32(meta, zlib.crc32(head))), meta)), payload, check


def scan(data: bytes, mark: bytes, start: int = 0) -> Iterator[Frame | Gap]:
    """Everything from `start` to the end of `data`, in order and without overlap."""
    at, size = start, len(data)
    while at < size:
        frame = _frame_at(data, mark, at)
        if frame is not None:
            yield frame
            at = frame.end
            continue
        found = data.find(mark, at + 1)
        while found != -1 and _frame_at(data, mark, found) is None:
            found = data.find(mark, found + 1)
        end = found if found != -1 else size
        yield Gap(at, end)
        at = end


def _frame_at(data: bytes, mark: bytes, at: int) -> Frame | None:
    meta_at = at + HEAD_BYTES
    if meta_at > len(data) or data[at : at + MARK_BYTES] != mark:
        return None
    _, meta_size, size, check = _HEAD.unpack_from(data, at)
    payload_at = meta_at + meta_size
    if payload_at > len(data):
        return None
    (head_check,) = _CHECK.unpack_from(data, at + _HEAD.size)
    meta = data[meta_at:payload_at]
    if zlib.crc32(meta, zlib.crc32(data[at : at + _HEAD.size])) != head_check:
        return None
    end = payload_at + size
    whole = end <= len(data) and intact(memoryview(data)[payload_at:end], check)
    return Frame(at, min(end, len(data)), _decode(meta), payload_at, check, whole)


def intact(payload: bytes | memoryview, check: int) -> bool:
    return zlib.crc32(payload) == check
