"""How many tokens were sampled, in a file that outlives the process.

Owns the file: one little-endian uint64. Must not know who samples. The subtle invariant: a token is counted before
anybody can see it. The file is mapped, so a count is one store to memory that belongs to the kernel from then on, and
SIGKILL loses nothing. A restarted engine goes on from what its predecessor counted.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np


class Counter:
    """Counts in memory, and in `path` if there is one."""

    def __init__(self, path: Path | None) -> None:
        self._count = np.zeros(1, dtype="<u8")
        if path is not None:
            with path.open("a+b") as file:
                if file.seek(0, 2) != 8:
                    file.truncate(8)
                    file.flush()
                self._count = np.frombuffer(mmap.mmap(file.fileno(), 8), dtype="<u8")

    def add(self, tokens: int) -> None:
        self._count[0] += tokens

    @property
    def value(self) -> int:
        return int(self._count[0])
