"""What is counted of a run: the sums, however late or often they are told, and the counting where turns pass."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
from conftest import ask, assistant, user
from hypothesis import given
from hypothesis import strategies as st
from test_gateway import stage
from test_host import SID, World, played

from rollout_ft.engine.crash import describe
from rollout_ft.engine.driver import FAILED
from rollout_ft.engine.gate import Closed
from rollout_ft.engine.patience import STALLED
from rollout_ft.engine.process import Exit
from rollout_ft.fleet.engines import SILENT
from rollout_ft.samples.trajectory import metadata
from rollout_ft.telemetry import metrics as m
from rollout_ft.telemetry.losses import Loss, loss_of
from rollout_ft.telemetry.metrics import COUNTERS, GAUGES, HISTOGRAMS, MAX_POOLS, Counts, Readings, Uncounted, whose
from rollout_ft.telemetry.totals import COUNTED_SINCE, Totals, seeds
from rollout_ft.types import JSON, Ended, Outcome, SessionSpec

MINE = ("train", "default")


def turns(totals: Totals) -> int:
    return totals.counted().get((m.TURNS_COMMITTED, *MINE), 0)


# -- sums ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["count", "tell", "again", "late", "silent", "restart"])), max_size=60))
def test_told_late_twice_or_not_at_all_the_sum_is_what_every_owner_last_told(steps: list[tuple[int, str]]) -> None:
    totals, lived = Totals(), [1, 1, 1]
    counted, told, said = [0, 0, 0], [0, 0, 0], [[Readings()], [Readings()], [Readings()]]
    gone = 0
    for owner, step in steps:
        role = f"engine-{owner}"
        match step:
            case "count":
                counted[owner] += 1
            case "tell":
                said[owner].append(Readings({(m.TURNS_COMMITTED, *MINE): counted[owner]}))
                told[owner] = counted[owner]
                totals.take(role, lived[owner], said[owner][-1])
            case "again":
                totals.take(role, lived[owner], said[owner][-1])
            case "late":
                totals.take(role, lived[owner], said[owner][0])
            case "silent":
                totals.take(role, lived[owner], None)
            case _:  # what it had counted since is lost with it
                gone += told[owner]
                counted[owner] = told[owner] = 0
                lived[owner], before = lived[owner] + 1, said[owner][-1]
                totals.take(role, lived[owner], Readings())
                totals.take(role, lived[owner] - 1, before)
                said[owner] = [Readings()]
        assert turns(totals) == gone + sum(told)


def test_everything_begins_at_zero():
    flat = Totals().flat()
    assert set(flat.values()) == {0}
    assert {"rollout_ft/turns_served/replayed", "rollout_ft/engines_lost/process", "rollout_ft/turns_parked/paused"} <= flat.keys()
    assert (m.TURNS_SERVED, "fresh", "eval", "default") in seeds(COUNTERS.values())
    assert (m.ENGINES, "healthy") in Totals().gauges()


def test_it_is_said_since_when_a_supervisor_counts():
    assert Totals(since=1700.5).flat()[COUNTED_SINCE] == 1700.5


def test_no_label_is_an_id():
    labels = {label for metric in (COUNTERS | GAUGES | HISTOGRAMS).values() for label in metric.labels}
    assert labels == {"mode", "pool", "outcome", "status", "kind", "reason", "start", "state", "cause", "count", "le"}


def test_pools_without_end_are_counted_as_one():
    counts = Counts()
    for i in range(1000):
        counts.add(m.TURNS_COMMITTED, *whose(SessionSpec("t", mode="eval", pool=f"pool-{i}")))
    counts.add(m.TURNS_COMMITTED, "train", "pool-1")
    assert len(counts.values) == MAX_POOLS + 2
    assert counts.values[m.TURNS_COMMITTED, "eval", "other"] == 1000 - MAX_POOLS
    assert counts.values[m.TURNS_COMMITTED, "train", "pool-1"] == 1


def test_what_waits_at_an_actor_that_no_longer_answers_is_not_shown():
    totals = Totals()
    totals.take("engine-0", 1, Readings(gauges={(m.TURNS_PARKED, "paused"): 3}))
    totals.take("engine-1", 1, Readings(gauges={(m.TURNS_PARKED, "paused"): 2}))
    assert totals.gauges()[m.TURNS_PARKED, "paused"] == 5
    totals.take("engine-0", 1, None)
    assert totals.flat()["rollout_ft/turns_parked/paused"] == 2


def test_flat_sums_over_labels_and_by_the_first():
    totals = Totals()
    for outcome, mode, count in (("fresh", "train", 3), ("fresh", "eval", 1), ("replayed", "train", 2)):
        totals.counts.add(m.TURNS_SERVED, outcome, mode, "default", by=count)
    totals.counts.add(m.TOKENS_GENERATED, *MINE, by=7)
    flat = totals.flat()
    assert (flat["rollout_ft/turns_served"], flat["rollout_ft/turns_served/fresh"], flat["rollout_ft/turns_served/replayed"]) == (6, 4, 2)
    assert flat["rollout_ft/tokens_generated"] == 7
    assert "rollout_ft/tokens_generated/train" not in flat


# -- transitions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "loss"),
    [
        (describe(Exit(-9), ""), "process"), (describe(Exit(1), ""), "process"),
        (describe(Exit(None), ""), "process"), ("actor died: it was killed", "actor"), (SILENT, "silent"),
        ("missed pings", "silent"), (f"{STALLED}no token of any of its 3 calls for 9.0 s", "stalled"),
        (f"{FAILED}3 requests in a row", "requests"), ("probes: 3 in a row were not answered while it was idle", "probes"),
        ("connection: ClientOSError", "connection"), ("/pause_generation: TimeoutError", "connection"), ("who knows", "other"),
    ],
)  # fmt: skip
def test_a_loss_is_counted_by_what_was_seen(reason: str, loss: str):
    totals = Totals()
    totals.saw({"event": "engine.dead", "engine": "engine-0", "incarnation": 1, "reason": reason})
    assert (loss_of(reason), totals.flat()[f"rollout_ft/engines_lost/{loss}"]) == (loss, 1)


def test_an_engine_that_never_came_up_is_a_failed_start_and_its_next_loss_is_not():
    totals = Totals()
    totals.saw({"event": "engine.start_failed", "engine": "engine-0", "incarnation": 1, "reason": "exited: 1"})
    totals.saw({"event": "engine.dead", "engine": "engine-0", "incarnation": 1, "reason": "exited: 1"})
    totals.saw({"event": "engine.dead", "engine": "engine-0", "incarnation": 2, "reason": "exited: 1"})
    assert [totals.flat()[f"rollout_ft/engines_lost/{why}"] for why in ("start", "process")] == [1, 1]


def ended(outcome: str = "completed", **tokens: int) -> JSON:
    told = {name: tokens.get(name, 0) for name in ("tokens_generated", "tokens_reused", "tokens_wasted")}
    return {"event": "trial.ended", "outcome": outcome, "mode": "train", "pool": None, **told}


def test_tokens_that_died_with_the_actor_that_had_counted_them_are_counted_when_their_trial_ends():
    totals = Totals()
    totals.take("engine-0", 1, Readings({(m.TOKENS_GENERATED, *MINE): 5}))
    totals.saw(ended(tokens_generated=12, tokens_reused=3, tokens_wasted=2))
    flat = totals.flat()
    assert [flat[f"rollout_ft/tokens_{what}"] for what in ("generated", "reused", "wasted")] == [12, 3, 2]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50))))
def test_when_all_trials_have_ended_their_tokens_are_those_of_their_summaries(trials: list[tuple[int, int]]):
    """`counted`: what was told of a trial's tokens, before its end or after it: not those whose actor died with its count."""
    totals, told = Totals(), 0
    for number, (sampled, counted) in enumerate(trials):
        told += min(sampled, counted)
        tell = partial(totals.take, "engine-0", 1, Readings({(m.TOKENS_GENERATED, *MINE): told}))
        for happens in (tell, partial(totals.saw, ended(tokens_generated=sampled)))[:: 1 if number % 2 else -1]:
            happens()
    assert totals.flat()["rollout_ft/tokens_generated"] == sum(sampled for sampled, _ in trials)


