"""A file of JSON lines that is only ever appended to.

Owns the file. A line is written whole and flushed, so that a process that is killed leaves whole lines; what a machine
that lost its power left of the last one is cut before the next is written.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import orjson

from rollout_ft.types import JSON


class Lines:
    def __init__(self, path: Path):
        self._file = path.open("ab")
        self._file.truncate(_whole(path))

    def append(self, line: JSON) -> None:
        self._file.write(orjson.dumps(line) + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """On disk, whatever happens to the machine."""
        os.fdatasync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[JSON]:
    """Every line that is a whole JSON object; none when there is no file."""
    found: list[JSON] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            value: Any = orjson.loads(line) if line.endswith(b"\n") else None
        except orjson.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found.append(cast(JSON, value))
    return found


def _whole(path: Path) -> int:
    """How many bytes the whole lines of a file have."""
    return path.read_bytes().rfind(b"\n") + 1
