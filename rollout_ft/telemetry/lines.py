"""A file of JSON lines that is only ever appended to.

Owns the file, which its user alone may read: lines quote what models and agents said. A line is written whole, so that a process
that is killed leaves whole lines; what a machine that lost its power, or a disk that was full, left of one is cut before the next
is written. Nothing is buffered: a line that was refused is not there, and may be written again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, cast

import orjson

from rollout_ft.disk import write_all
from rollout_ft.types import JSON


class Lines:
    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0, opener=_private)  # noqa: SIM115 - closed by `close`
        self._length, self._torn = _whole(path), False
        self._file.truncate(self._length)

    def append(self, line: JSON) -> int:
        """Returns its length in bytes. Raises OSError, and then it is not there."""
        data = _dumped(line) + b"\n"
        if self._torn:
            self._file.truncate(self._length)
        self._torn = True
        write_all(self._file.fileno(), data)
        self._torn = False
        self._length += len(data)
        return len(data)

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


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _dumped(line: JSON) -> bytes:
    """An agent may say what is no UTF-8, half a surrogate say: then it is replaced, and the line is there."""
    try:
        return orjson.dumps(line)
    except TypeError:
        return orjson.dumps(_writable(line))


def _writable(value: Any) -> Any:
    match value:
        case dict():
            return {str(_writable(str(key))): _writable(each) for key, each in cast("dict[Any, Any]", value).items()}
        case list() | tuple():
            return [_writable(each) for each in cast("list[Any]", value)]
        case None | bool() | float():
            return value
        case int() if abs(value) < 2**63:
            return value
        case _:
            return str(value).encode(errors="replace").decode()


def _whole(path: Path) -> int:
    """How many bytes the whole lines of a file have."""
    return path.read_bytes().rfind(b"\n") + 1
