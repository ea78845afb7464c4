"""Files that are there when it is said that they are.

Owns what the standard library leaves to its callers: whole writes, and folders that know their new files after a crash.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_all(file: int, data: bytes) -> None:
    """Every byte. Raises OSError, and then some of them may be there."""
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
