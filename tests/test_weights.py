"""The fleet's weights as a state machine, and what an engine makes of a trainer's commands.

The engine's part is played against the small engine's own rules, where what SGLang dies of is an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint_fakes import run as on_virtual_time

from rollout_ft.engine.control import Never
from rollout_ft.engine.gate import Closed, Gate
from rollout_ft.engine.patience import Patience
from rollout_ft.engine.port import EngineInfo
from rollout_ft.engine.weights import PATHS, EngineWeights
from rollout_ft.errors import BadRequest, EngineRefused
from rollout_ft.fleet.weights import MEMORY, Command, Op, Phase, Weights, after, for_engine, latest
from rollout_ft.gateway.trainer import BODIES, command_of
from rollout_ft.types import JSON

VERSIONS = st.sampled_from(["v1", "v2", "v3"])
TAGS = st.sets(st.sampled_from(MEMORY)).map(lambda tags: tuple(sorted(tags)))
COMMANDS = st.one_of(
    st.sampled_from(["abort", "in_place", "retract"]).map(lambda mode: Command(Op.PAUSE, mode=mode)),
    st.sampled_from([Command(op) for op in (Op.RESUME, Op.BEGIN, Op.END, Op.LEARN, Op.FORWARD)]),
    st.builds(lambda v, w, a: update(v, whole=w, again=a), VERSIONS, st.booleans(), st.booleans()),
    st.builds(lambda v, how, part: load(v, how, part), VERSIONS, st.sampled_from(["tensor", "distributed"]), st.integers(0, 2)),
    VERSIONS.map(lambda v: Command(Op.NAME, v, path="/update_weight_version", body={"new_version": v})),
    TAGS.map(lambda tags: Command(Op.OFFLOAD, tags=tags)),
    TAGS.map(lambda tags: Command(Op.ONLOAD, tags=tags)),
)


def update(version: str, how: str = "disk", *, whole: bool = True, again: bool = False) -> Command:
    body = {"model_path": "/w", "weight_version": version}
    return Command(Op.UPDATE, version, how, path=PATHS.get(how, ""), body=body, whole=whole, again=again)


def load(version: str, how: str = "tensor", part: int = 0) -> Command:
    return Command(Op.LOAD, version, how, path=PATHS[how], body={"weight_version": version, "part": part})


# -- the fleet ----------------------------------------------------------------------------------------------------


@given(st.lists(COMMANDS))
def test_the_same_command_twice_is_once(commands: list[Command]):
    weights = Weights(1, ("v0",))
    for command in commands:
        weights = after(weights, command, 1.0)
        assert after(weights, command, 2.0) is weights


@given(st.lists(COMMANDS))
def test_the_order_of_the_versions_is_that_of_their_last_naming(commands: list[Command]):
    weights, named = Weights(1, ("v0",)), ["v0"]
    for command in commands:
        weights = after(weights, command, 1.0)
        if command.op in (Op.UPDATE, Op.LOAD, Op.NAME):
            named = [v for v in named if v != command.version] + [command.version]
        assert list(weights.versions) == named
        assert [weights.behind(v) for v in named] == list(range(len(named)))[::-1]
        assert weights.behind("of another run") == len(named)


@given(st.lists(COMMANDS))
def test_the_fleet_serves_when_nobody_wants_it_still(commands: list[Command]):
    weights, mode, begun, released = Weights(1, ("v0",)), "", False, set[str]()
    for now, command in enumerate(commands, 1):
        weights = after(weights, command, float(now))
        match command.op:
            case Op.PAUSE | Op.RESUME:
                mode = command.mode
            case Op.BEGIN | Op.END:
                begun = command.op is Op.BEGIN
            case Op.OFFLOAD:
                released |= {*(command.tags or MEMORY)}
            case Op.ONLOAD:
                released -= {*(command.tags or MEMORY)}
            case Op.UPDATE if command.whole:
                released = set()
            case _:
                pass
        still = bool(mode or begun or released)
        assert (weights.phase is not Phase.SERVING, weights.still_since is not None) == (still, still)
        assert {*weights.released} == released


@given(st.lists(st.lists(COMMANDS), min_size=1))
def test_a_new_supervisor_believes_the_engine_that_heard_last(heard: list[list[Command]]):
    states = [Weights(1, ("v0",))]
    for commands in heard:
        for command in commands:
            states.append(after(states[-1], command, 1.0))
    assert latest(states[::-1]) == states[-1]
    assert latest([]) == Weights()


def test_tensors_are_not_kept_and_paths_are():
    by_tensor = after(Weights(1, ("v0",)), load("v1"), 1.0)
    assert (by_tensor.source and by_tensor.source.body, by_tensor.source and by_tensor.source.how) == ({}, "tensor")
    by_disk = after(by_tensor, update("v2"), 1.0)
    named = after(by_disk, Command(Op.NAME, "v3"), 1.0)
    assert named.source
    assert named.source.body == {"model_path": "/w", "weight_version": "v3"}


@given(count=st.integers(1, 8), each=st.integers(1, 8), offset=st.integers(0, 8))
def test_each_engine_gets_ranks_of_its_own(count: int, each: int, offset: int):
    body = {"rank_offset": offset, "world_size": offset + count * each}
    command = Command(Op.FORWARD, path="/init_weights_update_group", body=body)
    firsts = [for_engine(command, i, count).body["rank_offset"] for i in range(count)]
    ranks = [first + r for first in firsts for r in range(each)]
    assert ranks == list(range(offset, offset + count * each))


def test_ranks_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match="multiple of 2"):
        for_engine(Command(Op.FORWARD, path="/init_weights_update_group", body={"rank_offset": 1, "world_size": 4}), 0, 2)


# -- one engine ---------------------------------------------------------------------------------------------------


class Server:
    """SGLang's rules for weights and memory. What kills it is an AssertionError; `fails` answers 400 once, `hangs` once."""

    ours = True

    def __init__(self) -> None:
        self.version, self.loaded = "v0", "v0"
        self.paused, self.running = "", True
        self.session, self.released = False, set[str]()
        self.sent: list[str] = []
        self.fails = self.hangs = ""

    async def send(self, path: str, body: JSON) -> Any:
        self.sent.append(path)
        if path == self.hangs:
            self.hangs = ""
            await asyncio.Event().wait()
        if path == self.fails:
            self.fails = ""
            raise EngineRefused(400, f"{path} failed")
        await getattr(self, path[1:])(body)

    async def pause_generation(self, body: JSON) -> None:
        assert not (self.paused == "in_place" and body["mode"] == "abort" and self.running), "it waits for ever"
        self.paused = body["mode"]
        self.running = self.running and self.paused == "in_place"

    async def continue_generation(self, body: JSON) -> None:
        assert not self.released, "it computes without memory"
        self.paused, self.running = "", True

    async def flush_cache(self, body: JSON) -> None:
        if self.running:
            raise EngineRefused(400, "not idle")

    async def release_memory_occupation(self, body: JSON) -> None:
        assert not self.running, "release_memory_occupation should be called only when server is idle."
        self.released |= {*body.get("tags", MEMORY)}

    async def resume_memory_occupation(self, body: JSON) -> None:
        for tag in body.get("tags", MEMORY):
            self.released.remove(tag)
        self.loaded = "garbage" if "weights" in body.get("tags", MEMORY) else self.loaded

    async def begin_weight_update(self, body: JSON) -> None:
        if self.session:
            raise EngineRefused(400, "a weight-update session is already open; call end_weight_update() first")
        self.session = True

    async def end_weight_update(self, body: JSON) -> None:
        if not self.session:
            raise EngineRefused(400, "no weight-update session is open; call begin_weight_update() first")
        self.session = False

    async def _load(self, body: JSON, *, session: bool) -> None:
        if body.get("flush_cache") and self.running and self.paused:
            raise EngineRefused(400, "the cache was not flushed because requests are still running or queued")
        assert "weights" not in self.released, "it loads into memory that it does not have"
        if session and not self.session:
            raise EngineRefused(400, "must run between begin_weight_update() and end_weight_update()")
        self.version = self.loaded = body["weight_version"]

    async def update_weights_from_disk(self, body: JSON) -> None:
        await self._load(body, session=False)

    async def update_weights_from_ipc(self, body: JSON) -> None:
        await self._load(body, session=False)

    async def update_weights_from_tensor(self, body: JSON) -> None:
        await self._load(body, session=True)

    async def update_weights_from_distributed(self, body: JSON) -> None:
        await self._load(body, session=True)

    async def update_weight_version(self, body: JSON) -> None:
        self.version = self.loaded = body["new_version"]

    async def info(self) -> EngineInfo:
        return EngineInfo(self.version, "")

    async def aclose(self) -> None: ...


