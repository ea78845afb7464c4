"""What is wrong with a run just now, and what to do about it.

Owns the sentences of the first thing that somebody reads who was woken up. Pure: made of what `GET /fleet` says. However large the
fleet, there is one problem for all engines that have the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rollout_ft.fleet.health import State
from rollout_ft.fleet.weights import Phase
from rollout_ft.telemetry.explanations import CATALOGUE, explain
from rollout_ft.types import JSON

MAX_NAMED = 3
MAX_LOST = 600.0
"""An engine that was lost and is back is told of for so many seconds."""
_TELLING = (State.DEAD, State.SUSPECT, State.STALE, State.OFFLOADED, State.RESTARTING)
_ENDS = {
    Phase.PAUSED: "POST /fleet/resume ends it: look whether the trainer still lives.",
    Phase.UPDATING: "It ends with the update, or with another (POST /fleet/weights): look whether the trainer still lives.",
    Phase.OFFLOADED: "Give the memory back (/resume_memory_occupation), then load weights: look whether the trainer still lives.",
}

_REMEDIES = {
    "of the checkpoint store": "Add nodes, or set store.journal_dir to a disk that outlives that node: `rollout-ft doctor` says which.",
    "is stale": CATALOGUE[State.STALE].remedy,
    "fleet.max_pause_s": "Look whether the trainer still lives; raise fleet.max_pause_s if it needs so long.",
}
"""By what a warning of the fleet says."""


def problems(fleet: JSON, now: float, recoveries: Sequence[JSON] = ()) -> list[JSON]:
    """Of each `{level: bad or warn, what, why, remedy}`, the gravest first. `now`: wall clock."""
    found = [*_store(fleet), *_whole(fleet, now), *_engines(fleet), *_recurring(fleet, now, recoveries), *_said(fleet)]
    return sorted(found, key=lambda each: each["level"] != "bad")


def _store(fleet: JSON) -> Iterator[JSON]:
    view = fleet["view"]
    least = max(1, view["min_replicas"])
    if len(view["members"]) < least:
        what = f"Every commit waits for the store: it has {len(view['members'])} replicas, and no fewer than {least} may be."
        yield _problem("bad", what, "store.min_replicas", "Nothing is lost, and nothing goes on: a node for another replica is needed.")


def _whole(fleet: JSON, now: float) -> Iterator[JSON]:
    weights, phase = fleet["weights"], fleet["weights"]["phase"]
    if phase != Phase.SERVING:
        for_s = now - (weights["still_since"] or now)
        yield _problem("warn", f"Every turn waits for the trainer: {phase} for {for_s:.0f} s.", "", _ENDS[phase])
    elif not fleet["serves"]:
        yield _problem("bad", "Every turn waits for an engine: none serves.", "", "See below what became of each.")


def _engines(fleet: JSON) -> Iterator[JSON]:
    """Those that keep turns waiting, or may; one that is away because the trainer wants it so is none."""
    alike: dict[tuple[str, str, str, str], list[JSON]] = {}
    for engine in fleet["engines"]:
        state, reason = engine["state"], engine["stale"] or engine["reason"]
        if state not in _TELLING or (state == State.OFFLOADED and fleet["weights"]["phase"] != Phase.SERVING):
            continue
        said = explain(reason) if state in (State.DEAD, State.SUSPECT, State.RESTARTING) else None
        remedy = said.remedy if said else CATALOGUE[state].remedy
        alike.setdefault((state, said.code if said else "", remedy, said.meaning if said else ""), []).append(engine)
    for (state, _, remedy, meaning), those in alike.items():
        first = those[0]["stale"] or those[0]["reason"]
        why = f"{first} ({meaning})" if meaning and meaning not in first else first
        sessions = sum(engine["sessions"] for engine in those)
        at = f"; {sessions:,} sessions are there" if sessions else ""
        yield _problem("bad" if state == State.DEAD else "warn", f"{_named(those)} {_is(those)} {state}{at}.", why, remedy)
    closed = [e for e in fleet["engines"] if not e.get("open", True) and e["state"] in (State.HEALTHY, State.SUSPECT)]
    if closed:
        remedy = "Whoever owns it: it goes on when they are seen to have opened it."
        yield _problem("warn", f"{_named(closed)} waits for its owner.", closed[0].get("held") or "not opened yet", remedy)
    ended = [e for e in fleet["engines"] if e["state"] == State.RETIRED and "max_restarts" in e["reason"]]
    if ended:
        yield _problem("bad", f"{_named(ended)} {_is(ended)} retired.", ended[0]["reason"], CATALOGUE[State.RETIRED].remedy)


def _recurring(fleet: JSON, now: float, recoveries: Sequence[JSON]) -> Iterator[JSON]:
    """Engines that were lost not long ago and serve again: the run got over it, and somebody should know why."""
    states = {engine["engine_id"]: engine["state"] for engine in fleet["engines"]}
    late = [each for each in recoveries if now - each["time"] < MAX_LOST and states.get(each["engine"]) == State.HEALTHY]
    by_engine: dict[str, list[JSON]] = {}
    for each in late:
        by_engine.setdefault(each["engine"], []).append(each)
    for engine_id, losses in list(by_engine.items())[:MAX_NAMED]:
        said = explain(losses[0]["reason"])
        times = f"{len(losses)} times" if len(losses) > 1 else "once"
        what = f"{engine_id} was lost {times} in the last {MAX_LOST / 60:.0f} minutes, and serves again."
        yield _problem("warn", what, losses[0]["reason"], said.remedy if said else "Nothing, unless it recurs.")


def _said(fleet: JSON) -> Iterator[JSON]:
    for warning in fleet["warnings"]:
        remedy = next((remedy for says, remedy in _REMEDIES.items() if says in warning), "`rollout-ft doctor` says what to set.")
        yield _problem("warn", warning, "", remedy)


def _problem(level: str, what: str, why: str, remedy: str) -> JSON:
    return {"level": level, "what": what, "why": why, "remedy": remedy}


def _is(engines: Sequence[JSON]) -> str:
    return "is" if len(engines) == 1 else "are"


def _named(engines: Sequence[JSON]) -> str:
    more = len(engines) - MAX_NAMED
    named = [engine["engine_id"] for engine in engines[:MAX_NAMED]]
    if more > 0:
        return f"{', '.join(named)} and {more:,} more"
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
