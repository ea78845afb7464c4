"""An agent's tools, its attempts ended and its environments lost at every point: what they did, and how often."""

from __future__ import annotations

import asyncio
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.errors import BadRequest, BadTask
from rollout_ft.trial.environment import Ability, EnvironmentLost
from rollout_ft.trial.policy import Blame, End
from rollout_ft.trial.steps import Recorded, Steps, canonical, recorded_of, sequence
from rollout_ft.trial.tools import Rules, Tools

few = settings(max_examples=150, deadline=None)
STEPS = 6
ABILITIES = st.sampled_from(Ability)


class Killed(BaseException):
    """The agent, the environment or what runs both ended here."""


class World:
    """What outlives attempts: the checkpoint, the snapshots, and a count of what was done."""

    def __init__(self, ability: Ability, faults: dict[int, str] | None = None):
        self.ability, self.faults = ability, dict(faults or {})
        self.recorded: list[Recorded] = []
        self.saved: dict[str, tuple[str, ...]] = {}
        self.done: Counter[str] = Counter()
        self.living = 0
        self.calls = 0

    def environment(self, task: Any, trial_id: str, directory: Path) -> Environment:
        return Environment(self)

    async def record_step(self, number: int, action: Any, result: Any, snapshot: str) -> Recorded:
        step = Recorded(self.attempt, number, canonical(action), result, snapshot)
        self.recorded.append(step)
        return step

    def point(self, *meant: str) -> None:
        """One more point at which something may happen: what the plan says, if it is one of those that are meant."""
        self.calls += 1
        what = self.faults.get(self.calls)
        if what in meant:
            del self.faults[self.calls]
            raise EnvironmentLost("planned") if what == "environment" else Killed

    attempt = 0


class Environment:
    """Its result tells everything that was done to it before."""

    def __init__(self, world: World):
        self.world, self.ability = world, world.ability
        self.state: tuple[str, ...] = ()
        self.lives = False

    async def start(self) -> None:
        self.lives = True
        self.world.living += 1

    async def restore(self, snapshot: str) -> None:
        if snapshot not in self.world.saved:
            raise EnvironmentLost(f"{snapshot} is not there")
        await self.start()
        self.state = self.world.saved[snapshot]

    async def step(self, action: Any, key: str) -> Any:
        self.world.point("environment")
        self.world.done[action["do"]] += 1
        if self.ability is not Ability.STATELESS:
            self.state = (*self.state, action["do"])
        self.world.point("environment")
        return {"saw": blake2b("|".join((*self.state, action["do"])).encode(), digest_size=4).hexdigest()}

    async def snapshot(self) -> str:
        name = f"s{len(self.world.saved)}-{self.world.calls}"
        self.world.saved[name] = self.state
        return name

    async def forget(self, snapshot: str) -> None:
        self.world.saved.pop(snapshot, None)

    async def stop(self) -> None:
        self.world.living -= self.lives
        self.lives = False


def tools_of(world: World, *, record: bool = True, every: int = 1, lost: int = 0) -> Tools:
    world.attempt += 1
    return Tools(world.environment, {}, "t", Path("unused"), Rules(record, every, 10, 100), world, list(world.recorded), lost)


async def converse(world: World, tools: Tools, *, note: str = "") -> list[str]:
    """An agent whose next action follows from what it saw; it may be killed before and behind every step."""
    saw: list[str] = []
    for i in range(STEPS):
        world.point("agent")
        said = f"{i}{note if i >= STEPS // 2 else ''}-{saw[-1] if saw else ''}"
        saw.append((await tools.step({"do": said}))["saw"])
        world.point("agent")
    return saw


async def play(world: World, **rules: Any) -> tuple[list[str], list[Tools]]:
    """Attempt after attempt, until one is through."""
    attempts: list[Tools] = []
    while True:
        attempts.append(tools_of(world, **rules))
        try:
            return await converse(world, attempts[-1]), attempts
        except Killed:
            pass
        finally:
            await attempts[-1].close()
            assert world.living == 0, "an environment outlived its attempt"


@few
@given(ABILITIES, st.dictionaries(st.integers(1, 60), st.sampled_from(["agent", "environment"]), max_size=8), st.integers(1, 4))
def test_an_agent_sees_what_it_would_have_seen_without_faults(ability: Ability, faults: dict[int, str], every: int):
    without, _ = asyncio.run(play(World(ability)))
    saw, _ = asyncio.run(play(World(ability, faults), every=every))
    assert saw == without


