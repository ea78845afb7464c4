"""`rollout-ft trial restart`: the next attempt of a trial that runs, asked for by a person.

Owns which attempt is meant: the one that there is when it is asked for, unless one is named. Whoever runs the trial's agent goes
on with the new attempt as soon as the agent of the old one asks for anything; none of its restarts is spent.
"""

from __future__ import annotations

from rollout_ft.cli.status import ANSWER_S, Where
from rollout_ft.errors import BadRequest, ConfigError
from rollout_ft.telemetry.explanations import explain
from rollout_ft.trial.client import Client
from rollout_ft.types import JSON


async def restart(there: Where, trial_id: str, from_attempt: int | None, scratch: bool, cause: str) -> JSON:
    """`{trial_id, attempt, turns}` of the attempt that there is now; `turns`: what it goes on from. Raises ConfigError."""
    client = Client(there.url, there.key, verify=there.verify, patience_s=0)
    try:
        present: JSON = await client.request("GET", f"/trials/{trial_id}", answer_s=ANSWER_S)
        session = await client.restart(trial_id, from_attempt or present["attempt"], not scratch, cause=cause)
        return {"trial_id": trial_id, "attempt": session.attempt, "turns": session.turns}
    except BadRequest as e:
        known = explain(e.code)
        raise ConfigError(f"{e.message} ({e.code}). {known.remedy if known else ''}".rstrip()) from None
    finally:
        await client.aclose()
