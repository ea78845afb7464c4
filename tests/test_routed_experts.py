"""Routed experts from a real engine process to paths: every row is checked, whoever captured it.

The engine's rows are a function of the tokens up to theirs; the hosts and the stores are real, in one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
from conftest import ask, ask_tokens, user
from test_checkpoint_fakes import Cluster
from test_sglang_adapter import Process

from rollout_ft.checkpoint.store import Store
from rollout_ft.config import load
from rollout_ft.engine.capture import Shape
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.host import SessionHost
from rollout_ft.engine.parsers import Own, TextParser
from rollout_ft.engine.port import Chunk
from rollout_ft.engine.sglang import SGLang
from rollout_ft.errors import SessionMoved
from rollout_ft.faultpoints import Inert
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.tree import Node, path_ids
from rollout_ft.telemetry.events import Events
from rollout_ft.testing.plain import PlainTemplate
from rollout_ft.testing.small_engine.routed import Experts
from rollout_ft.types import JSON, SessionSpec

SID = "t1~1"
EXPERTS = Experts(3, 2, 300)
SHAPE = Shape(EXPERTS.layers, EXPERTS.topk, EXPERTS.count)
FAST = {"max_new_tokens": 20, "ignore_eos": True}
STOPS = frozenset(range(60, 90))


class Renderer(PlainTemplate):
    vocab_size = 768
    stop_ids = PlainTemplate.stop_ids | STOPS


class Engine(SGLang):
    """Notes from which row on it was asked, and may spoil what comes."""

    def __init__(self, url: str):
        super().__init__("e0", url)
        self.asked: list[int | None] = []
        self.rids: list[str] = []
        self.spoil: Callable[[Chunk], Chunk] = lambda chunk: chunk

    async def generate(self, rid: str, input_json: bytes, sampling: JSON, routed_from: int | None = None) -> AsyncIterator[Chunk]:
        self.asked.append(routed_from)
        self.rids.append(rid)
        async for chunk in super().generate(rid, input_json, sampling, routed_from):
            yield self.spoil(chunk) if chunk.finish else chunk


class Held(Inert):
    """Each turn's first call stops after its first `tokens`, and `met` is told."""

    def __init__(self, tokens: int):
        self.tokens, self.met, self.calls = tokens, asyncio.Event(), 0

    async def generating(self, spec: SessionSpec, turn: int, tokens: int) -> JSON | None:
        if tokens >= self.tokens:
            self.met.set()
        if tokens == 0 and self.calls == 0:
            self.calls += 1
            return {"custom_params": {"tokens_per_s": 0.01, "from_token": self.tokens}}
        return None


class World:
    def __init__(self, *, payload_bytes: int = 2**20):
        self.config = load(None, {"engine.first_token_timeout_s": 20, "engine.token_timeout_s": 20})
        self.cluster, self.events, self.lost = Cluster("a", "b"), Events("test"), asyncio.Event()
        for name in "ab":
            self.cluster.stores[name] = Store(name, self.cluster.view, payload_bytes=payload_bytes)

    def host(self, engine: SGLang, faults: Inert | None = None, shape: Shape | None = SHAPE) -> SessionHost:
        async def lose(reason: str) -> None:
            self.lost.set()

        parser, mirror = TextParser(self.config.model, Own(), None), self.cluster.mirror()
        driver = Driver(engine, self.config.engine)
        return SessionHost("e0", self.config, Renderer(), driver, parser, mirror, lose, self.events, faults or Inert(), shape)


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    made = Process("--routed-experts", "3,2,300", "--incremental-streaming-output", "--stream-interval", "4")
    yield made
    made.close()


@pytest.fixture
async def engine(process: Process) -> AsyncIterator[Engine]:
    made = Engine(process.url)
    yield made
    await made.aclose()


@pytest.fixture
async def world() -> World:
    return World()


@contextlib.asynccontextmanager
async def opened(world: World, engine: SGLang, **fields: Any) -> AsyncIterator[SessionHost]:
    host = world.host(engine, **fields)
    await host.open("t1", 1, 1, SessionSpec("t1"), False)
    yield host
    await host.aclose()


async def answered(host: SessionHost, request: TurnRequest, sid: str = SID) -> Node:
    reply = await host.serve(sid, request)
    host.report(sid, request.request_id)
    return reply.node


async def talk(host: SessionHost, turns: int, *messages: Any, sid: str = SID, **sampling: Any) -> list[Node]:
    """A conversation of so many turns, behind what was said before."""
    said, nodes = list(messages or [user("start")]), list[Node]()
    for n in range(turns):
        nodes.append(await answered(host, ask(*said, sampling={**FAST, **sampling}), sid))
        said += [orjson.loads(nodes[-1].turn.reply), user(f"and {n}")]
    return nodes


