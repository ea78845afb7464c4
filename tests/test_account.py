"""A run as its events tell it, whatever the order in which they were collected."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from typing import Any

import orjson
import pytest
from conftest import make_session
from hypothesis import given
from hypothesis.strategies import integers, lists, randoms, sampled_from, tuples

from rollout_ft.samples.trajectory import metadata
from rollout_ft.telemetry.account import MAX_LATELY, MISSED, ROTATED, Account, account, faults_survived
from rollout_ft.types import JSON, Opened, Why

NOTHING = {"regenerated": 0, "scratch": 0, "left_out": 0}


def event(name: str, source: str = "supervisor:a", **fields: Any) -> JSON:
    return {"time": 0.0, "event": name, "source": source, **fields}


def ended(trial: str, outcome: str = "completed", **sums: int) -> JSON:
    told = {name: sums.get(name, 0) for name in ("attempts", "turns", "tokens_generated", "tokens_reused", "tokens_wasted")}
    return event("trial.ended", trial=trial, outcome=outcome, tokens_wasted_by=NOTHING | {"left_out": told["tokens_wasted"]}, **told)


def opened(trial: str) -> JSON:
    return event("trial.opened", trial=trial, task=trial)


def moved(session: str, epoch: int) -> JSON:
    return event("session.moved", session=session, engine="engine-1", epoch=epoch, source_engine="engine-0")


def resumed(session: str, epoch: int) -> JSON:
    return event("session.resumed", "run/engine-1/1", session=session, engine="engine-1", epoch=epoch, seconds=0.5)


def restarted(trial: str, attempt: int, reason: str = "infra") -> JSON:
    return event("trial.restarted", trial=trial, attempt=attempt, checkpoint=True, turns=0, reason=reason, cause="")


def numbered(events: list[JSON]) -> list[JSON]:
    counts = defaultdict[str, Iterator[int]](lambda: count(1))
    return [{**each, "seq": next(counts[each["source"]])} for each in events]


def test_what_the_trials_that_ended_have_sampled_is_added_up():
    made = account([opened("a"), opened("b"), ended("a", tokens_generated=5, tokens_wasted=2), ended("b", "infra_exhausted", attempts=3)])
    assert (made.opened, made.running, dict(made.outcomes)) == (2, {}, {"completed": 1, "infra_exhausted": 1})
    assert (made.sums["tokens_generated"], made.sums["attempts"], made.wasted["left_out"]) == (5, 3, 2)


def test_a_trial_whose_end_is_told_twice_ended_once():
    made = account([opened("a"), ended("a", tokens_generated=5), ended("a", tokens_generated=5)])
    assert (made.sums["tokens_generated"], made.outcomes["completed"]) == (5, 1)


def test_a_takeover_is_settled_by_the_next_token_whichever_actor_tells_first():
    for order in ([moved("a~1", 2), resumed("a~1", 2)], [resumed("a~1", 2), moved("a~1", 2)]):
        made = account([opened("a"), *order])
        assert (dict(+made.recoveries), made.moving, made.recovered_s) == ({"resumed": 1}, {}, 0.5)


def test_a_token_of_an_earlier_owner_settles_no_later_takeover():
    made = account([opened("a"), moved("a~1", 2), moved("a~1", 3), resumed("a~1", 2)])
    assert (dict(+made.recoveries), made.moving) == ({"moved again": 1}, {"a~1": 3})


def test_a_restart_and_an_end_settle_what_is_under_way():
    made = account([opened("a"), moved("a~1", 2), restarted("a", 2), moved("a~2", 2), ended("a")])
    assert (dict(+made.recoveries), made.moving, made.restarts["infra"]) == ({"restarted": 1, "ended": 1}, {}, 1)


def test_an_engine_is_down_until_it_is_up_again_or_is_not_wanted_any_more():
    dead = [event("engine.dead", engine=f"engine-{n}", incarnation=1, reason="exited: 1") for n in range(3)]
    made = account(
        [*dead, event("engine.up", engine="engine-0", incarnation=2), event("engine.retired", engine="engine-1", reason="drained")]
    )
    assert (made.down, dict(made.lost)) == ({"engine-2": "exited: 1"}, {"engine: process": 3})


def test_numbers_that_are_left_out_are_missing_and_those_seen_before_are_not_counted():
    first, second, third = numbered([opened("a"), opened("b"), opened("c")])
    made = account([first, third, third, first, event(MISSED, "run", count=4)])
    assert (made.missing, made.missed, made.opened) == (1, 4, 2)
    assert account([first, second, third]).missing == 0


def test_processes_ran_from_their_start_to_their_last_event_and_nothing_passes_between_them():
    def at(time: float, name: str, **fields: Any) -> JSON:
        return event(name, **fields) | {"time": time}

    events = [at(10, "run.started", gateway_url="u"), at(40, "engine.up", engine="e"), at(35, "engine.up", engine="f"),
              at(100, "run.resumed"), at(112, "run.started", gateway_url="u"), at(120, "engine.up", engine="e")]  # fmt: skip
    for cut in range(len(events)):
        before = orjson.loads(orjson.dumps(account(events[:cut]).json()))
        assert account([event(ROTATED, "run", account=before), *events[cut:]]).seconds == 30 + 8


LIVES = lists(
    tuples(sampled_from("abcdef"), integers(0, 9), integers(0, 9), sampled_from(["move", "restart", "none"])), unique_by=lambda t: t[0]
)


def history(lives: list[tuple[str, int, int, str]], rng: random.Random) -> list[JSON]:
    """Trials at once: each opened, perhaps moved or restarted, ended; interleaved, each in its order."""
    tracks: list[list[JSON]] = []
    for trial, generated, wasted, met in lives:
        between = {"move": [moved(f"{trial}~1", 2), resumed(f"{trial}~1", 2)], "restart": [restarted(trial, 2)], "none": []}[met]
        tracks.append([opened(trial), *between, ended(trial, tokens_generated=generated + wasted, tokens_wasted=wasted)])
    made: list[JSON] = []
    while any(tracks):
        made.append(rng.choice([track for track in tracks if track]).pop(0))
    return numbered(made)


@given(LIVES, randoms(use_true_random=False))
def test_every_trial_takeover_and_token_is_accounted_for(lives: list[tuple[str, int, int, str]], rng: random.Random):
    made = account(history(lives, rng))
    assert (made.opened, made.running, made.moving, made.missing) == (len(lives), {}, {}, 0)
    assert made.sums["tokens_wasted"] == made.wasted["left_out"] == sum(wasted for _, _, wasted, _ in lives)
    assert made.recoveries["resumed"] == sum(met == "move" for *_, met in lives)


@given(LIVES, randoms(use_true_random=False), integers(0, 30))
def test_the_account_of_what_is_not_kept_and_the_rest_are_the_account_of_all(lives: Any, rng: random.Random, cut: int):
    events = history(lives, rng)
    before = orjson.loads(orjson.dumps(account(events[:cut]).json()))
    assert account([event(ROTATED, "run", account=before), *events[cut:]]) == account(events)


def test_what_another_version_told_is_missing_and_ends_nothing():
    made = account([opened("a"), event("trial.ended", trial="a", outcome="completed"), {"time": 0.0}, opened("b"), ended("b")])
    assert (made.missing, made.opened, made.outcomes["completed"], made.running) == (2, 2, 1, {"a": 1})


@pytest.mark.parametrize(
    ("reasons", "met"),
    [(("infra", "environment", "resumed"), 3), (("agent", "asked", "versions", ""), 0), (("agent", "infra", "asked"), 1)],
)
def test_a_fault_that_was_survived_is_none_of_an_agent_a_trainer_or_a_person(reasons: tuple[str, ...], met: int):
    session = make_session()
    again = [Opened(session.spec, number, True, number, why=Why(reason)) for number, reason in enumerate(reasons, start=2)]
    session.restore([Opened(session.spec, 1, False, 1), *again], [])
    trial = {"outcome": "completed", "attempt": session.attempt, "metadata": metadata(session)}
    assert (session.attempt, faults_survived(trial)) == (len(reasons) + 1, met)


def test_a_token_that_is_told_of_after_its_trials_end_is_not_kept():
    made = account([opened("a"), ended("a"), resumed("a~1", 2)])
    assert made.early == {}


def test_it_grows_with_what_is_under_way_alone():
    made = Account()
    for number in range(MAX_LATELY + 1000):
        for each in (opened(f"t{number}"), moved(f"t{number}~1", 2), resumed(f"t{number}~1", 3), ended(f"t{number}")):
            made.saw(each)
    assert (len(made.running), len(made.moving), len(made.early), len(made.lately)) == (0, 0, 0, MAX_LATELY)
