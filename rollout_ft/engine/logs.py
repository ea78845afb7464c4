"""The logs of one engine on its node, one for each start.

Owns how much of them is kept. Knows nothing of what they say. The earliest starts go first; the log of the engine that
runs loses its beginning, and the engine does not notice: it only ever appends.
"""

from __future__ import annotations

import os
from pathlib import Path

TAIL_BYTES = 2**16
"""What is read of a log to know why its engine ended."""


def trim(log: Path, limit_bytes: int) -> None:
    """Keeps the logs of one engine within a limit; `log` is `NAME-INCARNATION.log`, the one that is written to."""
    _shorten(log, limit_bytes)
    left = limit_bytes - size(log)
    for earlier in sorted(_earlier(log), key=_number, reverse=True):
        left -= size(earlier)
        if left < 0:
            earlier.unlink(missing_ok=True)


def tail(log: Path, since: int = 0, limit_bytes: int = TAIL_BYTES) -> str:
    """Its last lines, those before the byte `since` left out; empty where there is none."""
    try:
        with log.open("rb") as f:
            f.seek(max(0, size(log) - limit_bytes, since if since <= size(log) else 0))
            return f.read().decode(errors="replace")
    except OSError:
        return ""


def _shorten(log: Path, limit_bytes: int) -> None:
    if size(log) <= limit_bytes:
        return
    with log.open("r+b", buffering=0) as f:  # what is written in this moment is lost
        f.seek(-(limit_bytes // 2), os.SEEK_END)
        kept = f.read()
        f.truncate(0)
    with log.open("ab") as f:
        f.write(kept[kept.find(b"\n") + 1 :])


def _earlier(log: Path) -> list[Path]:
    name = log.stem.rpartition("-")[0]
    return [p for p in log.parent.glob(f"{name}-*.log") if p.stem[len(name) + 1 :].isdecimal() and _number(p) < _number(log)]


def _number(log: Path) -> int:
    return int(log.stem.rpartition("-")[2])


def size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0
