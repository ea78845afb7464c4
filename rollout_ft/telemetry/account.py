"""A run as its events tell it: what was lost, what came of it, what was sampled.

Owns the account, a fold over events in any order in which they may have been collected. Pure. Knows nothing of summaries and
counters: `telemetry.audit` compares them with it. It grows with what is under way, never with what has ended, and is itself an
event's content: an account of the events that are not kept any more is where the file of the others begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, cast

from rollout_ft.telemetry.feed import MAX_SOURCES
from rollout_ft.telemetry.losses import loss_of
from rollout_ft.types import JSON, Outcome

ROTATED, MISSED = "events.rotated", "events.missed"
MAX_LATELY = 4096
"""Ended trials whose end may be told once more."""
MAX_UNTOLD = 100
SUMS = ("attempts", "turns", "tokens_generated", "tokens_reused", "tokens_wasted")


@dataclass(slots=True)
class Account:
    """`lost` by what was lost and how it was seen; `recoveries` by what became of a session that another engine took over."""

    events: Counter[str] = field(default_factory=Counter[str])
    missing: int = 0
    """Events whose number was left out, and those that are not told as they are here."""
    missed: int = 0
    """Those that were said to have come too fast; where their source told another since, they are missing as well."""
    opened: int = 0
    outcomes: Counter[str] = field(default_factory=Counter[str])
    sums: Counter[str] = field(default_factory=Counter[str])
    """Over the ended trials: `SUMS`."""
    wasted: Counter[str] = field(default_factory=Counter[str])
    """Their `tokens_wasted`, by why."""
    lost: Counter[str] = field(default_factory=Counter[str])
    restarts: Counter[str] = field(default_factory=Counter[str])
    recoveries: Counter[str] = field(default_factory=Counter[str])
    recovered_s: float = 0.0
    running: dict[str, int] = field(default_factory=dict[str, int])
    """Trials without an end, and their attempt."""
    moving: dict[str, int] = field(default_factory=dict[str, int])
    """Sessions that were taken over and have no new token yet, and their owner's epoch."""
    early: dict[str, int] = field(default_factory=dict[str, int])
    """Those that had one, at an epoch of which the takeover is not here yet: another actor tells it."""
    down: dict[str, str] = field(default_factory=dict[str, str])
    """Engines that were lost and are not up again, and why."""
    starts: dict[str, int] = field(default_factory=dict[str, int])
    """The newest start of each engine that is wanted."""
    untold: list[str] = field(default_factory=list[str])
    """Starts of engines of which no event tells, though the next one's does; the first `MAX_UNTOLD`."""
    heard: dict[str, int] = field(default_factory=dict[str, int])
    lately: dict[str, None] = field(default_factory=dict[str, None])
    view: int = 0
    """The highest number of a view of the checkpoint store."""
    gateway_url: str = ""
    """Where the run was served last."""
    earlier_s: float = 0.0
    """Of the processes before the last one."""
    began: float = 0.0
    latest: float = 0.0
    """Of the last process: its start and its newest event."""

    @property
    def seconds(self) -> float:
        """How long processes ran, each from its start to its last event: also those that were killed."""
        return self.earlier_s + (self.latest - self.began if self.began else 0.0)

    def saw(self, event: JSON) -> bool:
        """False for one that was seen before: a process may tell it twice, to two supervisors."""
        if self.knows(event):
            return False
        self._number(event)
        try:
            self._fold(event)
        except (KeyError, TypeError):  # of another version of this package: the run goes on without it in its account
            self.missing += 1
        return True

    def knows(self, event: JSON) -> bool:
        """What the run's own process says has no number."""
        if 0 < event.get("seq", 0) <= self.heard.get(event.get("source", ""), 0):
            return True
        return event.get("event") == "trial.ended" and event.get("trial") in self.lately

    def _fold(self, event: JSON) -> None:
        name = event["event"]
        self.events[name] += 1
        self._pass(name, event.get("time", 0.0))
        if name in ("engine.up", "engine.dead", "engine.start_failed") and "incarnation" in event:
            self._start(event["engine"], event["incarnation"])
        match name:
            case "trial.opened":
                self.opened += 1
                if event["trial"] not in self.lately:
                    self.running.setdefault(event["trial"], 1)
            case "trial.restarted":
                self.restarts[event["reason"] or "asked"] += 1
                self.running[event["trial"]] = event["attempt"]
                self._settle_all(event["trial"], "restarted")
            case "trial.ended":
                self._end(event)
            case "session.moved":
                self._settle(event["session"], "moved again")
                self.moving[event["session"]] = event["epoch"]
                if self.early.get(event["session"]) == event["epoch"]:
                    self._settle(event["session"], "resumed")
            case "session.resumed":
                self.recovered_s += event["seconds"]
                if self.moving.get(event["session"]) == event["epoch"]:
                    self._settle(event["session"], "resumed")
                elif event["session"].rpartition("~")[0] not in self.lately:
                    self.early[event["session"]] = event["epoch"]
            case "engine.dead":
                self.lost[f"engine: {loss_of(event['reason'])}"] += 1
                self.down[event["engine"]] = event["reason"]
            case "engine.up":
                self.down.pop(event["engine"], None)
            case "engine.retired":
                self.down.pop(event["engine"], None)
                self.starts.pop(event["engine"], None)
            case "view.opened":
                self.view = max(self.view, event["number"])
            case _ if name == MISSED:
                self.missed += event["count"]
            case "run.started":
                self.gateway_url = event["gateway_url"]
            case "store.lost" | "gateway.lost" | "supervisor.rebuilt":
                self.lost[name.partition(".")[0]] += 1
            case _:
                pass

    def _pass(self, name: str, time: float) -> None:
        """Between two processes nothing passes: each is told of before anything that it tells."""
        if name in ("run.resumed", "run.started"):
            self.earlier_s = self.seconds
            self.began = self.latest = time
        self.latest = max(self.latest, time)

    def _number(self, event: JSON) -> None:
        """Numbers that are left out are events that nobody has."""
        source, seq = event.get("source", ""), event.get("seq", 0)
        if not seq:
            return
        self.missing += seq - self.heard.pop(source, 0) - 1
        self.heard[source] = seq
        if len(self.heard) > MAX_SOURCES:
            del self.heard[next(iter(self.heard))]

    def _start(self, engine: str, number: int) -> None:
        """Each is the one after the one before; in another cluster they begin anew."""
        for untold in range(self.starts.get(engine, number - 1) + 1, number):
            if len(self.untold) < MAX_UNTOLD:
                self.untold.append(f"start {untold} of {engine}")
        self.starts[engine] = number

    def _end(self, event: JSON) -> None:
        trial, sums, wasted = event["trial"], {name: event[name] for name in SUMS}, event["tokens_wasted_by"]
        self.lately[trial] = None
        if len(self.lately) > MAX_LATELY:
            del self.lately[next(iter(self.lately))]
        self.running.pop(trial, None)
        self._settle_all(trial, "ended")
        self.outcomes[event["outcome"]] += 1
        self.sums.update(sums)
        self.wasted.update(wasted)

    def _settle_all(self, trial: str, how: str) -> None:
        for session in [s for s in (*self.moving, *self.early) if s.rpartition("~")[0] == trial]:
            self._settle(session, how)
            self.early.pop(session, None)

    def _settle(self, session: str, how: str) -> None:
        self.recoveries[how] += self.moving.pop(session, None) is not None

    def json(self) -> JSON:
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}


