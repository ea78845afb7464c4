"""Replays that leave their record: seen where they do, and branched, ended or served as the config says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest
from conftest import assistant, turn_of, user
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import Rerendering, Trial, play, says, tool

from rollout_ft.config import TrialConfig
from rollout_ft.errors import TrialFault
from rollout_ft.samples.trajectory import metadata, trajectory
from rollout_ft.session.divergence import DIVERGED, SHOWN, _apart, words
from rollout_ft.session.session import Begin
from rollout_ft.session.tree import path_ids
from rollout_ft.trial.policy import AttemptEnd, End, Finish, Spent, decide
from rollout_ft.types import JSON, Opened, Outcome, Partial

RECORD = ["begin", "it is 10:00:00 now", "10:00:01 it says 3", "10:00:02 end"]
AGAIN = ["begin", "it is 11:30:00 now", "11:30:01 it says 3", "11:30:02 end"]


def called(name: str, arguments: str) -> JSON:
    return {
        "role": "assistant", "content": "",
        "tool_calls": [{"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}],
    }  # fmt: skip


CALLS = called("f", '{"a": 1}')


def recorded(*mode: Any, texts: list[str] = RECORD) -> Trial:
    trial = Trial(*mode)
    play(trial, texts)
    trial.restart()
    return trial


def tokens(trial: Trial) -> list[list[int]]:
    return [path["token_ids"].tolist() for path in trajectory(trial.session)["paths"]]


def test_a_replay_that_matches_is_no_divergence_and_nothing_is_compared(monkeypatch: pytest.MonkeyPatch):
    trial = recorded("fail", "timestamps")
    monkeypatch.setattr("rollout_ft.session.session.nearest", lambda *_: pytest.fail("compared"))
    got = play(trial, [*RECORD, "more"])
    assert [how for how, _ in got] == ["replayed"] * 4 + ["generated"]
    assert trial.events == []


def test_a_first_attempt_never_diverges():
    trial = Trial("fail")
    trial.ask(user("a"))
    assert trial.ask(user("b"))[0] == "generated"


def test_an_attempt_from_nothing_never_diverges():
    trial = Trial("fail")
    play(trial, RECORD)
    trial.write(Opened(trial.session.spec, 2, False, 1))
    trial.move()
    assert trial.ask(user("other"))[0] == "generated"


def test_a_branch_goes_on_from_the_last_common_turn_and_says_what_differs_first():
    trial = recorded()
    got = play(trial, AGAIN)
    assert [how for how, _ in got] == ["replayed", "generated", "generated", "generated"]
    assert got[1][1].parent is got[0][1]
    (met,) = trial.events
    assert (met.turn, met.message, met.role, met.where, met.served) == (2, 2, "user", "content", False)
    assert (met.recorded, met.sent) == ("it is 10:00:00 now", "it is 11:30:00 now")
    about = metadata(trial.session)
    assert (about["divergences"], about["first_divergence"]["where"]) == (1, "content")


def test_the_record_and_who_owns_it_next_know_of_a_divergence():
    trial = recorded()
    play(trial, AGAIN, move_at=2)
    trial.move()
    assert len(trial.events) == metadata(trial.session)["divergences"] == 1
    trial.restart()
    play(trial, ["begin", "it is noon"])
    assert len(trial.events) == metadata(trial.session)["divergences"] == 2
    assert metadata(trial.session)["first_divergence"]["sent"] == "it is 11:30:00 now"


def test_a_recorded_turn_is_left_once_and_still_there_for_who_asks_for_it_exactly():
    trial = recorded()
    trial.ask(user("begin"))
    history = [user("begin"), assistant("r0")]
    trial.ask(*history, user("another"))
    trial.ask(*history, user("yet another"))
    assert len(trial.events) == 1
    assert trial.ask(*history, user(RECORD[1]))[0] == "replayed"


def test_a_divergence_that_ends_the_trial_is_told_to_the_client_and_is_no_reward():
    trial = recorded("fail")
    with pytest.raises(TrialFault, match="turn 2: message 2"):
        play(trial, AGAIN)
    assert trial.session.fault.startswith(DIVERGED)
    ended = AttemptEnd(End.RETURNED, 1.0, fault=trial.session.fault)
    made = decide(ended, Spent(), TrialConfig())
    assert isinstance(made, Finish)
    assert (made.outcome, made.reward) == (Outcome.INFRA_EXHAUSTED, None)
    assert "it is 11:30:00 now" in made.cause


@pytest.mark.parametrize("renderer", [None, Rerendering()])
@pytest.mark.parametrize("mode", [("serve",), ("branch", "timestamps")])
def test_a_served_replay_has_the_trajectory_of_the_record_and_goes_on_from_it(mode: Any, renderer: Any):
    clean = Trial(renderer=renderer)
    play(clean, [*RECORD, "more", "and more"])
    trial = Trial(*mode, renderer=renderer)
    play(trial, RECORD)
    trial.restart()
    got = play(trial, [*AGAIN, "more", "and more"])
    assert [how for how, _ in got] == ["replayed"] * 4 + ["generated"] * 2
    assert tokens(trial) == tokens(clean)
    assert [turn.key for turn in trial.turns] == [turn.key for turn in clean.turns]
    assert len(trial.events) == (3 if mode == ("serve",) else 0)
    assert all(met.served for met in trial.events)


def test_what_needed_a_normalizer_or_was_served_is_counted():
    for mode, name in ((("branch", "timestamps"), "normalized"), (("serve",), "served")):
        trial = recorded(*mode)
        play(trial, [*AGAIN, "more"])
        assert metadata(trial.session)["leniencies"] == {name: 3}
        trial.move()
        assert metadata(trial.session)["normalized"] == (3 if name == "normalized" else 0)


def test_what_differs_behind_the_normal_form_diverges_and_is_what_is_shown():
    trial = recorded("branch", "timestamps")
    play(trial, [AGAIN[0], AGAIN[1], "11:30:01 it says 4"])
    (met,) = trial.events
    assert (met.turn, met.recorded, met.sent) == (3, "<timestamps> it says 3", "<timestamps> it says 4")


def test_the_recorded_spelling_wins_over_one_that_only_reads_the_same():
    trial = Trial("branch", "timestamps")
    first, second = trial.ask(user("at 10:00:00"))[1], trial.ask(user("at 11:00:00"))[1]
    assert first is not second, "in one attempt two texts are two"
    trial.restart()
    assert says(trial.ask(user("at 11:00:00"))[1]) == says(second)
    how, node = trial.ask(user("at 12:00:00"))
    assert (how, says(node)) == ("replayed", says(first))
    assert trial.ask(user("at 13:00:00"))[0] == "generated"


def test_another_sample_of_what_was_served_is_one_of_the_recorded_request():
    trial = recorded("serve")
    play(trial, AGAIN[:2])
    history = [user("begin"), assistant("r0"), user(AGAIN[1])]
    how, node = trial.ask(*history)
    assert (how, node.turn.sample, orjson.loads(node.turn.messages)) == ("generated", 1, [user(RECORD[1])])
    assert trial.session.tree.samples(node.base)[1] is node
    assert trial.ask(*history)[1].turn.sample == 2


def test_another_number_of_messages_or_another_role_is_not_served():
    for more in ([user(AGAIN[1]), user("and")], [{"role": "system", "content": AGAIN[1]}]):
        trial = recorded("serve")
        trial.ask(user("begin"))
        how, _ = trial.ask(user("begin"), assistant("r0"), *more)
        assert (how, trial.events[0].served) == ("generated", False)


def test_other_sampling_or_tools_are_not_served_and_named():
    trial = recorded("serve")
    assert trial.ask(user("begin"), temperature=0.5)[0] == "generated"
    assert trial.events[0].where == "sampling.temperature"
    trial = recorded("serve")
    assert trial.ask(user("begin"), tools=b'[{"a": 1}]')[0] == "generated"
    assert (trial.events[0].where, trial.events[0].message, trial.events[0].sent) == ("tools", -1, '[{"a": 1}]')


def test_a_conversation_that_is_recorded_under_other_sampling_stands_for_no_other():
    trial = Trial("serve")
    trial.ask(user("at 10:00:00"))
    trial.ask(user("at 11:00:00"), temperature=0.5)
    trial.restart()
    assert trial.ask(user("at 11:00:00"))[0] == "generated"
    assert trial.ask(user("at 11:00:00"), temperature=0.5)[0] == "replayed"


@pytest.mark.parametrize(
    ("sent", "where", "was", "now"),
    [
        ([called("f", '{"a":2}')], "tool_calls[0].function.arguments", '{"a":1}', '{"a":2}'),
        ([called("g", '{"a":1}')], "tool_calls[0].function.name", "f", "g"),
        ([CALLS | {"tool_calls": []}], "tool_calls[0].function.name", "f", ""),
        ([CALLS | {"content": "hm"}], "content", "", "hm"),
        ([user("who")], "role", "assistant", "user"),
        ([CALLS, tool("3")], "content", "2", "3"),
        ([CALLS, {**tool("2"), "name": "f"}], "name", "", "f"),
        ([CALLS, tool("2"), user("x")], "messages", "3 messages", "4 messages"),
        ([CALLS], "messages", "3 messages", "2 messages"),
    ],
)  # fmt: skip
def test_the_first_difference_names_its_field(sent: list[JSON], where: str, was: str, now: str):
    trial = Trial()
    trial.ask(user("a"), CALLS, tool("2"))
    trial.restart()
    trial.ask(user("a"), *sent)
    assert [(d.where, d.recorded, d.sent) for d in trial.events] == [(where, was, now)]
    assert where in words(trial.events[0])


def test_results_that_answer_other_calls_are_a_difference_too():
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in "xy"]
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    trial = Trial("serve")
    trial.ask(user("a"), said, {**tool("1"), "tool_call_id": "x"}, {**tool("2"), "tool_call_id": "y"})
    trial.restart()
    how, _ = trial.ask(user("a"), said, {**tool("1"), "tool_call_id": "y"}, {**tool("2"), "tool_call_id": "x"})
    (met,) = trial.events
    assert (how, met.where, met.message, met.served) == ("generated", "tool_call_id", 2, False)


def test_of_several_recorded_turns_the_most_likely_is_compared():
    trial = Trial()
    for text in ("first: list files", "second: list files", "third: list files"):
        trial.ask(user("do"), user(text))
    trial.ask(user("do"), user("second: list files"), assistant("r1"), user("on"))
    trial.restart()
    trial.ask(user("do"), user("quite another"))
    trial.ask(user("do"), user("third: list file"))
    trial.ask(user("now"), user("first: list files"))
    assert [met.recorded for met in trial.events] == ["second: list files", "third: list files", "do"], "built upon; nearer; what is left"


def test_a_prompt_in_tokens_diverges_at_its_first_other_token():
    trial = Trial("serve", "timestamps")
    trial.ask(ids=[1, 2, 3, 4])
    trial.restart()
    assert trial.ask(ids=[1, 2, 9, 4])[0] == "generated"
    assert [(d.where, d.recorded, d.sent) for d in trial.events] == [("input_ids[2]", "3, 4", "9, 4")]


def test_what_nobody_received_and_the_record_went_past_is_not_expected():
    trial = Trial("fail")
    phantom = trial.session.decide(trial.request((user("slow"),), b"", None, {}))
    assert isinstance(phantom, Begin)
    turn = replace(turn_of(phantom.flight, "late", trial.session), unheard=True)
    trial.write(turn)
    trial.session.committed(turn)
    trial.ask(user("quick"))
    trial.restart()
    assert trial.ask(user("quick"))[0] == "replayed"
    assert trial.ask(user("new"))[0] == "generated"
    assert trial.events == []


def test_each_attempt_spells_what_it_says_anew():
    trial = recorded("serve")
    play(trial, AGAIN[:2])
    trial.restart()
    assert [how for how, _ in play(trial, AGAIN)] == ["replayed"] * 4
    assert [met.turn for met in trial.events] == [2, 2, 3, 4]


def test_another_sample_of_a_recorded_request_is_no_divergence():
    trial = Trial("fail")
    trial.ask(user("a"))
    trial.ask(user("b"))
    trial.restart()
    assert [trial.ask(user("a"))[0] for _ in range(2)] == ["replayed", "generated"]
    assert trial.events == []


def test_a_turn_that_was_in_flight_when_the_agent_died_is_no_divergence():
    trial = Trial("fail")
    trial.ask(user("a"))
    met = trial.session.decide(trial.request((user("b"),), b"", None, {}))
    assert isinstance(met, Begin)
    trial.restart()
    trial.session.partials[met.flight.key] = Partial(met.flight.key, "x", "r", met.flight.prompt_digest, b"", b"", (), 1)
    assert trial.ask(user("b"))[0] == "generated"
    assert trial.events == []


def test_what_is_shown_is_short_and_can_be_written():
    trial = recorded(texts=["x" * 5000 + "a" + "y" * 5000])
    trial.ask(user("x" * 5000 + "b" + "y" * 5000))
    (met,) = trial.events
    assert len(met.recorded) <= SHOWN + 2
    assert met.recorded.lstrip("…x")[0] == "a"
    assert met.sent.lstrip("…x")[0] == "b"
    orjson.dumps(met)


@settings(deadline=None)
@given(st.text("ab", max_size=12), st.text("ab", max_size=12))
def test_texts_part_at_their_first_other_character(one: str, other: str):
    at = _apart(one, other)
    assert one[:at] == other[:at]
    assert at == min(len(one), len(other)) or one[at] != other[at]


STAMP = st.integers(0, 86399).map(lambda s: f"{s // 3600:02}:{s // 60 % 60:02}:{s % 60:02}")


@settings(deadline=None)
@given(
    st.lists(st.tuples(STAMP, STAMP, st.booleans()), min_size=1, max_size=6),
    st.integers(0, 6),
    st.integers(0, 8),
    st.sampled_from(["serve", "timestamps"]),
)
def test_wherever_the_clock_is_read_a_replay_that_may_be_served_is_the_record(
    steps: list[tuple[str, str, bool]], killed_after: int, move_at: int, how: str
):
    """Also where it is killed in the middle and the owner changes in the middle, and in the attempt after that."""
    first = [f"at {a} step {i}" for i, (a, _, _) in enumerate(steps)]
    again = [f"at {b if differs else a} step {i}" for i, (a, b, differs) in enumerate(steps)]
    clean = Trial()
    play(clean, [*first, "more"])
    trial = Trial("serve") if how == "serve" else Trial("branch", how)
    play(trial, first)
    trial.restart()
    play(trial, again[:killed_after], move_at=move_at)
    trial.restart()
    got = play(trial, [*again, "more"], move_at=move_at)
    assert [h for h, _ in got] == ["replayed"] * len(steps) + ["generated"]
    assert tokens(trial) == tokens(clean)
    assert path_ids(got[-1][1]) == path_ids(clean.session.tree.nodes[clean.turns[-1].key])


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=6))
def test_a_branch_is_counted_once_and_the_rest_of_it_is_no_divergence(differs: list[bool]):
    first = [f"step {i}" for i in range(len(differs))]
    again = [text + (" other" if other else "") for text, other in zip(first, differs, strict=True)]
    trial = recorded("branch", texts=first)
    got = play(trial, again)
    same = next((i for i, other in enumerate(differs) if other), len(differs))
    assert [how for how, _ in got] == ["replayed"] * same + ["generated"] * (len(differs) - same)
    assert [met.turn for met in trial.events] == ([same + 1] if same < len(differs) else [])
