"""A trial whose attempts are programs, killed at named points, and what must be true of it afterwards.

Owns the points, the record of every tool that ran, and the judge: outcome, reward and trajectory are those of the trial
that nobody killed, and the tools ran as often as an environment promises that starts anew with each attempt.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_run import Stage

from rollout_ft.testing.faults import Fault, Kind
from rollout_ft.trial.commands import CommandAgent
from rollout_ft.trial.runner import TrialResult

DRIVERS = Path(__file__).parent / "drivers"
POINTS = ("before", "request", "reply", "tool", "after")
"""Before a turn's request, in the middle of it, when the reply is there, in the middle of its tool, after the tool."""
DATA = ("token_ids", "loss_mask", "logprobs", "version_spans")


@dataclass
class Played:
    result: TrialResult
    trajectory: dict[str, Any]
    tools: Counter[tuple[int, int]]
    """How often each attempt ran the tool of each turn."""

    @property
    def data(self) -> list[Any]:
        return [[path[key] for key in DATA] for path in self.trajectory["paths"]]


class Attempts:
    """Trials of one program. `task` is played under a name of its own for each fault."""

    def __init__(self, stage: Stage, argv: list[str], task: dict[str, Any], faults: Path):
        self._stage, self._task, self._faults = stage, task, faults
        os.environ["FAULT_DIR"] = str(faults)
        stage.agent.close()
        stage.agent = CommandAgent(argv, faults / "attempts")

    async def play(self, name: str, *points: tuple[str, int], faults: tuple[Fault, ...] = (), **fields: Any) -> Played:
        trial = f"{name}-{self._task['task_id']}"
        faults += tuple(Fault(Kind.AGENT_KILL, trial, turn, 8) for point, turn in points if point == "request")
        for point, turn in points:
            if point != "request":
                (self._faults / f"{trial}-{point}-{turn}").touch()
        result, trajectory = await self._stage.play(name, self._task, *faults, **fields)
        assert not list(self._faults.glob(f"{trial}-*")), "a point was not reached"
        assert {fault.id for fault in faults} <= {*await self._stage.fired()}
        assert not list((self._faults / "attempts").iterdir()), "a sandbox is left"
        return Played(result, trajectory, tools(self._faults / f"{trial}.tools"))


def tools(ledger: Path) -> Counter[tuple[int, int]]:
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return Counter((int(attempt), int(turn)) for attempt, turn in (line.split() for line in lines))


def promised(points: list[tuple[str, int]], turns: int) -> Counter[tuple[int, int]]:
    """What tools run when each attempt runs all of its own, in a sandbox of its own, up to where it is killed."""
    ran: Counter[tuple[int, int]] = Counter()
    for attempt, (point, turn) in enumerate(points, start=1):
        ran.update((attempt, t) for t in range(1, turn + (point in ("tool", "after"))))
    ran.update((len(points) + 1, t) for t in range(1, turns + 1))
    return ran


def judge(played: Played, clean: Played, *points: tuple[str, int], turns: int) -> None:
    assert (played.result.outcome, played.result.reward) == (clean.result.outcome, clean.result.reward)
    assert played.result.attempts == len(points) + 1
    assert played.data == clean.data
    assert played.tools == promised(list(points), turns)
    meta = played.trajectory["metadata"]
    assert (meta["turns_committed"], meta["turns_in_trajectory"], meta["unanswered"]) == (turns, turns, 0)