def account(events: Iterable[JSON]) -> Account:
    """Of a run's events as they are kept; the first may be the account of those before it."""
    made: Account | None = None
    for event in events:
        if event.get("event") != ROTATED:
            made = made or Account()
            made.saw(event)
        elif made is None:
            made = _restored(event["account"])
    return made or Account()


def _plain(value: Any) -> Any:
    return dict(cast("Counter[str]", value)) if isinstance(value, Counter) else value  # `asdict` makes another count of it


def _restored(told: JSON) -> Account:
    made = Account()
    for name, value in told.items():
        setattr(made, name, type(getattr(made, name))(value))
    return made


def end_of(trial: JSON) -> JSON:
    """The fields of `trial.ended`, from the summary of a trial that has an end."""
    meta = trial["metadata"]
    return {
        "trial": trial["trial_id"], "task": trial["task_id"], "group": trial["group_id"], "mode": trial["mode"], "pool": trial["pool"],
        "outcome": trial["outcome"], "reward": trial["reward"], "cause": trial["cause"], "attempts": trial["attempt"],
        "turns": meta["turns_in_trajectory"], "faults_survived": faults_survived(trial), "replayed": meta["replayed"],
        "seconds": trial["seconds"],
        **{name: meta[name] for name in ("tokens_generated", "tokens_reused", "tokens_wasted", "tokens_wasted_by")},
    }  # fmt: skip


def faults_survived(trial: JSON) -> int:
    """Generations beyond the first, and restarts that a fault made (`types.BY_FAULTS`); none where the trial was lost to them."""
    if trial["outcome"] == Outcome.INFRA_EXHAUSTED:
        return 0
    meta = trial["metadata"]
    return meta.get("fault_restarts", 0) + meta["generations"] - meta["turns_committed"]
