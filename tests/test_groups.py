"""What becomes of groups, by the thousand: names and seeds, decisions, who plays next, and what a run that goes on knows."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.config import TrialConfig, load
from rollout_ft.errors import ConfigError
from rollout_ft.samples.advantages import group_advantages
from rollout_ft.trial.board import Board
from rollout_ft.trial.groups import Group, GroupResult, Replace
from rollout_ft.trial.queue import Queue
from rollout_ft.trial.schedule import Schedule
from rollout_ft.trial.siblings import Play, plays

CONFIGS = st.one_of(
    st.builds(lambda n: TrialConfig(on_lost_member="complete", max_replacements=n), st.integers(1, 4)),
    st.builds(lambda n: TrialConfig(on_lost_member="shrink", min_group_size=n), st.integers(1, 4)),
    st.just(TrialConfig(on_lost_member="drop")),
)
TASKS = st.lists(st.sampled_from(["", "", "g", "h"]), min_size=1, max_size=12).map(
    lambda groups: [{"task_id": f"t{i}"} | ({"group_id": g} if g else {}) for i, g in enumerate(groups)]
)
MORTAL = st.floats(0, 1).flatmap(lambda share: st.randoms(use_true_random=False).map(lambda rng: _Fate(rng.random(), share)))


class _Fate:
    """Which trials are lost and what the others earn: a function of the trial's name, whenever it is asked."""

    def __init__(self, seed: float, share: float):
        self._seed, self._share = seed, share

    def lost(self, trial_id: str) -> bool:
        return _unit(f"{self._seed}/lost/{trial_id}") < self._share

    def reward(self, trial_id: str) -> float | None:
        """A lost trial has one too, which must not matter."""
        drawn = _unit(f"{self._seed}/reward/{trial_id}")
        return None if drawn < 0.2 else drawn


