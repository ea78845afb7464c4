"""Where sessions are while their engines die: the supervisor names an engine that has the session, or none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from test_engines import Actor, World, played

from rollout_ft.checkpoint.log import Head
from rollout_ft.fleet.sessions import Sessions
from rollout_ft.types import JSON, SessionSpec

SID = "t~1"
Asked = list[tuple[tuple[str, int], str]]


class Places:
    """The sessions of a world whose engines die while they are asked what `kills` says; and which incarnation was asked what."""

    def __init__(self, world: World, kills: Callable[[str, Asked], bool], entries: int = 1):
        self.world, self.kills, self.asked, self.entries = world, kills, Asked(), entries
        stores = SimpleNamespace(lookup=self._lookup)
        self.sessions = Sessions(world.engines, cast(Any, stores), world.events)
        make = cast(Any, world.engines)._crew.engine

        async def heard(*args: Any) -> Any:
            return self._heard(await make(*args))

        cast(Any, world.engines)._crew.engine = heard
        for i in range(4):
            self._heard(world.actor(i))

    async def _lookup(self, _: str) -> Head:
        return Head(1, len(self.asked), self.entries, b"")

    def _heard(self, actor: Actor) -> Actor:
        ask = actor.ask

        async def asked(method: str, *args: Any, timeout_s: float = 0) -> Any:
            if method not in ("adopt", "open", "holds"):
                return await ask(method, *args)
            self.asked.append(((actor.role, actor.incarnation), method))
            if self.kills(method, self.asked):
                self.world.engines.lost(actor.role, actor.incarnation, "exited: -9")
                await asyncio.sleep(1)  # it is replaced before its answer arrives
            return {"session_id": SID, "trial_id": "t", "attempt": 1, "turns": 0, "metadata": {"turns_committed": 0}}

        actor.ask = asked
        return actor

    async def located(self, failed: tuple[str, int] | None = None) -> JSON:
        """The place of the session, which is with whoever took it last, unless that one died of it."""
        place = await self.sessions.locate(SID, failed)
        if place["state"] == "owned":
            there = (place["engine_id"], place["incarnation"])
            assert place["url"]
            assert self.asked[-1] == (there, "adopt")
        return place


def test_a_session_is_not_at_an_engine_that_was_lost_while_it_adopted_it():
    async def play(w: World) -> None:
        places = Places(w, lambda method, asked: len(asked) == 1)
        place = await places.located()
        assert (place["state"], len(places.asked)) == ("owned", 2)

    played(play)


def test_a_session_is_not_at_an_engine_that_was_lost_while_it_opened_it():
    async def play(w: World) -> None:
        places = Places(w, lambda method, asked: method == "open", entries=0)
        await places.sessions.open(SessionSpec("t"), resume=False)
        places.entries = 1
        assert (await places.located())["state"] == "owned"

    played(play)


def test_a_session_is_not_at_an_engine_that_was_lost_while_it_said_that_it_has_it():
    async def play(w: World) -> None:
        places = Places(w, lambda method, asked: method == "holds")
        before = await places.located()
        assert (await places.located((before["engine_id"], before["incarnation"])))["state"] == "owned"

    played(play)


def test_a_session_is_nowhere_when_every_engine_is_lost_while_it_adopts_it():
    async def play(w: World) -> None:
        places = Places(w, lambda method, asked: method == "adopt")
        assert (await places.located())["state"] == "unavailable"
        assert len(places.asked) == 4

    played(play)
