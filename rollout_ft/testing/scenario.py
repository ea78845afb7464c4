"""The demo's faults: which trial meets what, and where.

Owns the mix. Pure: a seed gives the same plan, and each fault names its (trial, turn, token). No trial has two, so
that what a run loses can be told by its cause.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from rollout_ft.testing.faults import Fault, Kind
from rollout_ft.types import JSON

SLOW_TOKENS_PER_S = 12.0
_ONCE = (Kind.ENGINE_KILL, Kind.ENGINE_FREEZE, Kind.ACTOR_KILL, Kind.STORE_KILL)


def plan(tasks: Sequence[JSON], seed: int, prefix: str = "") -> list[Fault]:
    """Of every eight tasks one has a reply that comes too late, one a reply that is cut, one an agent that is killed,
    half of them on the first turn; those of `_ONCE` are spread over the run."""
    rng = random.Random(seed)
    order = list(tasks)
    rng.shuffle(order)
    share = max(1, len(order) // 8)
    many = {Kind.SLOW: _half_hidden(order, share)}
    many |= {kind: [order.pop() for _ in range(share)] for kind in (Kind.CUT, Kind.AGENT_KILL)}
    faults = [
        Fault(kind, prefix + str(task["task_id"]), _turn(rng, task, first=i % 2 == 0), rng.randint(2, 8), SLOW_TOKENS_PER_S)
        for kind, chosen in many.items()
        for i, task in enumerate(chosen)
    ]
    rest = [task for task in tasks if task in order]
    for i, kind in enumerate(rng.sample(_ONCE, len(_ONCE))):
        task = rest[(2 * i + 1) * len(rest) // (2 * len(_ONCE) + 1)]
        faults.append(Fault(kind, prefix + str(task["task_id"]), _turn(rng, task, first=False), rng.randint(8, 16)))
    return faults


def _half_hidden(order: list[JSON], count: int) -> list[JSON]:
    """Takes `count` tasks out of `order`, every other one with a client that does not tell how long it waits."""
    chosen: list[JSON] = []
    for i in range(count):
        wanted = [task for task in order if bool(task.get("hide_timeout")) == (i % 2 == 0)]
        task = (wanted or order)[-1]
        order.remove(task)
        chosen.append(task)
    return chosen


def _turn(rng: random.Random, task: JSON, *, first: bool) -> int:
    return 1 if first or task["turns"] < 2 else rng.randint(2, int(task["turns"]))