async def paths(host: SessionHost, sid: str = SID) -> list[JSON]:
    return (await host.assembly(host.session(sid), "trajectory"))()["paths"]


def check(path: JSON, *, substituted: list[list[int]] | None = None, missing: list[list[int]] | None = None) -> None:
    """Every row is that of its token, but for those that are said to be missing."""
    expected = EXPERTS.rows(path["token_ids"])[:-1]
    for a, b in missing or []:
        expected[a:b] = 0
    assert path["routed_experts"].dtype == np.uint16
    assert np.array_equal(path["routed_experts"], expected)
    assert path["routed_experts_missing"] == (missing or [])
    assert path["routed_experts_substituted"] == (substituted or [])
    assert path["routed_experts_partial"] == bool(missing or substituted)


async def test_each_turn_brings_the_rows_that_are_new_and_a_path_has_all(world: World, engine: Engine):
    async with opened(world, engine) as host:
        nodes = await talk(host, 4)
        (path,) = await paths(host)
        check(path)
        assert engine.asked == [0, *(node.tokens - 1 for node in nodes[:-1])]
        assert [node.turn.routed.rows for node in nodes if node.turn.routed] == [nodes[0].tokens - 1, *(node.own for node in nodes[1:])]


async def test_branches_share_the_rows_of_what_they_share(world: World, engine: Engine):
    async with opened(world, engine) as host:
        first, second, _ = await talk(host, 3)
        begun = [user("start"), orjson.loads(first.turn.reply), user("and 0")]
        await answered(host, ask(*begun, orjson.loads(second.turn.reply), user("another way"), sampling=FAST))
        await answered(host, ask(*begun[:2], user("a third"), sampling=FAST))
        await answered(host, ask(user("from the beginning"), sampling=FAST))
        made = await paths(host)
        assert len(made) == 4
        for path in made:
            check(path)


async def test_a_prompt_that_leaves_out_the_stop_token_moves_no_row(world: World, engine: Engine):
    async with opened(world, engine) as host:
        ids, trims = [1, 2, 3, 4], list[int]()
        for n in range(4):
            sampling = {"max_new_tokens": 200, "ignore_eos": False, "stop_token_ids": sorted(STOPS)}
            node = await answered(host, ask_tokens(ids, sampling=sampling))
            assert node.last_id in STOPS
            trims.append(node.turn.trim)
            whole = np.frombuffer(path_ids(node), "<i4").tolist()
            ids = [*whole[: -1 if n % 2 else None], 7, 8, 9]
        assert trims == [0, 0, 1, 0]
        (path,) = await paths(host)
        check(path)


async def test_a_call_that_the_engine_aborts_leaves_its_rows(world: World, engine: Engine):
    faults = Held(8)
    async with opened(world, engine, faults=faults) as host:
        asking = asyncio.create_task(talk(host, 1))
        await faults.met.wait()
        await engine.abort(engine.rids[0])
        (node,) = await asking
        assert (len(engine.asked), node.turn.generations) == (2, 1)  # an abort that nobody of us sent is no failure
        assert engine.asked[1] is not None
        assert engine.asked[1] >= node.tokens - 20 + 7
        (path,) = await paths(host)
        check(path)


async def test_tokens_of_an_engine_that_died_have_rows_from_the_next_and_are_marked(world: World, engine: Engine):
    doomed, faults = await asyncio.to_thread(Process, "--routed-experts", "3,2,300", "--stream-interval", "4"), Held(8)
    dying = Engine(doomed.url)
    async with opened(world, engine) as first:
        (root,) = await talk(first, 1)
        await first.retire(SID)
    try:
        before = world.host(dying, faults)
        await before.adopt(SID, 2)
        request = ask(user("start"), orjson.loads(root.turn.reply), user("go on"), sampling=FAST)
        asking = asyncio.create_task(before.serve(SID, request))
        await faults.met.wait()
        doomed.process.send_signal(signal.SIGKILL)
        with pytest.raises(SessionMoved):
            await asking
        assert world.lost.is_set()
        await before.aclose()
    finally:
        await dying.aclose()
        doomed.close()
    after = world.host(engine)
    await after.adopt(SID, 3)
    node = await answered(after, request)
    assert node.turn.tokens_reused >= 8
    sampled_from = node.tokens - 20 - 1
    await talk(after, 1, user("start"), orjson.loads(root.turn.reply), user("go on"), orjson.loads(node.turn.reply), user("more"))
    (path,) = await paths(after)
    assert len(path["turns"]) == 3
    check(path, substituted=[[sampled_from, sampled_from + node.turn.tokens_reused]])
    await after.aclose()


