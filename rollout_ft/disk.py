"""Files that are there when it is said that they are.

Owns what the standard library leaves to its callers: whole writes, and folders that know their new files after a crash.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_all(file: int, data: bytes) -> None:
    """Every byte. Raises OSError, and then some of them may be there."""
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


@contextmanager
def whole(path: Path) -> Generator[Path]:
    """Where to write what is to be `path`: it replaces that whole and on disk, or not at all. Of a failure nothing is left. Its user
    alone may read it: what a run writes quotes what models and agents said."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.touch(0o600)
        yield temporary
        temporary.chmod(0o600)  # whoever wrote it may have made it anew
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove_tree(path: Path) -> None:
    """All of a folder, folders in it included that may not be written: module caches are made so. What is not there is removed;
    raises OSError for what cannot be."""
    for folder, names, _ in os.walk(path):
        for name in names:
            if not os.path.islink(f"{folder}/{name}"):
                with suppress(OSError):
                    os.chmod(f"{folder}/{name}", 0o700)
    if path.exists():
        shutil.rmtree(path)
