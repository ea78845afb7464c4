"""The small engine with faults of a real one, for a run's `engine.command`: kernels that are compiled when they are first
used, a prefill that holds up everybody, a scheduler that stands still behind an HTTP server that answers.

Told by files beside its --count-file, and telling by them: `.wedge` is read, `.canary` and `.long` are written.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path

from rollout_ft.testing.small_engine.protocol import Request
from rollout_ft.testing.small_engine.running import Running
from rollout_ft.testing.small_engine.scheduler import Scheduler

COMPILE_S = float(os.environ["ODD_COMPILE_S"])
PREFILL_S = float(os.environ["ODD_PREFILL_S"])
LONG_TOKENS = 50_000
_base = Path(sys.argv[sys.argv.index("--count-file") + 1])
_submit, _turn = Scheduler.submit, Scheduler._turn
_compiled: list[bool] = []
_began: dict[int, float] = {}


def submit(self: Scheduler, request: Request) -> Running:
    if request.max_new_tokens == 0:
        _base.with_suffix(".canary").touch()
    return _submit(self, request)


def turn(self: Scheduler) -> None:
    if _base.with_suffix(".wedge").exists():
        time.sleep(0.001)  # it has work, and does not do it
        return
    if self._prefills:
        running = self._prefills[0]
        tokens = len(running.request.prompt)
        if tokens > 1 and not _compiled:
            _compiled.append(True)
            time.sleep(COMPILE_S)
        if tokens > LONG_TOKENS and time.monotonic() - _began.setdefault(id(running), time.monotonic()) < PREFILL_S:
            _base.with_suffix(".long").touch()
            time.sleep(0.001)  # a chunk of it: nothing is decoded meanwhile
            return
    _turn(self)


if __name__ == "__main__":
    setattr(Scheduler, "submit", submit)  # noqa: B010
    setattr(Scheduler, "_turn", turn)  # noqa: B010
    runpy.run_module("rollout_ft.testing.small_engine", run_name="__main__", alter_sys=True)