async def test_a_replayed_trial_and_its_next_owner_have_the_same_rows(world: World, engine: Engine):
    async with opened(world, engine) as host:
        await talk(host, 3)
        (before,) = await paths(host)
        await host.retire(SID)
    after = world.host(engine)
    await after.open("t1", 2, 1, None, True)
    await talk(after, 4, sid="t1~2")
    assert len(engine.asked) == 4
    (path,) = await paths(after, "t1~2")
    check(path)
    assert np.array_equal(path["routed_experts"][: len(before["routed_experts"])], before["routed_experts"])
    await after.aclose()


@pytest.mark.parametrize("routed", [b"", b"AAAA", b"!!"], ids=["nothing", "too short", "nonsense"])
async def test_a_payload_that_is_broken_costs_its_rows_and_no_turn(world: World, engine: Engine, routed: bytes):
    async with opened(world, engine) as host:
        first, second = await talk(host, 2)
        engine.spoil = lambda chunk: replace(chunk, routed=routed)
        said = [user("start"), orjson.loads(first.turn.reply), user("and 0"), orjson.loads(second.turn.reply), user("and 1")]
        third = await answered(host, ask(*said, sampling=FAST))
        engine.spoil = lambda chunk: chunk
        await talk(host, 1, *said, orjson.loads(third.turn.reply), user("and 2"))
        (path,) = await paths(host)
        assert third.turn.routed is None
        check(path, missing=[[second.tokens - 1, third.tokens - 1]])
        assert engine.asked[-1] == third.tokens - 1
        assert [e["at"] for e in world.events.take() if e["event"] == "routed_experts.lost"] == ["engine"]


async def test_an_engine_that_returns_none_makes_paths_without_rows(world: World):
    plain = await asyncio.to_thread(Process)
    engine = Engine(plain.url)
    try:
        async with opened(world, engine) as host:
            await talk(host, 3)
            (path,) = await paths(host)
            assert path["routed_experts"] is None
            assert path["routed_experts_missing"] == [[0, len(path["token_ids"]) - 1]]
            assert [e["at"] for e in world.events.take() if e["event"] == "routed_experts.lost"] == ["engine"]
    finally:
        await engine.aclose()
        plain.close()


async def test_rows_that_were_on_a_replica_that_died_are_missing_and_the_trajectory_is_there(world: World, engine: Engine):
    async with opened(world, engine) as host:
        await talk(host, 3)
        held = [name for name, store in world.cluster.stores.items() if (await store.describe())["payload_bytes"]]
        assert len(held) == 1
        world.cluster.network.dead.add(held[0])
        (path,) = await paths(host)
        assert (path["routed_experts"], path["routed_experts_partial"]) == (None, True)
        assert path["routed_experts_missing"] == [[0, len(path["token_ids"]) - 1]]
        assert len(path["turns"]) == 3


async def test_a_payload_that_changed_in_the_store_is_missing(world: World, engine: Engine):
    async with opened(world, engine) as host:
        first, *_ = await talk(host, 3)
        for store in world.cluster.stores.values():
            real = store.payload

            async def changed(trial: str, key: str, digest: str, real: Any = real) -> bytes | None:
                payload = await real(trial, key, digest)
                return bytes(len(payload)) if payload and key.endswith(first.turn.key) else payload

            store.payload = changed
        (path,) = await paths(host)
        check(path, missing=[[0, first.tokens - 1]])


async def test_a_store_that_is_full_costs_rows_and_no_turn(engine: Engine):
    world = World(payload_bytes=1200)
    async with opened(world, engine) as host:
        nodes = await talk(host, 6)
        has = [node.turn.routed is not None for node in nodes]
        assert has[0]
        assert not has[-1]
        (path,) = await paths(host)
        check(path, missing=[[nodes[has.index(False) - 1].tokens - 1, nodes[-1].tokens - 1]])
        assert engine.asked[-1] == nodes[-2].tokens - 1
        assert [e["at"] for e in world.events.take() if e["event"] == "routed_experts.lost"] == ["store"]


async def test_where_they_are_not_wanted_nobody_asks_and_nothing_is_said(world: World, engine: Engine):
    async with opened(world, engine, shape=None) as host:
        nodes = await talk(host, 2)
        assert engine.asked == [None, None]
        assert [node.turn.routed for node in nodes] == [None, None]
        assert not any("routed" in key for path in await paths(host) for key in path)
