"""Why a session was left by its engine: the few words that are counted, from the many that are said.

Owns the words. Pure. A reason is free text that begins in a fixed way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OTHER, MOVED, START = "other", "moved", "start"
"""`moved`: its engine was not lost; `start`: the engine had never come up."""
_BEGIN = (
    ("process", ("exited", "killed by", "ended")), ("actor", ("actor died",)), ("silent", ("does not answer", "missed pings")),
    ("stalled", ("stalled",)), ("requests", ("failed:",)), ("probes", ("probes:",)), ("connection", ("connection", "/")),
)  # fmt: skip
LOSSES = (*(loss for loss, _ in _BEGIN), START, OTHER)
_STOOD = re.compile(r"^stalled.* for ([\d.]+) s")


@dataclass(frozen=True, slots=True)
class Loss:
    """Of a session's engine: one of `LOSSES` or `MOVED`, how long ago it was noticed, and how long before that nothing came."""

    why: str = MOVED
    ago_s: float = 0.0
    unseen_s: float = 0.0


def loss_of(reason: str) -> str:
    return next((loss for loss, begins in _BEGIN if reason.startswith(begins)), OTHER)


def unseen_s(reason: str, silence_s: float) -> float:
    """For how long nothing came before it was noticed, where the reason tells; `silence_s`: what an actor may be silent for."""
    stood = _STOOD.match(reason)
    return float(stood[1]) if stood else silence_s if loss_of(reason) == "silent" else 0.0