def test_ends_restarts_moves_and_recoveries_are_counted_from_their_events():
    totals = Totals()
    for event in (
        ended("completed"), {"event": "trial.restarted", "checkpoint": True, "reason": "infra"},
        {"event": "trial.restarted", "checkpoint": False, "reason": ""}, {"event": "session.moved"}, {"event": "view.opened"},
        {"event": "session.resumed", "seconds": 0.5, "reason": "stalled"}, {"event": "session.resumed", "seconds": 1.25, "reason": "moved"},
    ):  # fmt: skip
        totals.saw(event)
    flat = totals.flat()
    assert [flat[f"rollout_ft/attempts_restarted{at}"] for at in ("", "/checkpoint", "/scratch")] == [2, 1, 1]
    assert (flat["rollout_ft/trials_finished/completed"], flat["rollout_ft/sessions_moved"]) == (1, 1)
    assert (flat["rollout_ft/recovery_seconds/count"], flat["rollout_ft/recovery_seconds/sum"]) == (2, 1.75)


# -- where turns pass ---------------------------------------------------------------------------------------------


def counted(w: World) -> dict[str, float]:
    totals = Totals()
    totals.take("engine-0", 1, w.host._driver.readings())
    return totals.flat()


def test_a_host_counts_turns_by_how_they_were_had_and_tokens_once():
    async def play(w: World) -> None:
        first = w.ask(ask(user("a")))
        call = await w.engine.call(0)
        second = w.ask(ask(user("a"), retry=True))
        await asyncio.sleep(1)
        call.says = "four"
        call.go.set()
        await first
        await second
        await w.host.serve(SID, ask(user("a"), retry=True))
        await w.answered(ask(user("a"), assistant("four"), user("b")))
        seen = counted(w)
        assert [seen[f"rollout_ft/turns_served/{how}"] for how in ("fresh", "attached", "replayed", "continued")] == [2, 1, 1, 0]
        assert (seen["rollout_ft/turns_committed"], seen["rollout_ft/turns_acknowledged"]) == (2, 1)
        assert (seen["rollout_ft/generations/finished"], seen["rollout_ft/commits/turn"], seen["rollout_ft/commits/open"]) == (2, 2, 1)
        assert seen["rollout_ft/tokens_generated"] == metadata(w.host.session(SID))["tokens_generated"] == 7

    played(play)


