"""The record of engines, with actors that do as they are told: who is given up, who is spared, who is trusted again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_checkpoint_fakes import run

from rollout_ft.checkpoint.view import View
from rollout_ft.config import load
from rollout_ft.fleet import engines as module
from rollout_ft.fleet.engines import Engine, Engines
from rollout_ft.fleet.health import State
from rollout_ft.fleet.member import Gone, Member
from rollout_ft.fleet.weights import Weights
from rollout_ft.telemetry.events import Events
from rollout_ft.telemetry.losses import Loss
from rollout_ft.types import JSON

VIEW = View(1, ("store-0",), 1)


@dataclass(eq=False)
class Actor:
    """An engine's actor: `starts` or not, `beats` or not, until it is killed."""

    role: str
    incarnation: int
    starts: bool
    beats: bool = True
    loads_s: float = 0.0
    dead: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        return f"run/{self.role}/{self.incarnation}"

    async def ask(self, method: str, *_: Any, timeout_s: float = 0) -> Any:
        if not self.starts:
            raise Gone("out of memory")
        if method == "carry_out":
            return {"ok": True, "error": "", "hung": False, "version": "v0", "stale": "", "offloaded": False, "released": []}
        if method == "start":
            await asyncio.sleep(self.loads_s)
        weights = {"version": "v0", "stale": "", "offloaded": False, "released": [], "fleet": Weights()}
        return {"url": "127.0.0.1:1", "node": "here", "node_id": "n", "weights": weights, "sessions": {f"{self.role}~1": 1}}

    async def death(self) -> str:
        await self.dead.wait()
        return "killed"


class World:
    """Four engines that are up."""

    def __init__(self, **settings: Any) -> None:
        config = load(None, {"engine.count": 4, **{k.replace("__", "."): v for k, v in settings.items()}})
        self.actors: list[Actor] = []
        self.starts, self.loads_s = True, 0.0
        self.events = Events("test")
        crew = SimpleNamespace(setup=SimpleNamespace(config=config), engine=self._make, gone=self._gone, seen=lambda *_: None)
        pulse = SimpleNamespace(beats=self._beats)
        self.engines = Engines(cast(Any, crew), cast(Any, pulse), self.events, lambda: VIEW)

    async def _make(self, engine_id: str, incarnation: int, _: View, target: str) -> Member:
        self.actors.append(Actor(engine_id, incarnation, self.starts, loads_s=self.loads_s))
        return cast(Member, self.actors[-1])

    def _gone(self, member: Any, *, silent: bool = False) -> None:
        member.dead.set()

    async def _beats(self, member: Any, _: str) -> bool:
        await asyncio.sleep(0.1)
        return member.beats

    def engine(self, i: int) -> Engine:
        return self.engines.by_id[f"engine-{i}"]

    def actor(self, i: int) -> Actor:
        return cast(Actor, self.engine(i).member)

    def states(self) -> list[str]:
        return [e.health.state.value for e in self.engines.by_id.values()]

    def may_lose(self, i: int, reason: str = "stalled") -> bool:
        return self.engines.may_lose(f"engine-{i}", self.engine(i).health.incarnation, reason)

    def said(self, name: str) -> list[JSON]:
        return [e for e in self.events._buffer if e["event"] == name]


