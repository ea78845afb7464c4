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

    def heard(self, source: str) -> int:
        """The number of the last event that it told."""
        return self._heard.get(source, 0)

    def tell(self, events: Iterable[JSON]) -> list[JSON]:
        """What a process tells of itself; returns those that are new."""
        fresh = [event for event in events if self._is_new(event["source"], event["seq"])]
        self._events.extend(fresh)
        self._count += len(fresh)
        return fresh

    def _is_new(self, source: str, seq: int) -> bool:
        if seq <= self.heard(source):
            return False
        self._heard.pop(source, None)
        self._heard[source] = seq
        if len(self._heard) > MAX_SOURCES:
            del self._heard[next(iter(self._heard))]
        return True

    def after(self, cursor: str, most: int = MAX_BUFFERED) -> News:
        """At most so many of those behind `cursor` ("": all that are kept); the rest is behind the cursor that is returned."""
        name, _, number = cursor.rpartition(":")
        oldest = self._count - len(self._events)
        at = int(number) if name == self.name and number.isdecimal() else oldest
        start = min(max(at, oldest), self._count)
        events = list(islice(self._events, start - oldest, start - oldest + most))
        return News(events, f"{self.name}:{start + len(events)}", max(0, start - at))
