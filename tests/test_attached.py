"""Engines that somebody else owns: real small engines, driven by a real host each, and an owner that tells nobody.

Only Ray is left out: what the supervisor asks of the engines' actors goes straight to them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
from conftest import ask, assistant, user
from owner import Engines, Owner, owned, versions_of
from test_checkpoint_fakes import Cluster

from rollout_ft.clock import monotonic
from rollout_ft.config import Config, load
from rollout_ft.engine.attached import Attached, Report
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.host import SessionHost
from rollout_ft.engine.observer import Held
from rollout_ft.engine.parsers import Own, TextParser
from rollout_ft.engine.sglang import SGLang
from rollout_ft.errors import EngineLost, EngineUnfit
from rollout_ft.faultpoints import Inert
from rollout_ft.fleet.health import Health, State
from rollout_ft.fleet.owners import Owners, Seen
from rollout_ft.session.drift import load_renderer
from rollout_ft.telemetry.events import Events
from rollout_ft.testing.small_engine import MODEL_DIR
from rollout_ft.types import SessionSpec, Turn

pytestmark = pytest.mark.timeout(120)


def config_for(urls: list[str], **more: Any) -> Config:
    known = {
        "engine.kind": "sglang", "model.path": str(MODEL_DIR), "engine.attach.urls": urls, "engine.attach.poll_s": 0.25,
        "engine.token_timeout_s": 2, "engine.first_token_timeout_s": 5, "engine.start_timeout_s": 5,
        "engine.stream_interval_tokens": 4, "session.max_output_tokens": 512,
    }  # fmt: skip
    return load(None, {**known, **{key.replace("__", "."): value for key, value in more.items()}})


class Beside:
    """An engine, its host and what stands for its actor; a `Member` and an engine of the fleet in one."""

    def __init__(self, engine_id: str, unit: Attached, driver: Driver, host: SessionHost):
        self.engine_id, self.unit, self.driver, self.host = engine_id, unit, driver, host
        self.health, self.seen = Health(State.HEALTHY), Seen()
        self.member: Any = self
        self.lost: list[str] = []

    async def ask(self, method: str, *args: str, timeout_s: float = 0) -> None:
        match method:
            case "owner_suspected":
                self.unit.suspected(*args)
            case "owner_cleared":
                self.unit.cleared(*args)
            case "owner_told":
                self.unit.told()
            case _:
                await self.host.release()


class Versions:
    async def arrived(self, version: str) -> None: ...
    async def has(self, engine: Any, version: str) -> None: ...


@dataclass
class Fleet:
    owner: Owner
    engines: Engines
    members: list[Beside]
    owners: Owners
    reports: list[tuple[str, Report]] = field(default_factory=list[tuple[str, Report]])

    async def trial(self, name: str, member: Beside, turns: int, tokens: int = 60) -> list[Turn]:
        """A conversation of so many turns; every one must be answered."""
        session = await member.host.open(name, 1, 1, SessionSpec(name), False)
        messages, made = [user(f"{name} begins")], list[Turn]()
        for n in range(turns):
            sampling = {"max_new_tokens": tokens, "min_new_tokens": tokens}
            reply = await member.host.serve(session.id, ask(*messages, sampling=sampling, request_id=f"{name}-{n}"))
            made.append(reply.node.turn)
            messages += [orjson_loads(reply.node.turn.reply), user(f"go on {n}")]
        return made

    def trials(self, each: int, turns: int, tokens: int = 60) -> asyncio.Future[list[list[Turn]]]:
        names = [(f"t{i}-{n}", m) for i, m in enumerate(self.members) for n in range(each)]
        return asyncio.gather(*(self.trial(name, m, turns, tokens) for name, m in names))

    async def until(self, reached: Any, limit_s: float = 15) -> None:
        async with asyncio.timeout(limit_s):
            while not reached():
                await asyncio.sleep(0.01)

    @property
    def closed(self) -> list[bool]:
        return [not m.unit.state.open for m in self.members]

    @property
    def youngest_s(self) -> float:
        return min(monotonic() - sent for m in self.members for _, sent in m.driver.calls.values())

    @property
    def calls(self) -> int:
        """Those that sample."""
        return sum(len(g.ids) > 4 for m in self.members for g, _ in m.driver.calls.values())


def orjson_loads(data: bytes) -> Any:
    import orjson

    message = orjson.loads(data)
    return {**assistant(""), **message}


@contextlib.asynccontextmanager
async def fleet(count: int, *arguments: str, tokens_per_s: float = 100, abort_s: float = 3.0, **more: Any) -> AsyncGenerator[Fleet]:
    async with owned(count, *arguments, tokens_per_s=tokens_per_s, abort_s=abort_s) as (owner, engines):
        config, cluster = config_for(engines.urls, **more), Cluster("a", "b")
        renderer, members, events = load_renderer(config), list[Beside](), Events("test")
        owners = Owners(config.engine.attach, events, lambda: members, Versions())
        made = Fleet(owner, engines, members, owners)
        async with contextlib.AsyncExitStack() as stack:
            for i, url in enumerate(engines.urls):
                await _join(made, f"e{i}", url, config, cluster, renderer, stack)
            watching = asyncio.create_task(owners.watch())
            stack.callback(watching.cancel)
            yield made


async def _join(
    made: Fleet, name: str, url: str, config: Config, cluster: Cluster, renderer: Any, stack: contextlib.AsyncExitStack
) -> None:
    unit = await Attached.start(config, name, url, renderer.template.encode)
    engine = SGLang(name, url)
    driver = Driver(engine, config.engine)

    async def lose(reason: str) -> None:
        member.lost.append(reason)

    host = SessionHost(name, config, renderer, driver, TextParser(config.model, Own(), None), cluster.mirror(), lose, Events(name), Inert())
    member = Beside(name, unit, driver, host)
    made.members.append(member)
    first: list[Report] = []

    def tell(report: Report) -> None:
        made.reports.append((name, report))
        if first:
            made.owners.observed(member, asdict(report))
        else:
            first.append(report)
            made.owners.up(member, asdict(report))

    await unit.watch(driver, tell)
    for close in (unit.aclose, engine.aclose, host.aclose):
        stack.push_async_callback(close)


async def test_slimes_abort_loop_ends_and_every_turn_goes_on_after_its_update():
    async with fleet(3) as f:
        trials = f.trials(each=4, turns=4)
        await f.until(lambda: f.calls == 12)
        await f.owner.abort_until_idle()
        await f.until(lambda: all(f.closed))
        await f.owner.becomes_idle()
        await f.owner.stays_idle(2)
        assert await f.owner.flush() == 1
        await f.owner.update("v1")
        turns = await trials
        assert [len(t) for t in turns] == [4] * 12
        assert {len(t.output_ids) // 4 for made in turns for t in made} == {60}
        assert versions_of([t for made in turns for t in made]) == {"v0", "v1"}
        assert any(len(t.version_spans) == 2 for made in turns for t in made)
        assert max(t.generations for made in turns for t in made) <= 3


async def test_an_abort_at_one_engine_closes_all_before_its_owner_comes_to_the_next():
    async with fleet(3) as f:
        trials = f.trials(each=1, turns=1, tokens=800 // 2)
        await f.until(lambda: f.calls == 3)
        await f.owner.post(f.engines.urls[0], "/abort_request", {"abort_all": True})
        await f.until(lambda: all(f.closed))
        await f.until(lambda: f.members[0].seen.held == Held.ABORTED)
        assert {m.unit.state.held for m in f.members[1:]} == {Held.SUSPECTED}
        await f.until(lambda: f.calls == 0)  # what had been sent just before is taken back
        await f.owner.stays_idle(1)
        await f.owner.update("v1")
        assert [len(t) for t in await trials] == [1, 1, 1]


async def test_an_engine_whose_turns_run_on_was_not_meant_and_the_others_follow_it():
    async with fleet(3, tokens_per_s=40, engine__attach__spread_s=1) as f:
        long = asyncio.gather(*(f.trial(f"long{i}", f.members[i], 1, 400) for i in (0, 1)))
        await f.until(lambda: f.calls == 2)
        await f.until(lambda: f.youngest_s > 1.5)  # older than what an abort might have preceded
        await f.owner.post(f.engines.urls[0], "/abort_request", {"abort_all": True})
        await f.until(lambda: all(f.closed))
        await f.until(lambda: f.closed == [True, False, False])
        await f.owner.update("v1")
        assert all(len(t.output_ids) == 1600 for made in await long for t in made)


async def test_a_pause_stops_every_deadline_and_costs_no_turn_its_budget():
    async with fleet(2, engine__token_timeout_s=0.8, engine__first_token_timeout_s=0.8) as f:
        trials = f.trials(each=2, turns=2)
        await f.until(lambda: f.calls == 4)
        await f.owner.pause("in_place")
        await f.until(lambda: all(f.closed))
        await asyncio.sleep(2.5)
        await f.owner.go_on()
        turns = await trials
        assert [len(t) for t in turns] == [2] * 4
        assert {t.generations for made in turns for t in made} == {1}
        assert not any(m.lost for m in f.members)


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
async def test_new_weights_under_a_pause_of_any_kind_end_in_turns_with_both(mode: str):
    async with fleet(2) as f:
        trials = f.trials(each=2, turns=3)
        await f.until(lambda: f.calls == 4)
        await f.owner.pause(mode)
        await f.owner.name("v1")
        await f.owner.go_on()
        turns = [t for made in await trials for t in made]
        assert len(turns) == 12
        assert versions_of(turns) == {"v0", "v1"}


async def test_an_owner_that_only_aborts_is_waited_for_until_somebody_says_that_it_is_open():
    async with fleet(2) as f:
        trials = f.trials(each=1, turns=1, tokens=100)
        await f.until(lambda: f.calls == 2)
        await f.owner.abort_until_idle()
        await f.owner.stays_idle(3)
        f.owners.told_open()
        assert [len(t) for t in await trials] == [1, 1]


async def test_an_owner_that_only_aborts_is_waited_for_as_long_as_the_config_says():
    async with fleet(2, engine__attach__reopen_idle_s=1.5) as f:
        trials = f.trials(each=1, turns=1, tokens=100)
        await f.until(lambda: f.calls == 2)
        await f.owner.abort_until_idle()
        await f.owner.stays_idle(1.2)
        assert [len(t) for t in await trials] == [1, 1]


async def test_an_abort_of_ours_is_not_taken_for_an_owners():
    async with fleet(1) as f:
        trial = asyncio.create_task(f.trial("t", f.members[0], 1, 200))
        await f.until(lambda: f.calls == 1)
        generation, _ = next(iter(f.members[0].driver.calls.values()))
        await f.until(lambda: len(generation.ids) > 0)
        f.members[0].driver.abort(generation)
        assert len(await trial) == 1
        assert [r.held for _, r in f.reports] == [""]


async def test_an_engine_that_dies_is_lost_and_one_that_comes_back_is_another():
    async with fleet(1) as f:
        trial = asyncio.create_task(f.trial("t", f.members[0], 1, 400))
        await f.until(lambda: f.calls == 1)
        f.engines.kill()
        await f.until(lambda: f.members[0].lost)
        with contextlib.suppress(Exception):
            await trial
        await f.engines.again()
        reason = await asyncio.wait_for(f.members[0].unit.wait(), 10)
        assert reason in ("connection refused", "restarted by its owner")


async def test_a_restart_between_two_looks_is_seen():
    async with fleet(1, engine__attach__poll_s=0.9) as f:
        f.engines.kill()
        await f.engines.again()
        reason = await asyncio.wait_for(f.members[0].unit.wait(), 30)
        assert reason in ("connection refused", "restarted by its owner")


async def test_an_engine_that_is_not_there_is_said_with_its_key():
    config = config_for(["http://127.0.0.1:9"], engine__start_timeout_s=0.5)
    with pytest.raises(EngineLost, match=r"127.0.0.1:9 is not there after 0.5 s \(engine.start_timeout_s\): connection refused"):
        await Attached.start(config, "e", "http://127.0.0.1:9", lambda text: [])


async def test_an_engine_with_a_smaller_context_is_refused():
    async with owned(1, "--context-length", "1024") as (_, engines):
        with pytest.raises(EngineUnfit, match=r"set model.context_tokens to 1024"):
            await Attached.start(config_for(engines.urls), "e", engines.urls[0], lambda text: [])
