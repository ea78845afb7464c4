"""rollout_ft: agentic RL rollouts that survive their faults, on Ray.

Owns the public names. They are imported when they are used: an engine's or an agent's process imports parts of this
package and must not pay for Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollout_ft.config import Config
    from rollout_ft.errors import RolloutFTError
    from rollout_ft.runtime import Run, start
    from rollout_ft.trial.agents import ProcessAgent
    from rollout_ft.trial.client import Session
    from rollout_ft.trial.fleet import Fleet, SyncFleet
    from rollout_ft.trial.groups import GroupResult
    from rollout_ft.trial.runner import TrialResult

_HOMES = {
    "Config": "config", "RolloutFTError": "errors", "Run": "runtime", "start": "runtime",
    "ProcessAgent": "trial.agents", "Session": "trial.client", "TrialResult": "trial.runner",
    "Fleet": "trial.fleet", "SyncFleet": "trial.fleet", "GroupResult": "trial.groups",
}  # fmt: skip

__all__ = ["Config", "Fleet", "GroupResult", "ProcessAgent", "RolloutFTError", "Run", "Session", "SyncFleet", "TrialResult", "start"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