def test_tokens_generated_agree_with_the_trials_summary_also_after_a_start_from_nothing():
    async def play(w: World) -> None:
        await w.answered(ask(user("a")), "lost")
        flying = w.ask(ask(user("a"), assistant("lost"), user("b")))
        await w.engine.call(1)
        flying.cancel()
        await w.host.retire(SID)
        session = await w.host.open("t1", 2, 1, None, False)
        number = len(w.engine.calls)
        asked = asyncio.create_task(w.host.serve(session.id, ask(user("a"))))
        call = await w.engine.call(number)
        call.says = "kept"
        call.go.set()
        await asked
        ended = await w.host.end(session.id, Ended(Outcome.COMPLETED, 1.0, "", 0))
        about = metadata(ended)
        assert counted(w)["rollout_ft/tokens_generated"] == about["tokens_generated"]
        assert about["tokens_wasted"] == sum(about["tokens_wasted_by"].values()) >= 5
        assert about["tokens_wasted_by"]["scratch"] >= 4

    played(play)


def test_a_hosts_turns_are_timed_to_their_first_token_and_its_commits():
    async def play(w: World) -> None:
        await w.answered(ask(user("a")))
        await w.host.serve(SID, ask(user("a"), retry=True))
        seen = counted(w)
        assert seen["rollout_ft/first_token_seconds/count"] == 1, "a replay has none"
        assert 0 < seen["rollout_ft/first_token_seconds/p99"] < 60
        assert seen["rollout_ft/commit_seconds/count"] == seen["rollout_ft/commits"] >= 2

    played(play)


@pytest.mark.parametrize(("resent", "seconds"), [(True, 4 + 9), (False, 0)])
def test_a_recovery_is_counted_from_the_loss_where_a_turn_was_in_flight_else_from_the_takeover(resent: bool, seconds: float):
    async def play(w: World) -> None:
        other = w.another_host()
        await other.adopt(SID, 2, Loss("stalled", ago_s=4, unseen_s=9))
        asked = asyncio.create_task(other.serve(SID, ask(user("a"), resent=resent)))
        call = await w.engine.call(0)
        call.go.set()
        await asked
        [event] = [e for e in other._events.take() if e["event"] == "session.resumed"]
        assert (event["reason"], event["detect_s"]) == ("stalled", 9)
        assert event["seconds"] == pytest.approx(seconds, abs=2)

    played(play)


def test_counting_that_is_off_counts_nothing():
    counts = Uncounted()
    counts.add(m.TURNS_COMMITTED, *MINE)
    counts.observe(m.TURN_SECONDS, 1.0, *MINE)
    assert counts.values == {}


def test_a_commit_that_was_refused_is_counted_by_why():
    async def play(w: World) -> None:
        flying = w.ask(ask(user("a")))
        call = await w.engine.call(0)
        await w.another_host().adopt(SID, 2)
        call.go.set()
        with pytest.raises(Exception, match=SID):
            await flying
        assert counted(w)["rollout_ft/commits_refused/stale_owner"] == 1
        assert counted(w)["rollout_ft/turns_committed"] == 0

    played(play)


def test_what_waits_for_an_engine_is_parked_under_its_cause_until_it_opens():
    async def play(w: World) -> None:
        gate = w.host._driver.gate
        gate.close(Closed.UPDATING)
        gate.close(Closed.PAUSED)
        asked = w.ask(ask(user("a")))
        await asyncio.sleep(1)
        assert [counted(w)[f"rollout_ft/turns_parked{cause}"] for cause in ("", "/paused", "/updating")] == [1, 1, 0]
        gate.open(Closed.PAUSED)
        assert [counted(w)[f"rollout_ft/turns_parked{cause}"] for cause in ("", "/paused", "/updating")] == [1, 0, 1]
        gate.open(Closed.UPDATING)
        (await w.engine.call(0)).go.set()
        await asked
        assert counted(w)["rollout_ft/turns_parked"] == 0

    played(play)


async def test_a_gateway_counts_its_requests_by_their_status():
    async with stage() as s:
        for path in ("/health", "/openapi.json", "/sessions/no/such/route", "/fleet"):
            async with s.http.get(s.url + path) as answer:
                await answer.read()
        totals = Totals()
        totals.take("gateway-0", 1, s.gateway.readings())
        assert [totals.flat()[f"rollout_ft/requests/{status}"] for status in ("2xx", "4xx", "5xx")] == [2, 2, 0]
