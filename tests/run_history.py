"""A run that never was, as its directory would have it: results, and the events that led to them, from a seed."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from rollout_ft.telemetry.figures import totals
from rollout_ft.telemetry.losses import loss_of
from rollout_ft.trial.runner import TrialResult

JSON = dict[str, Any]
BEGAN = 1_790_000_000.0
REASONS = ("killed by SIGKILL", "stalled: no token for 30 s", "actor died: the node is gone", "does not answer")


def a_run(
    trials: int = 40, *, engines: int = 4, faults: int = 6, seed: int = 1, named: str = "t{}"
) -> tuple[list[TrialResult], list[JSON]]:
    """Trials that begin one after the other; each engine that is lost moves the sessions that it has."""
    rng = random.Random(seed)
    length = 20.0 + trials / 10
    lives = [(n, begin := length * n / trials, begin + rng.uniform(5, 20), f"engine-{n % engines}") for n in range(trials)]
    events = [event(0, "run.started", gateway_url="http://127.0.0.1:1")]
    results = {n: result(named.format(n), tokens=rng.randint(200, 4000), seconds=end - begin) for n, begin, end, _ in lives}
    for n, begin, _, engine in lives:
        events.append(event(begin, "trial.opened", trial=named.format(n), task=f"q{n}", engine=engine))
    for number in range(faults):
        at, lost = rng.uniform(2, length), f"engine-{number % engines}"
        events.append(event(at, "engine.dead", engine=lost, incarnation=1, reason=REASONS[number % len(REASONS)]))
        for n, begin, end, engine in lives:
            if engine == lost and begin < at < end:
                results[n] = met(results[n], rng)
                events += moved(named.format(n), at, lost, REASONS[number % len(REASONS)], epoch=number + 2, rng=rng)
    for n, begin, end, _ in lives:
        if results[n].attempts > 1:
            events.append(event((begin + end) / 2, "trial.restarted", trial=named.format(n), attempt=2, checkpoint=True, turns=3))
        ended = results[n]
        events.append(event(end, "trial.ended", trial=ended.trial_id, outcome=ended.outcome, reward=ended.reward, cause=ended.cause))
    events.append(event(length / 2, "store.lost", store="run/store-0/1", reason="actor died"))
    events.append(event(length / 3, "gateway.lost", gateway="run/gateway-0/1", reason="actor died"))
    return list(results.values()), events


def event(after: float, name: str, **fields: Any) -> JSON:
    return {"time": BEGAN + after, "event": name, "source": "supervisor", **fields}


def moved(trial_id: str, at: float, lost: str, reason: str, *, epoch: int, rng: random.Random) -> list[JSON]:
    session, took = f"{trial_id}~1", round(rng.expovariate(1), 3)
    told = {"seconds": took, "reason": loss_of(reason), "detect_s": 0.0}
    return [
        event(at + 0.2, "session.moved", session=session, engine="engine-9", epoch=epoch, source_engine=lost),
        event(at + 0.2 + took, "session.resumed", session=session, engine="engine-9", epoch=epoch, **told),
    ]


def result(trial_id: str, *, tokens: int = 100, seconds: float = 10.0) -> TrialResult:
    return TrialResult(trial_id, trial_id, "completed", 1.0, "", 1, 3, 0, tokens, 0, 0, round(seconds, 3))


def met(r: TrialResult, rng: random.Random) -> TrialResult:
    """The same trial, when its engine was lost: now and then it is lost with it."""
    r = replace(r, faults_survived=r.faults_survived + 1, tokens_reused=r.tokens_reused + 7, tokens_wasted=r.tokens_wasted + 11)
    if rng.random() < 0.2:
        return replace(r, outcome="infra_exhausted", reward=None, cause="engine_lost", attempts=4, faults_survived=0)
    return replace(r, attempts=r.attempts + (rng.random() < 0.3))


def written(directory: Path, results: list[TrialResult], events: list[JSON], **summary: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "trials.jsonl").write_text("".join(json.dumps(r.line()) + "\n" for r in results))
    (directory / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (directory / "summary.json").write_text(json.dumps({**totals(results), "unfinished": 0, "seconds": 61.5, **summary}))
    return directory