def played(play: Callable[[World], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        module.monotonic = asyncio.get_running_loop().time
        try:
            world = World(**settings)
            await world.engines.start([], {})
            await play(world)
        finally:
            module.monotonic = kept

    kept = module.monotonic
    run(main())


def test_of_four_that_stall_at_once_one_is_given_up_and_the_others_are_in_doubt_with_a_word_on_what_to_do():
    async def play(w: World) -> None:
        assert [w.may_lose(i) for i in range(4)] == [True, False, False, False]
        assert [e["engine"] for e in w.said("engine.spared")] == ["engine-1", "engine-2", "engine-3"]
        assert "fleet.max_kills_share" in w.said("engine.spared")[0]["remedy"]
        assert w.states() == ["suspect"] * 4
        await asyncio.sleep(61)
        assert w.may_lose(1)

    played(play)


def test_processes_that_ended_are_replaced_however_many_there_are():
    async def play(w: World) -> None:
        for i in range(4):
            w.engines.lost(f"engine-{i}", 1, "exited: -9")
        await asyncio.sleep(1)
        assert w.states() == ["healthy"] * 4
        assert [w.engine(i).health.incarnation for i in range(4)] == [2] * 4
        assert w.said("engine.spared") == []

    played(play)


def test_what_became_of_the_engine_that_had_a_session_is_told_with_when_that_was():
    async def play(w: World) -> None:
        assert w.engines.loss("engine-0", 1) == Loss("moved")
        w.engines.lost("engine-0", 1, "stalled: no token of any of its 3 calls for 9.0 s")
        w.engines.lost("engine-1", 1, "missed pings")
        await asyncio.sleep(4)
        assert w.engines.loss("engine-0", 1) == Loss("stalled", pytest.approx(4), 9.0)
        assert w.engines.loss("engine-1", 1) == Loss("silent", pytest.approx(4), 2.0)
        assert w.engines.loss("engine-0", 2) == Loss("moved"), "the one that came after it lives"
        assert w.engines.loss("engine-9", 1) == Loss("other"), "a supervisor that was started again knows nothing of it"

    played(play)


def test_an_engine_in_doubt_is_trusted_again_when_its_actor_says_so_and_each_is_said_once():
    async def play(w: World) -> None:
        for _ in range(3):
            w.engines.doubted("engine-2", 1, "a request failed")
        assert w.engine(2).candidate(0, 30).suspect
        for _ in range(3):
            w.engines.doubted("engine-2", 1, "")
        assert w.states() == ["healthy"] * 4
        assert (len(w.said("engine.doubted")), len(w.said("engine.trusted"))) == (1, 1)

    played(play)


def test_what_is_said_of_an_earlier_incarnation_is_not_about_this_one():
    async def play(w: World) -> None:
        w.engines.lost("engine-0", 1, "exited: -9")
        await asyncio.sleep(1)
        assert w.engines.may_lose("engine-0", 1, "stalled")
        w.engines.doubted("engine-0", 1, "stalled")
        assert w.states() == ["healthy"] * 4
        assert w.may_lose(1)

    played(play)


def test_actors_that_are_silent_count_as_kills_and_one_that_speaks_again_is_trusted():
    async def play(w: World) -> None:
        for i in range(4):
            w.actor(i).beats = False
        await asyncio.gather(*(w.engines.look(cast(Member, w.actor(i))) for i in range(4)))
        await asyncio.sleep(1)
        assert w.states() == ["healthy", "suspect", "suspect", "suspect"]
        assert w.engine(0).health.incarnation == 2
        for i in range(4):
            w.actor(i).beats = True
            await w.engines.look(cast(Member, w.actor(i)))
        assert w.states() == ["healthy"] * 4

    played(play)


def test_that_its_actor_answers_clears_no_doubt_that_the_actor_itself_has():
    async def play(w: World) -> None:
        w.engines.doubted("engine-0", 1, "stalled")
        assert not await w.engines.suspect("engine-0", 1, "does not answer")
        await w.engines.look(cast(Member, w.actor(0)))
        assert w.engine(0).health.state is State.SUSPECT

    played(play)


def test_an_engine_that_dies_too_often_in_a_window_is_retired_and_one_that_dies_as_often_in_a_month_is_not():
    async def play(w: World) -> None:
        for n in range(1, 31):
            w.engines.lost("engine-0", n, "exited: -9")
            await asyncio.sleep(400)
        assert w.engine(0).health.incarnation == 31
        for n in range(31, 34):
            w.engines.lost("engine-0", n, "exited: -9")
            await asyncio.sleep(1)
        assert w.engine(0).health.state is State.RETIRED
        assert "engine.max_restarts" in w.said("engine.retired")[0]["reason"]

    played(play, engine__max_restarts=10, engine__restart_window_s=3600)


def test_a_new_engine_takes_its_share_gently_and_those_that_begin_together_share_alike():
    async def play(w: World) -> None:
        w.engines.lost("engine-0", 1, "exited: -9")
        await asyncio.sleep(0)
        await asyncio.sleep(15)
        assert [w.engine(i).candidate(0, 30).share for i in range(4)] == [0.5, 1.0, 1.0, 1.0]
        await asyncio.sleep(15)
        assert w.engine(0).candidate(0, 30).share == 1.0

    played(play)


def test_an_outage_in_which_no_engine_can_start_retires_none_and_ends_with_it():
    async def play(w: World) -> None:
        w.starts = False
        for i in range(4):
            w.engines.lost(f"engine-{i}", 1, "exited: -9")
        await asyncio.sleep(7200)
        assert State.RETIRED.value not in w.states()
        w.starts = True
        await asyncio.sleep(61)
        assert w.states() == ["healthy"] * 4

    played(play)


def test_engines_are_added_and_drained_while_the_run_goes_on_and_a_name_never_comes_again():
    async def play(w: World) -> None:
        w.engines.resize(6, 1)
        await asyncio.sleep(1)
        assert w.states() == ["healthy"] * 6
        w.engines.resize(3, 1)
        await asyncio.sleep(1)
        assert w.states() == ["healthy"] * 3 + ["retired"] * 3
        assert w.engines.by_id["engine-5"].candidate(0, 30).draining
        w.engines.resize(4, 1)
        await asyncio.sleep(1)
        assert w.states() == ["healthy"] * 3 + ["retired"] * 3 + ["healthy"]
        assert list(w.engines.by_id) == [f"engine-{i}" for i in range(7)]

    played(play)


def test_an_engine_that_is_drained_and_comes_back_is_another_incarnation():
    async def play(w: World) -> None:
        await w.engines.leave("engine-1", "drained", 1)
        assert w.engine(1).health.state.value == "retired"
        w.engines.lost("engine-1", 1, "its actor ended")
        assert w.engine(1).health.state.value == "retired"
        w.engines.join("engine-1")
        await asyncio.sleep(1)
        assert (w.engine(1).health.state.value, w.engine(1).health.incarnation) == ("healthy", 2)

    played(play)


def test_a_supervisor_that_is_started_again_serves_with_the_engines_that_live_and_waits_for_no_others_model():
    async def main() -> None:
        world, began = World(), asyncio.get_running_loop().time()
        world.loads_s = 600.0
        living = [cast(Member, Actor(f"engine-{i}", 2, True)) for i in (1, 3)]
        held = await world.engines.start(living, {f"engine-{i}": 2 for i in range(4)})
        assert asyncio.get_running_loop().time() - began < 1
        assert held == {"engine-1": {"engine-1~1": 1}, "engine-3": {"engine-3~1": 1}}
        assert world.states() == ["restarting", "healthy", "restarting", "healthy"]
        await asyncio.sleep(700)
        assert world.states() == ["healthy"] * 4
        assert [world.engine(i).health.incarnation for i in range(4)] == [3, 2, 3, 2]

    run(main())


def test_where_no_engine_lives_a_start_returns_when_all_are_up():
    async def main() -> None:
        world = World()
        world.loads_s = 600.0
        assert await world.engines.start([], {}) == {}
        assert world.states() == ["healthy"] * 4

    run(main())
