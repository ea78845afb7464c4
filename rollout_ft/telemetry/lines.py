"""A file of JSON lines that is only ever appended to.

Owns the file. A line is written whole and flushed, so that a process that is killed leaves whole lines; what a machine
that lost its power left of the last one is cut before the next is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, cast

import orjson

from rollout_ft.types import JSON


class Lines:
    def __init__(self, path: Path):
        self._file = path.open("ab")
        self._file.truncate(_whole(path))

    def append(self, line: JSON) -> int:
        """Returns its length in bytes."""
        written = self._file.write(orjson.dumps(line) + b"\n")
        self._file.flush()
        return written

    def sync(self) -> None:
        """On disk, whatever happens to the machine."""
        os.fdatasync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[JSON]:
    return list(each_line(path))


def each_line(path: Path, having: Sequence[bytes] = (b"",)) -> Iterator[JSON]:
    """Every line that is a whole JSON object, and has one of these in it; none when there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            for each in having:  # `any` of a generator costs more than reading the JSON
                if each in line:
                    if (value := _object(line)) is not None:
                        yield value
                    break


def lines_from_end(path: Path, having: bytes) -> Iterator[JSON]:
    """Those of `each_line` that have these bytes in them, the last first: what has none is not read as JSON."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        at = data.rfind(having)
        while at >= 0:
            begin = data.rfind(b"\n", 0, at) + 1
            if (value := _object(data[begin : data.find(b"\n", at) + 1])) is not None:
                yield value
            at = data.rfind(having, 0, begin)


def _object(line: bytes) -> JSON | None:
    """None for what is no whole line of an object."""
    try:
        value: Any = orjson.loads(line) if line.endswith(b"\n") else None
    except orjson.JSONDecodeError:
        return None
    return cast(JSON, value) if isinstance(value, dict) else None


def _whole(path: Path) -> int:
    """How many bytes the whole lines of a file have."""
    return path.read_bytes().rfind(b"\n") + 1
