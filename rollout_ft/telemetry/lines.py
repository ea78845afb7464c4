"""A file of JSON lines that is only ever appended to.

Owns the file. A line is written whole and flushed, so that a process that is killed leaves whole lines; what a machine
that lost its power left of the last one is cut before the next is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
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


def each_line(path: Path) -> Iterator[JSON]:
    """Every line that is a whole JSON object; none when there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                value: Any = orjson.loads(line) if line.endswith(b"\n") else None
            except orjson.JSONDecodeError:
                continue
            if isinstance(value, dict):
                yield cast(JSON, value)


def _whole(path: Path) -> int:
    """How many bytes the whole lines of a file have."""
    return path.read_bytes().rfind(b"\n") + 1
