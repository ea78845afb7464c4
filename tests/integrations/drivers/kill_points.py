"""Named points of an attempt at which its process kills itself, each once, when the test has put a file there.

Owns the files: `$FAULT_DIR/{trial_id}-{point}-{turn}` kills there, or raises the error that it names; `$FAULT_DIR/{trial_id}.tools`
has a line for each tool that began, with the attempt that ran it. Knows nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

DIRECTORY, TRIAL = Path(os.environ["FAULT_DIR"]), os.environ["ROLLOUT_FT_TRIAL_ID"]
LEDGER = DIRECTORY / f"{TRIAL}.tools"


def armed(point: str, turn: int) -> Path:
    return DIRECTORY / f"{TRIAL}-{point}-{turn}"


def reach(point: str, turn: int) -> None:
    """Returns unless this point is armed."""
    file = armed(point, turn)
    if file.exists():
        error = file.read_text()
        file.unlink()
        if error:
            raise type(error, (Exception,), {})(f"planned, {point} {turn}")
        os.kill(os.getpid(), signal.SIGKILL)


def ran(turn: int) -> None:
    with LEDGER.open("a") as ledger:
        ledger.write(f"{os.environ['ROLLOUT_FT_ATTEMPT']} {turn}\n")