class Played:
    """One engine behind its gate, and the fleet as a supervisor would have it."""

    def __init__(self, server: Any = None):
        self.server = server or Server()
        self.gate = Gate(Patience(1, 1))
        self.events: list[tuple[str, Any]] = []
        self.engine = EngineWeights(self.server, self.server, self.gate, lambda name, **fields: self.events.append((name, fields)))
        self.fleet = Weights(1, ("v0",))

    async def do(self, command: Command, timeout_s: float = 5.0) -> JSON:
        then = after(self.fleet, command, 1.0)
        told = await self.engine.carry_out(command, then, timeout_s)
        self.fleet = then
        return told


def played(scenario: Callable[[Played], Awaitable[None]]) -> None:
    async def run() -> None:
        p = Played()
        await p.engine.start()
        await scenario(p)

    on_virtual_time(run())


@settings(deadline=None, max_examples=400)
@given(st.lists(st.tuples(COMMANDS, st.sampled_from(["", "", "", "fails", "hangs"]), st.sampled_from(sorted(PATHS.values())))))
def test_an_engine_generates_only_with_weights_of_the_fleets_version(steps: list[tuple[Command, str, str]]):
    """Whatever is asked in whatever order, refused or not answered: it never dies, and with its gate open it has whole
    weights of the version that the fleet is at, all of its memory, and is not paused."""

    async def scenario(p: Played) -> None:
        for command, trouble, path in steps:
            p.server.fails, p.server.hangs = path if trouble == "fails" else "", path if trouble == "hangs" else ""
            told = await p.do(command)
            assert told["ok"] or told["error"]
            if not p.gate.closed:
                assert not p.server.paused
                assert not p.server.released
                assert not p.server.session
                assert p.fleet.phase is Phase.SERVING
                assert (p.server.version, p.server.loaded) == (p.fleet.version, p.server.loaded)
                assert p.server.loaded != "garbage"
            assert (p.gate.closed == frozenset()) == (p.fleet.phase is Phase.SERVING and not told["stale"])

    played(scenario)


