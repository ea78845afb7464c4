"""How the run got over each lost engine: what moved, what goes on again, how long it took.

Owns the newest losses and what followed each. Pure: fed with events as they come, in about their order.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from rollout_ft.types import JSON

KEPT = 50
MAX_MOVED = 20_000
"""Sessions that moved and whose next token is not seen yet."""


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
        self._moved: OrderedDict[str, Recovery] = OrderedDict()

    def add(self, events: Iterable[JSON]) -> None:
        for event in sorted(events, key=_time):
            self._saw(event)

    def _saw(self, event: JSON) -> None:
        match event["event"]:
            case "engine.dead":
                lost = Recovery(event["engine"], event["incarnation"], event["time"], event["reason"])
                self._newest[lost.engine] = lost
                self._kept.append(lost)
            case "session.moved" if (lost := self._newest.get(event.get("source_engine", ""))) is not None:
                lost.moved += 1
                self._moved[event["session"]] = lost
                if len(self._moved) > MAX_MOVED:
                    self._moved.popitem(last=False)
            case "session.resumed" if (lost := self._moved.pop(event["session"], None)) is not None:
                lost.resumed += 1
                lost.slowest_s = max(lost.slowest_s, event["seconds"])
            case "engine.up" if (lost := self._newest.get(event["engine"])) is not None:
                if event["incarnation"] > lost.incarnation and lost.replaced_s is None:
                    lost.replaced_s = round(event["time"] - lost.time, 1)
            case "engine.retired" if (lost := self._newest.get(event["engine"])) is not None:
                lost.retired = lost.replaced_s is None
            case _:
                pass

    def describe(self) -> list[JSON]:
        """The newest first."""
        return [asdict(lost) for lost in reversed(self._kept)]


def _time(event: JSON) -> float:
    return event["time"]