def _unit(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32


def names(size: int) -> list[str]:
    return [f"g.{k}" for k in range(size)]


def played(group: Group, members: Sequence[str], fate: _Fate, rng: Any) -> list[str]:
    """All ends in some order, to the decision; the trials that ended until then."""
    running, ended = list(members), list[str]()
    while group.result is None:
        trial_id = running.pop(rng.randrange(len(running)))
        ended.append(trial_id)
        follows = group.ended(trial_id, lost=fate.lost(trial_id), reward=fate.reward(trial_id))
        assert follows is None or follows == group.result or isinstance(follows, Replace)
        if isinstance(follows, Replace):
            running.append(f"{follows.place}.r{follows.number}")
    return ended


# -- one group ----------------------------------------------------------------------------------------------------


@given(CONFIGS, st.integers(1, 6), MORTAL, st.randoms(use_true_random=False))
def test_what_counts_was_not_lost_and_has_its_own_reward(config: TrialConfig, size: int, fate: _Fate, rng: Any):
    group = Group("g", names(size), config)
    ended = played(group, names(size), fate, rng)
    result = group.result
    assert result is not None
    assert not any(fate.lost(trial_id) for trial_id in result.trials)
    assert result.rewards == [fate.reward(trial_id) for trial_id in result.trials]
    assert result.lost == [trial_id for trial_id in ended if fate.lost(trial_id)]
    match result.status:
        case "whole":
            assert (result.trials, result.lost) == (names(size), [])
        case "completed":
            assert len(result.trials) == size
            assert 0 < len(result.lost) <= config.max_replacements
        case "shrunk":
            assert len(result.trials) == size - len(result.lost) >= config.min_group_size
        case _:
            assert (result.trials, result.rewards) == ([], [])
            assert result.lost


@given(CONFIGS, st.integers(1, 6), MORTAL, st.randoms(use_true_random=False), st.randoms(use_true_random=False))
def test_the_order_of_the_ends_does_not_change_what_counts(config: TrialConfig, size: int, fate: _Fate, one: Any, other: Any):
    first, second = Group("g", names(size), config), Group("g", names(size), config)
    played(first, names(size), fate, one)
    played(second, names(size), fate, other)
    assert first.result is not None
    assert second.result is not None
    assert replace(first.result, lost=[]) == replace(second.result, lost=[])


@given(CONFIGS, st.integers(1, 6), MORTAL, st.randoms(use_true_random=False))
def test_a_decision_stays(config: TrialConfig, size: int, fate: _Fate, rng: Any):
    group = Group("g", names(size), config)
    played(group, names(size), fate, rng)
    decided = group.result
    line = decided and decided.line()
    for trial_id in names(size):
        assert group.ended(trial_id, lost=True, reward=1.0) is None
    assert group.result is decided
    assert line == (decided and decided.line())


def test_a_group_is_dropped_at_the_loss_that_it_does_not_survive():
    """What waits need not be played."""
    shrunk = Group("g", names(4), TrialConfig(on_lost_member="shrink", min_group_size=3))
    assert shrunk.ended("g.0", lost=True, reward=None) is None
    assert shrunk.ended("g.1", lost=True, reward=None) == GroupResult("g", "dropped", [], ["g.0", "g.1"], [])
    completed = Group("g", names(4), TrialConfig(on_lost_member="complete", max_replacements=1))
    assert completed.ended("g.2", lost=True, reward=None) == Replace("g.2", 1)
    assert completed.ended("g.2.r1", lost=True, reward=None) == GroupResult("g", "dropped", [], ["g.2", "g.2.r1"], [])


def test_who_takes_a_place_has_it_in_the_order_too():
    group = Group("g", names(3), TrialConfig(on_lost_member="complete", max_replacements=2))
    for trial_id, lost in (("g.1", True), ("g.2", False), ("g.0", False), ("g.1.r1", True)):
        group.ended(trial_id, lost=lost, reward=0.5)
    assert group.ended("g.1.r2", lost=False, reward=1.0) == GroupResult(
        "g", "completed", ["g.0", "g.1.r2", "g.2"], ["g.1", "g.1.r1"], [0.5, 1.0, 0.5]
    )


# -- a baseline ---------------------------------------------------------------------------------------------------

REWARDS = st.lists(st.one_of(st.none(), st.floats(-1e3, 1e3)), max_size=12)


@given(REWARDS)
def test_what_has_no_reward_moves_no_baseline_and_has_no_advantage(rewards: list[float | None]):
    known = [reward for reward in rewards if reward is not None]
    made = group_advantages(rewards)
    assert [advantage is None for advantage in made] == [reward is None for reward in rewards]
    assert [advantage for advantage in made if advantage is not None] == group_advantages(known)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_advantages_are_rewards_in_deviations_from_their_mean(rewards: list[float]):
    made = group_advantages(rewards)
    mean, deviation = statistics.fmean(rewards), statistics.stdev(rewards)
    for reward, advantage in zip(rewards, made, strict=True):
        assert advantage is not None
        assert math.isclose(advantage * (deviation + 1e-6), reward - mean, abs_tol=1e-6)


# -- names and seeds ----------------------------------------------------------------------------------------------


def test_a_task_is_played_as_often_as_its_group_is_large_and_its_trials_know_it():
    made = plays([{"task_id": "a"}, {"task_id": "b", "group_id": "own"}], TrialConfig(group_size=2), "x-")
    assert [(p.trial_id, p.group_id, p.task["group_id"]) for p in made] == [
        ("x-a.0", "x-a", "x-a"), ("x-a.1", "x-a", "x-a"), ("x-b", "own", "own"),
    ]  # fmt: skip


def test_without_groups_a_trial_is_called_as_its_task_and_is_given_it_as_it_is():
    tasks = [{"task_id": "a", "seed": 3}, {"task_id": "b"}]
    assert plays(tasks, TrialConfig()) == [Play("a", "", tasks[0]), Play("b", "", tasks[1])]


def test_siblings_and_replacements_of_a_task_with_a_seed_have_seeds_of_their_own():
    config = TrialConfig(group_size=4, on_lost_member="complete", max_replacements=4)
    board = Board(plays([{"task_id": "a", "seed": 3}], config), config)
    for play in board.plays:
        board.ended(play.trial_id, lost=True, reward=None)
    seeds = [play.task["seed"] for play in board.plays]
    assert len(seeds) == len({*seeds}) == 8
    again = [play.task["seed"] for play in plays([{"task_id": "a", "seed": 3}], config, "step2-")]
    assert again == [play.task["seed"] for play in board.plays if not play.replaces], "whatever the run calls its trials"


@pytest.mark.parametrize(
    ("tasks", "config", "said"),
    [
        (["a", "a"], {}, "two trials would be called a"),
        ([{"task_id": "a"}, {"task_id": "a.1", "group_id": "g"}], {"group_size": 2}, r"two trials would be called a\.1"),
        (["a", "a.r1"], {"on_lost_member": "complete", "max_replacements": 1}, r"a\.r1 is what a trial in place of a is called"),
        (["x" * 127], {"group_size": 2}, "choose a shorter task_id"),
        (["x" * 126], {"on_lost_member": "complete", "max_replacements": 1}, "choose a shorter task_id"),
        ([{"task_id": "a"}, {"task_id": "b", "group_id": "a"}], {"group_size": 2}, "group_id a is a task_id too"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(tasks: list[Any], config: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        plays([{"task_id": task} if isinstance(task, str) else task for task in tasks], TrialConfig(**config))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["trial.on_lost_member=complete"], "trial.max_replacements"),
        (["trial.max_replacements=1"], "trial.max_replacements"),
        (["trial.on_lost_member=drop", "trial.min_group_size=3"], "trial.min_group_size"),
        (["trial.group_size=2", "trial.min_group_size=3"], "trial.min_group_size"),
    ],
)
def test_rules_that_cannot_work_are_refused_at_load(overrides: list[str], key: str):
    with pytest.raises(ConfigError, match=key):
        load(None, overrides)


# -- a whole run --------------------------------------------------------------------------------------------------


def run(schedule: Schedule, fate: _Fate, rng: Any, *, stop: int = 10**6) -> tuple[list[tuple[str, bool, float | None]], list[GroupResult]]:
    """Plays until nothing is owed, or so many have ended; the ends, and the decisions as they were told."""
    running, ends, told = list[Play](), list[tuple[str, bool, float | None]](), list[GroupResult]()
    while len(ends) < stop:
        while (play := schedule.next()) is not None:
            assert play.group_id not in {decision.group_id for decision in told}, "none of a decided group is begun"
            running.append(play)
        if not running:
            break
        play = running.pop(rng.randrange(len(running)))
        end = (play.trial_id, fate.lost(play.trial_id), fate.reward(play.trial_id))
        ends.append(end)
        decided = schedule.ended(play, lost=end[1], reward=end[2])
        told += [decided] if decided else []
    return ends, told


@given(TASKS, CONFIGS, st.integers(1, 4), st.integers(1, 5), MORTAL, st.randoms(use_true_random=False))
def test_a_run_plays_every_trial_that_is_owed_once_and_decides_every_group(
    tasks: list[Any], config: TrialConfig, size: int, slots: int, fate: _Fate, rng: Any
):
    config = config.model_copy(update={"group_size": size})
    schedule = Schedule(plays(tasks, config), config, slots)
    ends, told = run(schedule, fate, rng)
    board = schedule.board
    assert len({trial_id for trial_id, _, _ in ends}) == len(ends)
    assert (board.owed, board.undecided) == ([], 0)
    assert told == board.decided
    assert len({decision.group_id for decision in told}) == len(told)
    never = {play.trial_id for play in board.plays} - {trial_id for trial_id, _, _ in ends}
    dropped = {decision.group_id for decision in told if decision.status == "dropped"}
    assert {play.group_id for play in board.plays if play.trial_id in never} <= dropped


@given(TASKS, CONFIGS, st.integers(1, 4), st.integers(0, 20), MORTAL, st.randoms(use_true_random=False))
def test_a_run_that_was_stopped_anywhere_and_goes_on_gives_the_same_groups(
    tasks: list[Any], config: TrialConfig, size: int, stop: int, fate: _Fate, rng: Any
):
    config = config.model_copy(update={"group_size": size})
    made = plays(tasks, config)
    ends, _ = run(Schedule(made, config, 3), fate, rng, stop=stop)
    second = Schedule(made, config, 3, ends)
    more, _ = run(second, fate, rng)
    assert not {trial_id for trial_id, _, _ in ends} & {trial_id for trial_id, _, _ in more}, "nothing is played twice"
    undisturbed = Schedule(made, config, 3)
    run(undisturbed, fate, rng)
    assert counted(second.board) == counted(undisturbed.board)


def counted(board: Board) -> dict[str, Any]:
    return {decision.group_id: (decision.status, decision.trials, decision.rewards) for decision in board.decided}


@given(TASKS, CONFIGS, st.integers(1, 4), MORTAL, st.randoms(use_true_random=False))
def test_decisions_are_a_function_of_the_lines_of_the_trials(tasks: list[Any], config: TrialConfig, size: int, fate: _Fate, rng: Any):
    config = config.model_copy(update={"group_size": size})
    schedule = Schedule(plays(tasks, config), config, 3)
    ends, _ = run(schedule, fate, rng)
    again = Board(plays(tasks, config), config)
    for trial_id, lost, reward in [*ends, ("of.another.run", False, 1.0), *ends]:
        again.ended(trial_id, lost=lost, reward=reward)
    assert again.decided == schedule.board.decided


def test_a_trial_that_took_a_place_says_that_the_one_before_was_lost():
    """Of one that could not be recorded there is no line."""
    config = TrialConfig(group_size=2, on_lost_member="complete", max_replacements=2)
    board = Board(plays([{"task_id": "a"}], config), config)
    board.ended("a.0", lost=False, reward=0.0)
    decided = board.ended("a.1.r2", lost=False, reward=1.0)
    assert decided == GroupResult("a", "completed", ["a.0", "a.1.r2"], ["a.1", "a.1.r1"], [0.0, 1.0])
    assert board.owed == []
    assert board.ended("b.r1", lost=False, reward=1.0) is None
    assert board.ended("a.0.r999999", lost=False, reward=1.0) is None


# -- who is next --------------------------------------------------------------------------------------------------


class Naive:
    """The same order, said in one line, at O(n) a trial."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Play, bool, int]] = []
        self.unfinished: dict[Any, int] = {}
        self.ended: set[Any] = set()

    def key(self, item: tuple[Play, bool, int]) -> Any:
        play, early, number = item
        group = of(play)
        return (self.unfinished[group] if group in self.ended else math.inf, not early, number)

    def pop(self) -> Play | None:
        if not self.waiting:
            return None
        first = min(self.waiting, key=self.key)
        self.waiting.remove(first)
        return first[0]


def of(play: Play) -> Any:
    return play.group_id or (play.trial_id,)


@given(st.lists(st.tuples(st.sampled_from(["add", "early", "pop", "end", "forget"]), st.sampled_from(["", "g", "h", "i"])), max_size=80))
def test_the_next_trial_is_the_first_in_the_order_that_is_promised(events: list[tuple[str, str]]):
    queue, naive, running = Queue(["h"]), Naive(), list[Play]()
    naive.ended.add("h")
    for number, (event, group) in enumerate(events):
        if event in ("add", "early"):
            play = Play(f"t{number}", group, {})
            queue.add(play, early=event == "early")
            naive.waiting.append((play, event == "early", number))
            naive.unfinished[of(play)] = naive.unfinished.get(of(play), 0) + 1
        elif event == "pop":
            popped = queue.pop()
            assert popped == naive.pop()
            running += [popped] if popped else []
        elif event == "end" and running:
            play = running.pop(0)
            queue.ended(play)
            naive.unfinished[of(play)] -= 1
            naive.ended.add(of(play))
        elif event == "forget" and group:
            queue.forget(Play("", group, {}))
            naive.waiting = [item for item in naive.waiting if item[0].group_id != group]
    while (popped := queue.pop()) is not None:
        assert popped == naive.pop()
    assert naive.pop() is None


def test_the_trial_that_a_group_waits_for_goes_before_older_ones():
    config = TrialConfig(on_lost_member="complete", max_replacements=1)
    tasks = [{"task_id": "a", "group_id": "g"}, {"task_id": "b", "group_id": "h"}, {"task_id": "c"}, {"task_id": "d", "group_id": "h"}]
    schedule = Schedule(plays(tasks, config), config, 2)
    a, b = schedule.next(), schedule.next()
    assert a is not None
    assert b is not None
    schedule.ended(b, lost=False, reward=1.0)
    assert (schedule.next() or a).trial_id == "d"
    schedule.ended(a, lost=True, reward=None)
    assert (schedule.next() or a).trial_id == "a.r1"


def test_after_a_stop_what_was_begun_goes_first():
    schedule = Schedule(plays([{"task_id": name} for name in "abcd"], TrialConfig()), TrialConfig(), 9, [("a", False, 1.0)], {"a", "d"})
    assert [play.trial_id for play in iter(schedule.next, None)] == ["d", "b", "c"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("groups", [1, 5000])
def test_fifty_thousand_trials_are_scheduled_in_seconds(groups: int):
    """If each had to look at the others, it would be 2,500 million steps."""
    config = TrialConfig(min_group_size=1)
    schedule = Schedule(plays([{"task_id": f"t{i}", "group_id": f"g{i % groups}"} for i in range(50_000)], config), config, 16)
    while (play := schedule.next()) is not None:
        schedule.ended(play, lost=False, reward=None)
    assert schedule.board.undecided == 0
