"""Whether a trial's tokens are of the versions that the config allows.

Owns `session.version_policy` and `session.max_staleness`, and the words in which a trial that breaks them ends. Pure. Such a
trial starts from scratch or not at all: a replay would bring the same tokens back. It costs nothing that is there for
faults, for nothing failed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from rollout_ft.config import SessionConfig
from rollout_ft.session.divergence import DIVERGED
from rollout_ft.types import VersionSpan

SCRATCH, REFUSED = "from scratch: ", "too stale: "
"""How the reason of a fault begins that a trial meets for its tokens' versions: it starts again from nothing, or it is over."""
Behind = Callable[[str], int]
"""How many updates came after a version."""


def verdict(config: SessionConfig, used: Collection[str], current: str, behind: Behind, *, more: bool) -> str:
    """Why a trial that has tokens of the versions `used` may not go on while the fleet is at `current`; empty when it may.

    `more`: tokens of the current version would come to them."""
    if not used or not current:
        return ""
    if config.version_policy == "trial" and len({*used, current} if more else used) > 1:
        had = next(v for v in used if v != current)
        return f"{SCRATCH}the trial has tokens of version {had!r} and the fleet is at {current!r} (session.version_policy: trial)"
    if config.max_staleness is not None:
        oldest = max(used, key=behind)
        if behind(oldest) > config.max_staleness:
            start = REFUSED if config.on_stale == "refuse" else SCRATCH
            return (
                f"{start}the trial's oldest tokens are of version {oldest!r} and the trainer is at {current!r}, {behind(oldest)} updates "
                f"later (session.max_staleness {config.max_staleness})"
            )
    return ""


def versions_of(spans: Sequence[VersionSpan]) -> frozenset[str]:
    return frozenset(span.version for span in spans if span.start < span.end)


def code_of(reason: str) -> str:
    """The code of the error that a client gets."""
    if reason.startswith(SCRATCH):
        return "restart_from_scratch"
    if reason.startswith(DIVERGED):
        return "replay_diverged"
    return "too_stale" if reason.startswith(REFUSED) else "trial_fault"


def advice(reason: str, trial_id: str, attempt: int) -> str:
    """What a client without a runner of ours has to do."""
    if reason.startswith((SCRATCH, REFUSED, DIVERGED)):
        body = f'{{"from_attempt": {attempt}, "checkpoint": false}}'
        return f"end this trial, or start it again without its checkpoint: POST /trials/{trial_id}/restart {body}"
    return "the trial's policy decides"