@few
@given(st.sampled_from([Ability.STATELESS, Ability.EXPORT_RESTORE]), st.sets(st.integers(1, 40), max_size=6))
def test_a_step_that_is_recorded_or_saved_is_done_once_however_often_its_agent_dies(ability: Ability, kills: set[int]):
    world = World(ability, dict.fromkeys(kills, "agent"))
    asyncio.run(play(world))
    assert set(world.done.values()) == {1}


@few
@given(st.sets(st.integers(1, 40), max_size=6))
def test_without_snapshots_recorded_steps_are_taken_again_once_for_each_new_environment(kills: set[int]):
    world = World(Ability.RESTART_ONLY, dict.fromkeys(kills, "agent"))
    _, attempts = asyncio.run(play(world))
    assert sum(world.done.values()) == STEPS + sum(tools.counts.again for tools in attempts)
    assert sum(tools.counts.taken for tools in attempts) == STEPS


@few
@given(st.sets(st.integers(1, 30), min_size=1, max_size=4))
def test_a_lost_environment_costs_the_step_it_was_at_and_those_behind_the_last_snapshot(points: set[int]):
    world = World(Ability.EXPORT_RESTORE, dict.fromkeys(points, "environment"))
    _, attempts = asyncio.run(play(world))
    assert len(attempts) == 1, "the agent noticed nothing"
    assert sum(world.done.values()) <= STEPS + attempts[0].counts.lost
    assert attempts[0].counts.again == 0


async def test_an_attempt_that_takes_another_way_finds_the_state_of_where_it_left():
    world = World(Ability.EXPORT_RESTORE)
    await play(world)
    other, fresh = tools_of(world), World(Ability.EXPORT_RESTORE)
    saw = await converse(world, other, note="other")
    await other.close()
    assert saw == await converse(fresh, tools_of(fresh), note="other")
    assert other.counts.served == STEPS // 2


async def test_an_environment_whose_steps_are_all_recorded_is_never_made():
    world = World(Ability.RESTART_ONLY)
    await play(world)
    again, before = tools_of(world), Counter(world.done)
    await converse(world, again)
    assert (world.done, world.living, again.counts.taken) == (before, 0, 0)


async def test_the_kth_request_of_a_stateless_action_gets_its_kth_result_in_whatever_order_they_come():
    class Numbered(Environment):
        async def step(self, action: Any, key: str) -> Any:
            self.world.done[action["do"]] += 1
            return {"saw": f"{action['do']}{self.world.done[action['do']]}"}

    world = World(Ability.STATELESS)
    first = Tools(lambda *_: Numbered(world), {}, "t", Path("unused"), Rules(True, 1, 10, 0), world, [])
    saw = [await first.step({"do": do}) for do in "aba"]
    later = Tools(lambda *_: Numbered(world), {}, "t", Path("unused"), Rules(True, 1, 10, 0), world, list(world.recorded))
    assert [await later.step({"do": do}) for do in "baab"] == [saw[1], saw[0], saw[2], {"saw": "b2"}]


async def test_a_step_keeps_its_key_in_every_attempt():
    class Keyed(Environment):
        keys: list[str] = []  # noqa: RUF012 - of the class

        async def step(self, action: Any, key: str) -> Any:
            self.keys.append(key)
            self.world.point("agent")
            return {}

    world = World(Ability.RESTART_ONLY)
    for _ in range(2):
        tools = Tools(lambda *_: Keyed(world), {}, "t", Path("unused"), Rules(False, 1, 10, 0), world, [])
        await tools.step({"do": "a"})
        await tools.step({"do": "a"})
        await tools.close()
    assert Keyed.keys[:2] == Keyed.keys[2:]
    assert len(set(Keyed.keys)) == 2


async def test_a_step_that_has_begun_is_recorded_though_its_agent_be_gone():
    began, go = asyncio.Event(), asyncio.Event()

    class Slow(Environment):
        async def step(self, action: Any, key: str) -> Any:
            began.set()
            await go.wait()
            return await super().step(action, key)

    world = World(Ability.STATELESS)
    tools = Tools(lambda *_: Slow(world), {}, "t", Path("unused"), Rules(True, 1, 10, 0), world, [])
    agent = asyncio.create_task(tools.step({"do": "a"}))
    await began.wait()
    agent.cancel()
    go.set()
    await tools.close()
    assert [step.action for step in world.recorded] == [canonical({"do": "a"})]


