"""How the run got over each lost engine: what moved, what goes on again, how long it took.

Owns the newest losses and what followed each. Pure: fed with events as they come, in about their order. A takeover is told by the
supervisor and its next token by an engine's actor, whose clocks differ: each knows the other by the owner's epoch, whichever is first.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TypeVar

from rollout_ft.types import JSON

KEPT = 50
Kept = TypeVar("Kept")
MAX_MOVED = 20_000
"""Takeovers whose next token is not seen yet, and next tokens whose takeover is not."""


@dataclass(slots=True)
class Recovery:
    """`moved`: sessions that went to other engines, `resumed` of them had a new token there, the slowest after `slowest_s`.
    `replaced_s`: from the loss to the engine's next start being up."""

    engine: str
    incarnation: int
    time: float
    reason: str
    moved: int = 0
    resumed: int = 0
    slowest_s: float = 0.0
    replaced_s: float | None = None
    retired: bool = False


class Recoveries:
    def __init__(self) -> None:
        self._kept: deque[Recovery] = deque(maxlen=KEPT)
        self._newest: dict[str, Recovery] = {}
        self._moved: OrderedDict[tuple[str, int], Recovery | None] = OrderedDict()
        """None: it moved, and not from an engine that was lost."""
        self._early: OrderedDict[tuple[str, int], float] = OrderedDict()

    def add(self, events: Iterable[JSON]) -> None:
        for event in sorted(events, key=_time):
            self._saw(event)

    def _saw(self, event: JSON) -> None:
        match event["event"]:
            case "engine.dead":
                lost = Recovery(event["engine"], event["incarnation"], event["time"], event["reason"])
                self._newest[lost.engine] = lost
                self._kept.append(lost)
            case "session.moved":
                self._took_over(event, self._newest.get(event.get("source_engine", "")))
            case "session.resumed":
                self._went_on((event["session"], event["epoch"]), event["seconds"])
            case "engine.up" if (lost := self._newest.get(event["engine"])) is not None:
                if event["incarnation"] > lost.incarnation and lost.replaced_s is None:
                    lost.replaced_s = round(event["time"] - lost.time, 1)
            case "engine.retired" if (lost := self._newest.get(event["engine"])) is not None:
                lost.retired = lost.replaced_s is None
            case _:
                pass

    def _took_over(self, event: JSON, lost: Recovery | None) -> None:
        key = event["session"], event["epoch"]
        if lost is not None:
            lost.moved += 1
        _keep(self._moved, key, lost)
        if key in self._early:
            self._went_on(key, self._early.pop(key))

    def _went_on(self, key: tuple[str, int], seconds: float) -> None:
        if key not in self._moved:
            return _keep(self._early, key, seconds)
        lost = self._moved.pop(key)
        if lost is not None:
            lost.resumed += 1
            lost.slowest_s = max(lost.slowest_s, seconds)

    def describe(self) -> list[JSON]:
        """The newest first."""
        return [asdict(lost) for lost in reversed(self._kept)]


def _keep(kept: OrderedDict[tuple[str, int], Kept], key: tuple[str, int], value: Kept) -> None:
    kept[key] = value
    if len(kept) > MAX_MOVED:
        kept.popitem(last=False)


def _time(event: JSON) -> float:
    return event["time"]
