"""`DIR/events.jsonl`: the events of a run, in the order in which they came, bounded on disk.

Owns the file and `DIR/events.old.jsonl`, which it becomes when it has half of what both may have. Each of the two begins with the
account of all before it, so that what is not kept any more is still accounted for. The account is there before the first event
behind it: an event that a full disk refuses is written when it is told again, and is then there once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from rollout_ft.clock import wall
from rollout_ft.telemetry.account import ROTATED, Account, account
from rollout_ft.telemetry.lines import Lines, each_line, lines_from_end
from rollout_ft.types import JSON

NAME, OLD = "events.jsonl", "events.old.jsonl"


class EventsFile:
    """`account`: of all events that were ever written here."""

    def __init__(self, directory: Path, max_bytes: int):
        self._path, self._old, self._most = directory / NAME, directory / OLD, max_bytes // 2
        self.account: Account = account(read_events(directory))
        self._lines, self._bytes = self._open()
        self._begin()

    def append(self, event: JSON) -> None:
        """Writes it, unless it was written before. Raises OSError, and then it is not written."""
        if self.account.knows(event):
            return
        if self._bytes > self._most:
            self._rotate()
        self._begin()
        self._bytes += self._lines.append(event)  # first: one that a full disk refuses is told again
        self.account.saw(event)

    def _rotate(self) -> None:
        full = self._lines
        if self._path.exists():  # it is not where the last try came no further
            os.replace(self._path, self._old)
        self._lines, self._bytes = self._open()
        full.close()

    def _open(self) -> tuple[Lines, int]:
        return Lines(self._path), self._path.stat().st_size

    def _begin(self) -> None:
        if not self._bytes and self._old.exists():
            self._bytes += self._lines.append({"time": wall(), "event": ROTATED, "source": "run", "account": self.account.json()})

    def close(self) -> None:
        self._lines.close()


def last_gateway_url(directory: Path) -> str:
    """Where the run was served last; empty where nothing says so. Each start of a process tells it, and the account of events that
    are not kept counts those starts: either is found from the file's end, without what was told since."""
    for event in chain(lines_from_end(directory / NAME, b'"run.started"'), lines_from_end(directory / OLD, b'"run.started"')):
        told = event.get("account", {}) if event.get("event") == ROTATED else event if event.get("event") == "run.started" else {}
        if told.get("gateway_url"):
            return told["gateway_url"]
    return ""


def read_events(directory: Path, having: Sequence[bytes] = (b"",)) -> Iterator[JSON]:
    """Every event that is kept and has one of these in its line, oldest first; the first may be an account of those before it
    (`account`)."""
    return chain(each_line(directory / OLD, having), each_line(directory / NAME, having))