async def test_an_environment_that_is_lost_too_often_is_lost_for_good_whatever_its_agent_does():
    class Dead(Environment):
        async def start(self) -> None:
            raise EnvironmentLost("no room")

    tools = Tools(lambda *_: Dead(World(Ability.STATELESS)), {}, "t", Path("unused"), Rules(True, 1, 10, 2), World(Ability.STATELESS), [])
    for _ in range(2):
        with pytest.raises(EnvironmentLost, match=r"no room; 2 environments were replaced \(trial.max_env_restarts\)"):
            await tools.step({"do": "a"})
    assert tools.counts.lost == 3
    assert tools.failed is not None
    assert (tools.failed.end, tools.failed.blame) == (End.RAISED, Blame.ENVIRONMENT)


async def test_what_a_tool_raises_is_its_result():
    class Broken(Environment):
        async def step(self, action: Any, key: str) -> Any:
            raise ValueError("no such file")

    world = World(Ability.STATELESS)
    tools = Tools(lambda *_: Broken(world), {}, "t", Path("unused"), Rules(True, 1, 10, 2), world, [])
    assert await tools.step({"do": "a"}) == {"error": "ValueError: no such file"}
    assert tools.counts.lost == 0


async def test_an_environment_that_does_not_answer_is_lost():
    class Silent(Environment):
        async def step(self, action: Any, key: str) -> Any:
            await asyncio.Event().wait()

    world = World(Ability.STATELESS)
    tools = Tools(lambda *_: Silent(world), {}, "t", Path("unused"), Rules(True, 1, 0.01, 1), world, [])
    with pytest.raises(EnvironmentLost, match=r"trial.tool_timeout_s"):
        await tools.step({"do": "a"})
    assert world.living == 0


async def test_an_agent_that_starts_from_messages_goes_on_behind_the_steps_of_these():
    world = World(Ability.EXPORT_RESTORE)
    saw, _ = await play(world)
    tools = tools_of(world)
    tools.begin_at(STEPS - 1)
    assert await tools.step({"do": f"{STEPS - 1}-{saw[-2]}"}) == {"saw": saw[-1]}
    assert (tools.counts.served, tools.counts.taken) == (1, 0)
    await tools.close()


async def test_no_more_snapshots_are_kept_than_may_be_needed_and_none_when_the_trial_is_over():
    world = World(Ability.EXPORT_RESTORE)
    _, (tools,) = await play(world)
    assert len(world.saved) == 2
    await tools.forget()
    assert not world.saved


@pytest.mark.parametrize("wrong", [None, [], "rm -rf", 3, {"do": 2**64}, {"do": {1}}])
async def test_an_action_that_json_cannot_say_is_refused_and_counts_as_nothing(wrong: Any):
    world = World(Ability.STATELESS)
    tools = tools_of(world)
    with pytest.raises(ValueError, match="an action and its result"):
        await tools.step(wrong)
    assert not world.recorded


@few
@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from("ab")), max_size=20))
def test_a_sequence_has_no_gap_and_its_last_word_on_each_step_is_the_latest(said: list[tuple[int, str]]):
    recorded = [Recorded(1, number, canonical({"do": do}), {"at": i}) for i, (number, do) in enumerate(said)]
    held = sequence(recorded)
    assert [step.number for step in held] == list(range(1, len(held) + 1))
    assert [step.result["at"] for step in held] == sorted(step.result["at"] for step in held)


@few
@given(st.dictionaries(st.text(max_size=5), st.integers(-9, 9) | st.text(max_size=5), max_size=4))
def test_what_comes_back_from_the_checkpoint_is_the_same_step(action: dict[str, Any]):
    step = recorded_of({"attempt": 1, "number": 1, "action": dict(reversed(action.items())), "result": {}, "snapshot": ""})
    steps = Steps("t", Ability.RESTART_ONLY, [step])
    assert steps.due(action).recorded is step


def tools_with(world: World, cls: type[Environment], *, lost: int = 3) -> Tools:
    return Tools(lambda *_: cls(world), {}, "t", Path("unused"), Rules(True, 1, 10, lost), world, list(world.recorded))


async def test_steps_at_once_share_one_environment_and_none_is_taken_before_it_is_there():
    class Slow(Environment):
        async def start(self) -> None:
            await asyncio.sleep(0)
            await super().start()

        async def step(self, action: Any, key: str) -> Any:
            assert self.lives
            return await super().step(action, key)

    world = World(Ability.STATELESS)
    tools = tools_with(world, Slow)
    saw = await asyncio.gather(*(tools.step({"do": str(i)}) for i in range(5)))
    assert all("saw" in each for each in saw)
    assert world.living == 1
    await tools.close()