@settings(deadline=None)
@given(st.lists(COMMANDS), VERSIONS)
def test_a_whole_update_and_a_resume_bring_every_engine_back(commands: list[Command], version: str):
    async def scenario(p: Played) -> None:
        for command in [*commands, Command(Op.END), update(version), Command(Op.RESUME)]:
            told = await p.do(command)
        assert (told["ok"], told["stale"], p.gate.closed, p.server.loaded) == (True, "", frozenset(), version)

    played(scenario)


def test_a_part_that_failed_leaves_an_engine_stale_until_an_update_is_whole():
    async def scenario(p: Played) -> None:
        await p.do(Command(Op.PAUSE, mode="abort"))
        await p.do(Command(Op.BEGIN))
        p.server.fails = PATHS["tensor"]
        assert not (await p.do(load("v1", part=0)))["ok"]
        assert (await p.do(load("v1", part=1)))["ok"]
        assert not (await p.do(Command(Op.END)))["ok"]
        assert not (await p.do(Command(Op.NAME, "v1", path="/update_weight_version", body={"new_version": "v1"})))["ok"]
        await p.do(Command(Op.RESUME))
        assert p.gate.closed == {Closed.STALE}
        assert p.server.paused == "abort"  # it is let go on when it may serve, and not before
        assert (await p.do(update("v2")))["ok"]
        assert (p.gate.closed, p.server.paused) == (frozenset(), "")
        assert [name for name, _ in p.events] == ["weights.missed", "weights.loaded"]

    played(scenario)


