"""Calls that nobody wants are aborted until the engine is seen to be rid of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from rollout_ft.clock import monotonic
from rollout_ft.engine import orphans
from rollout_ft.engine.orphans import Orphans
from rollout_ft.telemetry.events import Events


@dataclass
class Engine:
    """Has `requests`; hears an abort from the `deaf`th on, and tells its load when it may."""

    requests: set[str]
    deaf: int = 0
    tells: bool = True
    aborts: list[str] = field(default_factory=list[str])

    async def abort(self, rid: str) -> None:
        self.aborts.append(rid)
        if self.aborts.count(rid) > self.deaf:
            self.requests.discard(rid)

    async def load(self) -> int | None:
        return len(self.requests) if self.tells else None


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(orphans, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(orphans, "MAX_PAUSE_S", 0.002)


async def until_none(buried: Orphans) -> None:
    ends = monotonic() + 5
    while buried.left:
        assert monotonic() < ends
        await asyncio.sleep(0.001)


def burying(engine: Engine, ours: int = 0) -> tuple[Orphans, Events]:
    events = Events("test")
    return Orphans(engine, lambda: ours, events), events  # type: ignore[arg-type]


async def test_one_abort_is_enough_where_the_engine_is_seen_to_be_rid_of_it():
    engine = Engine({"a", "other"})
    buried, events = burying(engine, ours=1)
    buried.bury("a")
    await until_none(buried)
    assert (engine.aborts, engine.requests, events.take()) == (["a"], {"other"}, [])


async def test_an_abort_that_was_not_heard_is_repeated():
    engine = Engine({"a"}, deaf=3)
    buried, events = burying(engine)
    buried.bury("a")
    await until_none(buried)
    assert (engine.aborts, engine.requests, events.take()) == (["a"] * 4, set(), [])


async def test_one_that_comes_while_another_is_buried_is_buried_too():
    engine = Engine({"a", "b"}, deaf=2)
    buried, _ = burying(engine)
    buried.bury("a")
    await asyncio.sleep(0.001)
    buried.bury("b")
    await until_none(buried)
    assert engine.requests == set()
    buried.bury("a")
    await until_none(buried)


@pytest.mark.parametrize("tells", [True, False])
async def test_what_is_never_seen_to_go_is_said_once_and_left(tells: bool):
    engine = Engine({"a"}, deaf=10_000, tells=tells)
    buried, events = burying(engine)
    buried.bury("a")
    await until_none(buried)
    assert engine.aborts == ["a"] * orphans.ROUNDS
    (event,) = events.take()
    assert (event["event"], event["rids"], event["count"]) == ("orphans.linger", ["a"], 1)


async def test_there_are_never_more_than_so_many():
    engine = Engine(set(), tells=False)
    buried, _ = burying(engine)
    buried.bury(*(f"{i}" for i in range(2 * orphans.MAX_ORPHANS)))
    assert buried.left == orphans.MAX_ORPHANS
    buried.aclose()
