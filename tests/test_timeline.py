"""One trial's moments: which events concern it, and how they stand among its turns."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.session.entries import FAULT, SessionEntry
from rollout_ft.telemetry.moments import Kind, Moment
from rollout_ft.telemetry.moments_made import of_entries, of_paths
from rollout_ft.telemetry.moments_told import concerning, of_events
from rollout_ft.telemetry.timeline import merged, timeline
from rollout_ft.telemetry.vocabulary import EVENTS
from rollout_ft.types import Answered, Divergence, Ended, Opened, Outcome, SessionSpec, Step, Turn, VersionSpan

SPEC = SessionSpec("a")


def event(name: str, time: float, **fields: Any) -> dict[str, Any]:
    return {"time": time, "event": name, "source": "supervisor", **fields}


def turn(key: str, created: float, **changed: Any) -> Turn:
    given = {
        "parent": "", "sample": 0, "depth": 1, "request_id": key, "messages": b"[]", "tools": b"", "prompt_ids": b"",
        "output_ids": b"\0" * 40, "logprobs": b"\0" * 40, "version_spans": (VersionSpan("v0", 0, 10),), "sampling": b"{}",
        "finish_reason": "stop", "reply": b"{}", "generations": 1, "engine": "engine-0", "seconds": 0.5,
    } | changed  # fmt: skip
    return Turn(key=key, created=created, **given)


FAULTY = [
    event("trial.opened", 1.25, trial="a", task="a", engine="engine-0"),
    event("trial.opened", 1.5, trial="b", task="b", engine="engine-1"),
    event("engine.doubted", 3.0, engine="engine-0", incarnation=1, reason="stalled: no token"),
    event("engine.lost", 3.5, engine="engine-0", incarnation=1, reason="stalled: no token"),
    event("engine.dead", 3.5, engine="engine-0", incarnation=1, reason="stalled: no token"),
    event("session.adopted", 3.75, session="a~1", engine="engine-1", epoch=2, turns=1),
    event("session.moved", 3.75, session="a~1", engine="engine-1", epoch=2, source_engine="engine-0"),
    event("session.resumed", 4.0, session="a~1", engine="engine-1", epoch=2, seconds=0.25, tokens=6),
    event("engine.dead", 4.5, engine="engine-0", incarnation=2, reason="exited: 1"),
    event("trial.restarted", 5.0, trial="a", attempt=2, checkpoint=True, turns=2, engine="engine-1"),
    event("gateway.lost", 5.5, gateway="g", reason="actor died"),
    event("trial.ended", 7.0, trial="a", outcome="completed", reward=1.0, cause=""),
    event("engine.dead", 8.0, engine="engine-1", incarnation=1, reason="exited: 1"),
]
ENTRIES: list[SessionEntry] = [
    Opened(SPEC, 1, False, 1), turn("k1", 2.5), turn("k2", 4.75, tokens_reused=6, generations=2, engine="engine-1"),
    Opened(SPEC, 2, True, 5), Answered("k1"), Answered("k2"), Step(2, 1, b'{"command":"ls"}', b"{}"), turn("k3", 6.5),
    Answered(failed=f"{FAULT}lost_reply"), Ended(Outcome.COMPLETED, 1.0, "", 7),
]  # fmt: skip


def kinds(moments: list[Moment]) -> list[str]:
    return [moment.kind.value for moment in moments]


def test_a_trial_met_what_befell_its_engine_while_its_session_was_there_and_nothing_else():
    told = of_events(["a", "b"], FAULTY)
    assert kinds(told["a"]) == ["opened", "doubted", "fault", "moved", "resumed", "restarted", "around", "ended"]
    assert kinds(told["b"]) == ["opened", "around", "fault"]
    assert [moment.time for moment in told["b"] if moment.kind is Kind.FAULT] == [8.0]


def test_a_moment_says_in_a_sentence_what_came():
    said = {moment.kind: moment.text for moment in timeline("a", FAULTY)}
    assert said[Kind.FAULT] == "its engine engine-0 was lost: stalled: no token"
    assert said[Kind.MOVED] == "its session went from engine-0 to engine-1"
    assert said[Kind.RESUMED] == "next token at engine-1 after 0.25 s, behind 6 tokens of before"
    assert said[Kind.RESTARTED] == "attempt 2 begins at engine-1 from its checkpoint of 2 turns"
    assert said[Kind.ENDED] == "completed, reward 1.0"


def test_turns_stand_among_the_events_of_their_time_and_what_both_know_is_there_once():
    moments = timeline("a", FAULTY, of_entries(ENTRIES))
    assert kinds(moments) == [
        "opened", "turn", "doubted", "fault", "moved", "resumed", "turn", "restarted", "replayed", "step", "around",
        "turn", "fault", "ended",
    ]  # fmt: skip
    assert [moment.text for moment in moments if moment.kind in (Kind.TURN, Kind.REPLAYED)] == [
        "turn 1: 10 tokens in 0.5 s at engine-0, stop",
        "turn 2: 10 tokens in 0.5 s at engine-1, stop, 6 of them from before a fault, 2 generations",
        "turns 1 to 2 replayed from the checkpoint",
        "turn 3: 10 tokens in 0.5 s at engine-0, stop",
    ]


def test_where_a_session_began_follows_from_where_it_went_when_no_event_says_it():
    older = [{k: v for k, v in e.items() if k != "engine" or e["event"] != "trial.opened"} for e in FAULTY]
    assert Kind.FAULT in [moment.kind for moment in timeline("a", older)]


def test_a_trajectory_has_the_turns_that_are_trained_each_once():
    first = {"turn": "k1", "start": 3, "end": 13, "finish_reason": "stop", "generations": 1, "created": 2.5}
    second = first | {"turn": "k2", "created": 4.75, "tokens_wasted": 1, "engine": "engine-1"}
    moments = of_paths([{"turns": [first, second]}, {"turns": [first]}])
    assert [moment.text for moment in moments] == ["turn 1: 10 tokens, stop", "turn 2: 10 tokens at engine-1, stop, 1 token in vain"]


def test_a_divergence_is_told_once_with_what_differed():
    told = event("trial.diverged", 6.0, trial="a", attempt=2, turn=1, recorded="12:00", sent="12:01", served=True, message=1)
    diverged = Answered(diverged=Divergence("b", "k1", 1, 1, "user", "content", "12:00", "12:01", served=True))
    moments = timeline("a", [*FAULTY[:10], told], of_entries([*ENTRIES[:4], diverged]))
    assert [moment.text for moment in moments if moment.kind is Kind.DIVERGED] == [
        "the replay left the record at turn 1, and was served from it: '12:00' was recorded, '12:01' came"
    ]


def test_what_befell_a_turn_is_told_with_its_number_and_its_tokens():
    turns = {
        "replayed": {"tokens": 10}, "attached": {"tokens": 10}, "continued": {"tokens": 10, "tokens_reused": 6},
        "regenerated": {"tokens": 1, "tokens_wasted": 6, "generations": 2},
    }  # fmt: skip
    events = [event(f"turn.{how}", 4.0 + n, session="a~1", engine="e", turn=n, **told) for n, (how, told) in enumerate(turns.items(), 1)]
    spent = {"replayed": 2, "tokens_wasted_by": {"regenerated": 6, "scratch": 0, "left_out": 3}}
    moments = timeline("a", [*events, event("trial.ended", 9.0, trial="a", outcome="completed", reward=1.0, cause="", **spent)])
    assert [moment.text for moment in moments] == [
        "turn 1 went out again at e, as it was committed: 10 tokens",
        "turn 2 was asked for again at e while it was generated, and went out as one: 10 tokens",
        "turn 3 went on at e: 6 of its 10 tokens are from before",
        "turn 4 was sampled again from its beginning at e: 1 token, 6 tokens in vain",
        "completed, reward 1.0; 2 turns replayed, 9 tokens dropped (6 regenerated, 3 left_out)",
    ]
    assert [(moment.turn, moment.tokens) for moment in moments[:-1]] == [(1, 10), (2, 10), (3, 10), (4, 1)]
    assert Kind.OTHER not in [moment.kind for moment in moments]


MOMENTS = st.lists(
    st.builds(Moment, st.integers(0, 9).map(float), st.sampled_from(list(Kind)), st.just(""), st.integers(1, 3)), max_size=20
)


def the_same(one: Moment, other: Moment) -> bool:
    once = one.kind in (Kind.OPENED, Kind.ENDED)
    return one.kind is other.kind and (once or (one.kind in (Kind.RESTARTED, Kind.DIVERGED) and one.attempt == other.attempt))


@settings(deadline=None)
@given(MOMENTS, MOMENTS)
def test_nothing_is_lost_and_the_order_of_the_checkpoint_holds(told: list[Moment], made: list[Moment]):
    told = sorted(told, key=lambda moment: moment.time)
    marked = [Moment(m.time, m.kind, f"made {i}", m.attempt) for i, m in enumerate(made)]
    moments = merged(told, marked)
    times = [moment.time for moment in moments]
    assert times == sorted(times)
    kept = [moment.text for moment in moments if moment.text]
    assert kept == sorted(kept, key=lambda text: int(text.split()[1]))
    assert {m.text for m in marked} - set(kept) == {m.text for m in marked if any(the_same(m, other) for other in told)}
    assert len(moments) == len(told) + len(kept)


WORLD = st.lists(
    st.tuples(st.sampled_from(["open", "move", "dead", "end"]), st.sampled_from("ab"), st.sampled_from(["engine-0", "engine-1"])),
    max_size=40,
)


@settings(deadline=None)
@given(WORLD)
def test_a_fault_is_met_exactly_where_a_session_is(steps: list[tuple[str, str, str]]):
    at: dict[str, str] = {}
    events: list[dict[str, Any]] = []
    met = {"a": 0, "b": 0}
    for time, (what, trial, engine) in enumerate(steps):
        match what:
            case "open":
                at[trial] = engine
                events.append(event("trial.restarted", time, trial=trial, attempt=1, checkpoint=True, engine=engine))
            case "move" if trial in at:
                events.append(event("session.moved", time, session=f"{trial}~1", engine=engine, source_engine=at[trial]))
                at[trial] = engine
            case "dead":
                events.append(event("engine.dead", time, engine=engine, reason="exited"))
                for each in [each for each, where in at.items() if where == engine]:
                    met[each] += 1
                    at[each] = ""
            case "end":
                events.append(event("trial.ended", time, trial=trial, outcome="completed", reward=None))
                at.pop(trial, None)
            case _:
                pass
    told = of_events("ab", events)
    assert {trial: kinds(told[trial]).count("fault") for trial in "ab"} == met


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(EVENTS)), st.sampled_from(["a", "b7", "trial", "", "trials"])), max_size=30))
def test_of_lines_that_have_nothing_in_them_that_concerns_a_trial_nothing_is_told(steps: list[tuple[str, str]]):
    def about(name: str, whom: str) -> dict[str, Any]:
        if name.startswith("session."):
            return {"session": f"{whom or 'other'}~1", "epoch": 2}
        return {} if not whom else {"trials": ["b7", "a"]} if whom == "trials" else {"trial": whom}

    first = event("trial.opened", 0, trial="b7", engine="e0")
    events = [first, *(event(name, n, engine="e0", **about(name, whom)) for n, (name, whom) in enumerate(steps, start=1))]
    read = [each for each in events if any(part in orjson.dumps(each) for part in concerning("b7"))]
    assert timeline("b7", read) == timeline("b7", events)