def test_a_part_that_comes_twice_in_one_update_is_loaded_once():
    async def scenario(p: Played) -> None:
        for command in (Command(Op.BEGIN), load("v1"), load("v1"), load("v1", part=1), Command(Op.END), Command(Op.END)):
            assert (await p.do(command))["ok"]
        assert p.server.sent.count(PATHS["tensor"]) == 2
        for command in (Command(Op.BEGIN), load("v1"), Command(Op.END)):  # the same names again are another update
            await p.do(command)
        assert p.server.sent.count(PATHS["tensor"]) == 3

    played(scenario)


def test_a_call_that_is_repeated_while_it_runs_joins_it():
    async def scenario(p: Played) -> None:
        one, other = await asyncio.gather(p.do(update("v1")), p.do(update("v1")))
        assert (one["ok"], one) == (True, other)
        assert p.server.sent.count(PATHS["disk"]) == 1
        await p.do(update("v1"))
        assert p.server.sent.count(PATHS["disk"]) == 1

    played(scenario)


def test_an_engine_that_starts_after_an_update_is_stale_whatever_its_weights_are_called():
    async def scenario(p: Played) -> None:
        p.fleet = after(p.fleet, update("v0", again=True), 1.0)  # a trainer that never names a version
        told = await p.do(Command(Op.LEARN))
        assert "started with the weights of its command line" in told["stale"]

    played(scenario)


def test_an_engine_that_joins_a_pause_begins_paused():
    async def scenario(p: Played) -> None:
        p.fleet = after(p.fleet, Command(Op.PAUSE, mode="in_place"), 1.0)
        assert (await p.do(Command(Op.LEARN)))["ok"]
        assert p.gate.closed == {Closed.PAUSED}
        await p.do(Command(Op.RESUME))
        assert not p.gate.closed

    played(scenario)


def test_an_engine_that_somebody_else_owns_is_never_told_anything():
    class Owned(Never):
        async def info(self) -> EngineInfo:
            return EngineInfo("v1", "")

    async def run() -> None:
        p = Played(Owned())
        await p.engine.start()
        p.fleet = Weights(1, ("v1",))
        assert (await p.do(Command(Op.PAUSE, mode="abort")))["ok"]
        assert p.gate.closed == {Closed.PAUSED}
        assert (await p.do(Command(Op.RESUME)))["ok"]
        refused = await p.do(update("v2"))
        assert "external" in refused["error"]
        assert (await p.do(update("v1", "external")))["ok"]
        assert not p.gate.closed

    asyncio.run(run())


# -- the routes ---------------------------------------------------------------------------------------------------


def test_sglangs_bodies_are_passed_on_as_they_stand():
    body = {"names": ["w"], "dtypes": ["float32"], "shapes": [[1]], "weight_version": "v1", "what_comes_next": True}
    command = command_of("update_weights_from_distributed", body)
    assert (command.op, command.version, command.path, command.body) == (Op.LOAD, "v1", PATHS["distributed"], body)
    unnamed = command_of("update_weights_from_disk", {"model_path": "/w"})
    assert (unnamed.op, unnamed.version, unnamed.again, unnamed.body) == (Op.UPDATE, "", True, {"model_path": "/w"})
    assert command_of("pause_generation", {}).mode == "abort"


@pytest.mark.parametrize(
    ("route", "body", "says"),
    [
        ("fleet/pause", {"mode": "freeze"}, "mode"),
        ("fleet/weights", {"version": "v1"}, "path is missing"),
        ("fleet/weights", {"version": "v1", "how": "tensor"}, "update_weights_from_tensor takes"),
        ("fleet/weights", {"version": "", "path": "/w"}, "version"),
        ("fleet/weights", {"version": "v1", "path": "/w", "body": {"weight_version": "v2"}}, "another than version"),
        ("fleet/offload", {"tags": ["kv"]}, "tags"),
        ("update_weight_version", {}, "new_version"),
    ],
)
def test_a_body_that_makes_no_sense_is_refused_by_name(route: str, body: JSON, says: str):
    assert route in BODIES
    with pytest.raises(BadRequest, match=says):
        command_of(route, body)