async def test_a_task_whose_environment_cannot_be_made_is_to_blame_and_nothing_is_recorded():
    class Wrong(Environment):
        async def start(self) -> None:
            raise BadTask("no such image")

    world = World(Ability.STATELESS)
    tools = tools_with(world, Wrong)
    for _ in range(2):
        with pytest.raises(EnvironmentLost, match="no such image"):
            await tools.step({"do": "a"})
    assert tools.failed is not None
    assert (tools.failed.blame, world.recorded) == (Blame.DATA, [])


@pytest.mark.parametrize("gone", range(1, STEPS + 1))
async def test_snapshots_that_are_not_there_cost_nothing_but_the_steps_behind_those_that_are(gone: int):
    world = World(Ability.EXPORT_RESTORE)
    await play(world)
    for name in list(world.saved)[-gone:]:
        del world.saved[name]
    tools = tools_of(world)
    tools._rules = Rules(True, 1, 10, 0)  # pyright: ignore[reportPrivateUsage]
    saw = await converse(world, tools, note="other")
    fresh = World(Ability.EXPORT_RESTORE)
    assert saw == await converse(fresh, tools_of(fresh), note="other")
    assert tools.counts.lost == 0
    await tools.close()


async def test_behind_a_step_that_could_not_be_recorded_no_other_is_taken():
    world = World(Ability.RESTART_ONLY)
    tools = tools_with(world, Environment)
    await tools.step({"do": "a"})

    async def refuse(*_: Any) -> Recorded:
        raise BadRequest("the store does not answer", 503, "store_unavailable")

    tools._recorder = SimpleNamespace(record_step=refuse)  # pyright: ignore
    for _ in range(2):
        with pytest.raises(EnvironmentLost, match="the store does not answer"):
            await tools.step({"do": "b"})
    assert tools.failed is not None
    assert (tools.failed.blame, world.done) == (Blame.INFRA, {"a": 1, "b": 1})
    await tools.close()


async def test_a_timeout_of_the_tools_own_is_its_result():
    class Impatient(Environment):
        async def step(self, action: Any, key: str) -> Any:
            self.world.done["a"] += 1
            raise TimeoutError("the server did not answer")

    world = World(Ability.STATELESS)
    tools = tools_with(world, Impatient)
    assert await tools.step({"do": "a"}) == {"error": "TimeoutError: the server did not answer"}
    assert (world.done["a"], tools.counts.lost) == (1, 0)
    await tools.close()


async def test_a_death_that_several_steps_see_is_one_death():
    all_began = asyncio.Barrier(5)

    class Mortal(Environment):
        async def step(self, action: Any, key: str) -> Any:
            await all_began.wait()
            raise EnvironmentLost("died")

    world, kinds = World(Ability.STATELESS), iter([Environment, Mortal, Environment])  # the first only says what it can
    tools = Tools(lambda *_: next(kinds)(world), {}, "t", Path("unused"), Rules(True, 1, 10, 1), world, [])
    await asyncio.gather(*(tools.step({"do": str(i)}) for i in range(5)))
    assert (tools.counts.lost, len(world.recorded), world.living) == (1, 5, 1)
    await tools.close()


async def test_behind_the_end_of_an_attempt_nothing_begins():
    world = World(Ability.RESTART_ONLY)
    tools = tools_with(world, Environment)
    await tools.close()
    with pytest.raises(EnvironmentLost, match="the attempt is over"):
        await tools.step({"do": "a"})
    assert (world.living, world.done) == (0, {})


@pytest.mark.parametrize("action", [{"do": "x" * 2**24}, {"do": {"a": 1}}])
async def test_what_the_checkpoint_does_not_take_is_refused_before_the_tool_runs(action: Any):
    inner = action
    if isinstance(action["do"], dict):
        for _ in range(40):
            inner["do"] = {"do": inner["do"]}
    world = World(Ability.STATELESS)
    with pytest.raises(ValueError, match="an action and its result have at most"):
        await tools_with(world, Environment).step(inner)
    assert not world.done


async def test_an_agent_begins_behind_recorded_steps_alone_and_before_its_first():
    world = World(Ability.EXPORT_RESTORE)
    await play(world)
    tools = tools_of(world)
    tools.begin_at(10**12)
    await tools.step({"do": "more"})
    assert world.recorded[-1].number == STEPS + 1
    with pytest.raises(ValueError, match="before its first step"):
        tools.begin_at(1)
    await tools.close()
