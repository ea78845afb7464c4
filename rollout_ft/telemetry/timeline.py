"""One trial's moments, in order: what its run's events tell of it, and what its checkpoint or its trajectory has.

Owns how both are put together: what both sources know is there once. Pure; knows nothing of who shows it.

    timeline("q07", events)                                   # of a ring of recent events, or of events.jsonl
    timeline("q07", events, of_entries(checkpoint_entries))   # of a trial that the stores or a journal have
    timeline("q07", events, of_paths(trajectory["paths"]))    # of one that was collected
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rollout_ft.telemetry.moments import Kind, Moment
from rollout_ft.telemetry.moments_told import of_events
from rollout_ft.types import JSON


def timeline(trial_id: str, events: Sequence[JSON], made: Sequence[Moment] = ()) -> list[Moment]:
    """All moments of a trial. `made`: those that its checkpoint has (`of_entries`), or its trajectory (`of_paths`)."""
    return merged(of_events([trial_id], events)[trial_id], made)


def merged(told: Sequence[Moment], made: Sequence[Moment]) -> list[Moment]:
    """Both in the order of their time; what both have is there as an event tells it. Of what is made the order holds,
    and a moment without a time stands behind the one before it."""
    known = {_identity(moment): moment for moment in told if _identity(moment)}
    clock, placed = min((m.time for m in (*told, *made) if m.time), default=0.0), list[Moment]()
    for moment in made:
        same = known.get(_identity(moment))
        clock = max(clock, same.time if same else moment.time)
        if same is None:
            placed.append(replace(moment, time=clock))
    return sorted((*told, *placed), key=lambda moment: moment.time)


def _identity(moment: Moment) -> tuple[object, ...]:
    match moment.kind:
        case Kind.OPENED | Kind.ENDED:
            return (moment.kind,)
        case Kind.RESTARTED | Kind.DIVERGED:
            return (moment.kind, moment.attempt, moment.turn)
        case _:
            return ()
