"""The newest events of a run, in the order in which they were collected, for any number of readers.

Owns what is kept of them, and each source's last number. Pure. A reader says how far it has come, by the cursor of the answer before:
asked twice, it is told the same twice, and it is told how many it came too late for. Another feed's cursor is none: that
reader begins with the oldest that is kept.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from rollout_ft.telemetry.events import MAX_BUFFERED
from rollout_ft.types import JSON

MAX_SOURCES = 10_000
"""Processes whose last number is known; every start of an actor is another one."""


@dataclass(frozen=True, slots=True)
class News:
    """`missed`: events between the cursor and the first of these that are not kept any more."""

    events: list[JSON]
    cursor: str
    missed: int


class Feed:
    def __init__(self, name: str = ""):
        self.name = name or secrets.token_hex(4)
        self._events: deque[JSON] = deque(maxlen=MAX_BUFFERED)
        self._count = 0
        self._heard: dict[str, int] = {}
        self._delivered: dict[str, int] = {}
        self._behind = 0

    def delivered(self, source: str) -> int:
        """The number of its last event that a reader has come past: who tells it may forget it."""
        return self._delivered.get(source, 0)

    def tell(self, events: Iterable[JSON]) -> list[JSON]:
        """What a process tells of itself; returns those that are new."""
        fresh = [event for event in events if self._is_new(event["source"], event["seq"])]
        self._events.extend(fresh)
        self._count += len(fresh)
        return fresh

    def _is_new(self, source: str, seq: int) -> bool:
        if seq <= self._heard.get(source, 0):
            return False
        _newest(self._heard, source, seq)
        return True

    def after(self, cursor: str, most: int = MAX_BUFFERED) -> News:
        """At most so many of those behind `cursor` ("": all that are kept); the rest is behind the cursor that is returned."""
        name, _, number = cursor.rpartition(":")
        oldest = self._count - len(self._events)
        at = int(number) if name == self.name and number.isdecimal() else oldest
        start = min(max(at, oldest), self._count)
        for event in islice(self._events, max(0, self._behind - oldest), start - oldest):
            _newest(self._delivered, event["source"], event["seq"])
        self._behind = max(self._behind, start)
        events = list(islice(self._events, start - oldest, start - oldest + most))
        return News(events, f"{self.name}:{start + len(events)}", max(0, start - at))


def _newest(numbers: dict[str, int], source: str, seq: int) -> None:
    numbers.pop(source, None)
    numbers[source] = seq
    if len(numbers) > MAX_SOURCES:
        del numbers[next(iter(numbers))]
