"""What an agent's tools act on.

Owns the protocol of environments, and what they can. Knows nothing of trials' restarts: an environment is started, or restored
from a snapshot, does one step after another, and is stopped; `trial.steps` decides which of them are done again.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from rollout_ft.errors import RolloutFTError
from rollout_ft.types import JSON


class Ability(StrEnum):
    """What an environment can, and so how often its tools run."""

    STATELESS = "stateless"
    """A step leaves nothing behind that another needs: what is recorded is never run again."""
    RESTART_ONLY = "restart_only"
    """A step changes it, and only steps can: a new one takes the recorded steps again, once, when a step is due that is not
    recorded."""
    EXPORT_RESTORE = "export_restore"
    """A state can be saved and gone on with: only steps behind the last snapshot are taken again."""


class EnvironmentLost(RolloutFTError):
    """The environment is gone or does not answer: another takes its place. The message says how it was seen."""


class Environment(Protocol):
    """One sandbox, of one attempt. `step` and the others raise EnvironmentLost when it is gone; what else they raise is told to
    the agent as an error of its own."""

    ability: Ability

    async def start(self) -> None:
        """A fresh one."""
        ...

    async def step(self, action: JSON, key: str) -> JSON:
        """Does what `action` says, and returns what came of it. A step that is taken again has the same `key`: a tool that
        knows idempotency keys can use it."""
        ...

    async def snapshot(self) -> str:
        """Saves its state; the name outlives it, and this process. Only where it is `export_restore`."""
        ...

    async def restore(self, snapshot: str) -> None:
        """In place of `start`: the saved state. Raises EnvironmentLost where that is not there any more."""
        ...

    async def forget(self, snapshot: str) -> None:
        """Nobody will ask for this snapshot again. Idempotent."""
        ...

    async def stop(self) -> None:
        """Leaves nothing behind but snapshots, whatever state it is in. Idempotent."""
        ...


Factory = Callable[[JSON, str, Path], Environment]
"""From the task, the trial's id and a directory for what outlives processes, to an environment that was not started yet."""
