"""Which trials somebody asked for, and in which order.

Owns what is known of a trial without asking its engine, what about it needs attention, and a list's filters and pages. Pure.
A page begins behind a key, not at a number: trials that come or change meanwhile make no other be missed or told twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from heapq import nsmallest

from rollout_ft.telemetry.explanations import CATALOGUE
from rollout_ft.types import JSON, Outcome, session_id

STATES = ("held", "idle", "ended", "released", "damaged")
STUCK_S = 30.0
"""A turn without a token for so long stands still, whatever it waits for."""
WAITS_S = 5.0
AT_ENGINE = frozenset({"first_token", "tokens", "commit"})
"""What a turn that is served waits for; anything else keeps it from the engine."""


class Rank(IntEnum):
    """What needs attention, the gravest first."""

    DAMAGED = 0
    STUCK = 1
    WAITS = 2
    LOST = 3
    RESTARTED = 4
    FAILED = 5
    HOMELESS = 6
    IDLE = 7
    RUNS = 8
    DONE = 9


_LOST = frozenset({Outcome.INFRA_EXHAUSTED.value, Outcome.ENV_FAILED.value})
_FAILED = frozenset({Outcome.AGENT_FAILED.value, Outcome.TRUNCATED.value})


@dataclass(slots=True)
class Row:
    """A trial. `known`: what is in no head of a log (its task, its group, its outcome) has been told, or read."""

    trial_id: str
    attempt: int = 0
    entries: int = 0
    released: bool = False
    damaged: bool = False
    known: bool = False
    task_id: str = ""
    group_id: str = ""
    mode: str = ""
    outcome: str = ""
    reward: float | None = None
    cause: str = ""

    def describe(self, state: str) -> JSON:
        """As `GET /trials` has it."""
        return {
            "trial_id": self.trial_id, "attempt": self.attempt, "entries": self.entries, "state": state, "task_id": self.task_id,
            "group_id": self.group_id, "mode": self.mode, "outcome": self.outcome or None, "reward": self.reward, "cause": self.cause,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Query:
    """Empty filters let everything pass. `after` is `Page.next` of the page before; no `limit` is all."""

    state: str = ""
    outcome: str = ""
    group_id: str = ""
    task_id: str = ""
    search: str = ""
    """In the ids of trial, task and group, without regard to case."""
    attention: bool = False
    """What needs attention first; else by id."""
    after: str = ""
    limit: int | None = None

    def lets_pass(self, row: Row, state: str) -> bool:
        if (self.state and state != self.state) or (self.outcome and row.outcome != self.outcome):
            return False
        if (self.group_id and row.group_id != self.group_id) or (self.task_id and row.task_id != self.task_id):
            return False
        wanted = self.search.casefold()
        return not wanted or any(wanted in said.casefold() for said in (row.trial_id, row.task_id, row.group_id))


@dataclass(frozen=True, slots=True)
class Around:
    """What of the fleet a trial's state depends on: session id → engine, engine → state, session id → its turn in flight, where
    that is among those that have waited longest."""

    places: Mapping[str, str] = field(default_factory=dict[str, str])
    engines: Mapping[str, str] = field(default_factory=dict[str, str])
    turns: Mapping[str, JSON] = field(default_factory=dict[str, JSON])

    def state(self, row: Row) -> str:
        """`idle` is one that no engine has, and that is not known to have ended."""
        if row.released or row.damaged:
            return "released" if row.released else "damaged"
        if row.outcome:
            return "ended"
        return "held" if session_id(row.trial_id, row.attempt) in self.places else "idle"

    def rank(self, row: Row, state: str) -> Rank:
        if state == "damaged":
            return Rank.DAMAGED
        if state in ("ended", "released"):
            return Rank.LOST if row.outcome in _LOST else Rank.FAILED if row.outcome in _FAILED else Rank.DONE
        if state == "idle":
            return Rank.IDLE
        sid = session_id(row.trial_id, row.attempt)
        if self.engines.get(self.places[sid]) not in ("healthy", "suspect"):
            return Rank.HOMELESS
        turn = self.turns.get(sid)
        if turn is not None and turn["quiet_s"] >= STUCK_S:
            return Rank.STUCK
        if turn is not None and turn["quiet_s"] >= WAITS_S and turn["waits_for"] not in AT_ENGINE:
            return Rank.WAITS
        return Rank.RESTARTED if row.attempt > 1 else Rank.RUNS

    def words(self, row: Row, rank: Rank) -> tuple[str, str]:
        """What is the matter with a trial, and what to do about it."""
        sid = session_id(row.trial_id, row.attempt)
        engine = self.places.get(sid, "")
        match rank:
            case Rank.DAMAGED:
                return "entries of its log are lost", CATALOGUE["trial_damaged"].remedy
            case Rank.STUCK | Rank.WAITS:
                turn = self.turns[sid]
                why = f"no token for {turn['quiet_s']:.0f} s, at {engine}: waits for {WAITS[turn['waits_for']][0]}"
                return why, WAITS[turn["waits_for"]][1]
            case Rank.HOMELESS:
                return f"its engine, {engine}, is {self.engines.get(engine, 'gone')}", "Nothing: it goes on elsewhere when it is asked for."
            case Rank.LOST | Rank.FAILED:
                return row.cause or CATALOGUE[row.outcome].meaning, CATALOGUE[row.outcome].remedy
            case Rank.RESTARTED:
                return f"in attempt {row.attempt}", "Nothing, unless it goes on: its timeline says what ended the attempts before."
            case Rank.IDLE:
                return "no engine has it", "Nothing: it goes on when its agent asks. If nobody will, give it an outcome."
            case Rank.RUNS | Rank.DONE:
                return "", ""


_TRAINER = "The trainer: POST /fleet/resume ends a pause, an update ends itself, memory that is given back and then weights end an offload."
_STALE = "An update: `stale` in GET /fleet says which one the engine missed."
WAITS = {
    "first_token": ("its first token", "Look at its engine: a long prompt or queue; past its deadline the call is begun again."),
    "tokens": ("its next token", "Nothing yet: past `engine.token_timeout_s` it goes on elsewhere. If many do, look at their engine."),
    "commit": ("the store", "Look at the store: every replica of the view has to answer before a reply leaves."),
    "paused": ("the trainer (paused)", _TRAINER),
    "updating": ("new weights", _TRAINER),
    "offloaded": ("its engine's memory", _TRAINER),
    "stale": ("weights that its engine missed", _STALE),
    "owner": ("its engine's owner", "Whoever owns the engine: it goes on when they are seen to have opened it."),
    "admission": ("a place at its engine", "More engines, or fewer trials at once: the engine has as many calls as it can run."),
    "retry": ("its next try", "Nothing: the call is tried again. If many wait so, look at what the engine refuses."),
}
"""What a turn in flight can wait for: in words, and what to do when it takes long."""


@dataclass(frozen=True, slots=True)
class Page:
    """`total` of all that match, on whichever page; `next`: what the following page begins behind, empty where there is none."""

    rows: tuple[tuple[Row, str, Rank], ...]
    total: int
    next: str


def select(rows: Iterable[Row], query: Query, around: Around) -> Page:
    behind = _key_of(query.after)
    total, left = 0, list[tuple[int, str, Row, str]]()
    for row in rows:
        state = around.state(row)
        if not query.lets_pass(row, state):
            continue
        total += 1
        rank = around.rank(row, state).value if query.attention else 0
        if behind is None or (rank, row.trial_id) > behind:
            left.append((rank, row.trial_id, row, state))
    page = sorted(left, key=_in_order) if query.limit is None else nsmallest(query.limit, left, key=_in_order)
    more = f"{page[-1][0]}~{page[-1][1]}" if 0 < len(page) < len(left) else ""
    return Page(
        tuple((row, state, Rank(rank) if query.attention else around.rank(row, state)) for rank, _, row, state in page), total, more
    )


def counts(rows: Iterable[Row], around: Around, outcomes: Mapping[str, int], restarts: int) -> JSON:
    """All trials: how many, and of each state, that have a row; of each outcome, and how many attempts were begun after the first, with
    `outcomes` and `restarts` of those that have none any more."""
    states, outcomes, known = Counter[str](), Counter(outcomes), 0
    for row in rows:
        known += 1
        states[around.state(row)] += 1
        restarts += max(0, row.attempt - 1)
        if row.outcome:
            outcomes[row.outcome] += 1
    return {"known": known, "states": {state: states[state] for state in STATES}, "outcomes": dict(outcomes), "restarts": restarts}


def _in_order(found: tuple[int, str, Row, str]) -> tuple[int, str]:
    return found[0], found[1]


def _key_of(after: str) -> tuple[int, str] | None:
    rank, _, trial_id = after.partition("~")
    return (int(rank), trial_id) if after else None
