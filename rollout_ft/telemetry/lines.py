"""A file of JSON lines that is only ever appended to.

Owns the file. A line is written whole and flushed, so that a process that is killed leaves whole lines.
"""

from __future__ import annotations

import os
from pathlib import Path

import orjson

from rollout_ft.types import JSON


class Lines:
    def __init__(self, path: Path):
        self._file = path.open("ab")

    def append(self, line: JSON) -> None:
        self._file.write(orjson.dumps(line) + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """On disk, whatever happens to the machine."""
        os.fdatasync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
