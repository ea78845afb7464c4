"""A run's history, as its events tell it: when each trial ran, what was lost when, and how long recoveries took.

Owns which events are faults. Pure. Why a session had to move is what its event says, as its metric does. Events come from many
actors, each in its order: here they are in that of their times. Of a trial whose events are not there any more nothing is known but
its result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from rollout_ft.telemetry.account import ROTATED
from rollout_ft.telemetry.losses import OTHER
from rollout_ft.types import JSON, split_session_id

FAULTS = {
    "engine.dead": "engine lost", "gateway.lost": "gateway lost", "store.lost": "store replica lost",
    "store.data_lost": "stores' data lost", "supervisor.rebuilt": "supervisor restarted", "trial.restarted": "attempt restarted",
    "run.resumed": "run gone on with",
}  # fmt: skip
"""What is marked in plots, and how it is called there."""
RESUMED = "run.resumed"
FOLLOWS = {"trial.restarted", RESUMED}
"""Marked as well, and no faults: what was done about them."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` is the event's name, `why` what it says."""

    time: float
    kind: str
    who: str
    why: str


@dataclass(frozen=True, slots=True)
class Recovery:
    """A session that went to another engine had its next token after `seconds`. `reason`: why it went, as in `recovery_seconds`."""

    time: float
    trial_id: str
    reason: str
    seconds: float


@dataclass(slots=True)
class Life:
    """When a trial was opened, restarted and ended; None where no event says so."""

    began: float | None = None
    ended: float | None = None
    restarts: list[float] = field(default_factory=list[float])


@dataclass(slots=True)
class History:
    lives: dict[str, Life] = field(default_factory=dict[str, Life])
    faults: list[Fault] = field(default_factory=list[Fault])
    recoveries: list[Recovery] = field(default_factory=list[Recovery])
    wasted: dict[str, Counter[str]] = field(default_factory=dict[str, "Counter[str]"])
    """Per trial that ended, its wasted tokens by why, where its end says so."""
    began: float = 0.0
    ended: float = 0.0
    cut: bool = False
    """Older events are not kept."""
    resumed: bool = False
    """A process of the run ended before it, and what turns in flight had sampled then is counted by nobody."""

    @property
    def stalled_s(self) -> dict[str, float]:
        """Per trial, how long its longest recovery took."""
        longest: dict[str, float] = {}
        for recovery in self.recoveries:
            longest[recovery.trial_id] = max(longest.get(recovery.trial_id, 0.0), recovery.seconds)
        return longest


def history(events: Iterable[JSON]) -> History:
    fold, those = _Fold(), ordered(events)
    for event in those:
        fold.take(event["event"], event["time"], event)
    if those:
        fold.made.began, fold.made.ended = those[0]["time"], those[-1]["time"]
    return fold.made


def ordered(events: Iterable[JSON]) -> list[JSON]:
    """In the order of their times, each once: they come from many actors, and one may tell the same to two supervisors."""
    known: dict[object, JSON] = {}
    for i, event in enumerate(events):
        if "event" in event and "time" in event:
            known.setdefault((event.get("source"), event["seq"], event["time"]) if event.get("seq") else i, event)
    return sorted(known.values(), key=lambda event: event["time"])


class _Fold:
    def __init__(self) -> None:
        self.made = History()

    def take(self, name: str, time: float, event: JSON) -> None:
        self.made.cut |= name == ROTATED
        self.made.resumed |= name == RESUMED or (name == ROTATED and bool(event["account"].get("events", {}).get(RESUMED)))
        if name in FAULTS and event.get("actors") != 0:  # a supervisor that found nobody is the first
            keys = ("trial",) if name == "trial.restarted" else ("engine", "gateway", "store")
            who = next((str(event[key]) for key in keys if key in event), "")
            why = next((str(event[key]) for key in ("reason", "cause") if event.get(key)), "")
            self.made.faults.append(Fault(time, name, who, why))
        if name in ("trial.opened", "trial.restarted", "trial.ended"):
            if event.get("tokens_wasted_by"):
                self.made.wasted[event["trial"]] = Counter(event["tokens_wasted_by"])
            self._live(self.made.lives.setdefault(event["trial"], Life()), name, time)
        elif name == "session.resumed":
            trial_id, _ = split_session_id(event["session"]) or (event["session"], 0)
            self.made.recoveries.append(Recovery(time, trial_id, event.get("reason") or OTHER, event["seconds"]))

    def _live(self, life: Life, name: str, time: float) -> None:
        match name:
            case "trial.opened":
                life.began = time
            case "trial.restarted":
                life.restarts.append(time)
            case _:
                life.ended = time
