"""What people and tools see of a run that goes on: its trials, its turns in flight, what happened, what needs attention.

Owns what is remembered between two looks, so that many who look cost as much as one. Changes nothing. Who does not look pays
nothing: engines and stores are asked when somebody does, and the store no more often than in a hundredth of its time.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson

from rollout_ft.clock import monotonic, wall
from rollout_ft.errors import BadRequest, RolloutFTError
from rollout_ft.fleet.engines import Engines
from rollout_ft.fleet.health import State
from rollout_ft.fleet.listing import WAITS, Around, Query, counts, select
from rollout_ft.fleet.sessions import Sessions
from rollout_ft.fleet.stores import Stores
from rollout_ft.telemetry.problems import problems
from rollout_ft.telemetry.recent import Recent
from rollout_ft.telemetry.recoveries import Recoveries
from rollout_ft.telemetry.timeline import timeline
from rollout_ft.types import JSON

ANSWER_S = 2.0
"""An engine that does not say what is in flight there within this is named as silent."""
STORE_S = 5.0
SILENT_FOR_S = 5.0
"""So long a store that did not answer is not asked again, so that those who look do not wait for it one after the other."""
TURNS_FOR_S = 1.0
"""So long what is in flight is not asked for again."""
SHARE = 100
"""A list of the store's trials is good for so many times what it cost."""
MAX_TURNS = 200
"""Of each engine."""
MAX_ENGINES = 200
MAX_MOMENTS = 2000
OUTLINES = 500
"""At once."""


class Looks:
    def __init__(self, engines: Engines, stores: Stores, sessions: Sessions, recent: Recent, recoveries: Recoveries):
        self._engines, self._stores, self._sessions = engines, stores, sessions
        self._recent, self._recoveries = recent, recoveries
        self._turns: asyncio.Task[JSON] | None = None
        self._turns_at = self._good_until = 0.0
        self._silent = ""
        """Why there is nothing new of the store until then."""
        self._refreshing = asyncio.Lock()

    async def trials(self, query: Query) -> JSON:
        """`{trials, total, next}`. Raises BadRequest (503) when the store does not answer."""
        await self._refresh()
        around = await self._around() if query.attention else self._standing({})
        return self._page(query, around)

    async def overview(self, fleet: JSON, query: Query, since: str, events: int, turns: int) -> bytes:
        """All that somebody wants to see at once, as JSON. What does not answer is left out and named."""
        silent = ""
        try:
            await self._refresh()
        except BadRequest as e:
            silent = e.message
        register = self._sessions.register
        around, flying, now = await self._around(), await self._in_flight(), wall()
        recoveries = self._recoveries.describe()
        return orjson.dumps({
            "now": now, "fleet": _abridged(fleet), "problems": problems(fleet, now, recoveries), "recoveries": recoveries,
            "turns": {**flying, "turns": flying["turns"][:turns]}, "events": self._recent.since(since, events, newest=True),
            "trials": counts(register.rows.values(), around, register.outcomes, register.restarts) | self._page(query, around),
            "store_silent": silent,
        })  # fmt: skip

    def events(self, since: str, limit: int) -> JSON:
        return self._recent.since(since, limit)

    async def timeline(self, trial_id: str) -> JSON:
        """`{trial, moments, left_out}`: the newest moments, the oldest of them first. Raises BadRequest."""
        trial = await self._sessions.read(trial_id)
        told = timeline(trial_id, self._recent.all(), await self._sessions.moments(trial_id))
        moments = [moment.line() for moment in told[-MAX_MOMENTS:]]
        return {"trial": trial, "moments": moments, "left_out": len(told) - len(moments)}

    def _page(self, query: Query, around: Around) -> JSON:
        page = select(self._sessions.register.rows.values(), query, around)
        rows: list[JSON] = []
        for row, state, rank in page.rows:
            why, remedy = around.words(row, rank)
            engine = around.places.get(f"{row.trial_id}~{row.attempt}", "")
            rows.append(row.describe(state) | {"engine_id": engine, "attention": rank.name.lower(), "why": why, "remedy": remedy})
        return {"trials": rows, "total": page.total, "next": page.next}

    async def _around(self) -> Around:
        flying = await self._in_flight()
        return self._standing({turn["session_id"]: turn for turn in reversed(flying["turns"])})

    def _standing(self, turns: dict[str, JSON]) -> Around:
        states = {engine.engine_id: engine.health.state.value for engine in self._engines.by_id.values()}
        return Around(self._sessions.places(), states, turns)

    # -- the engines ----------------------------------------------------------------------------------------------

    async def _in_flight(self) -> JSON:
        """`{count, waits, turns, silent}` of all engines; those turns first that have been without a token for longest."""
        if self._turns is None or (self._turns.done() and monotonic() - self._turns_at > TURNS_FOR_S):
            self._turns = asyncio.create_task(self._ask_engines())
        return await asyncio.shield(self._turns)

    async def _ask_engines(self) -> JSON:
        asked = [(e.engine_id, e.member) for e in self._engines.by_id.values() if e.member is not None and e.health.lives]
        answers = await asyncio.gather(*(_said(member.ask("in_flight", MAX_TURNS, timeout_s=ANSWER_S)) for _, member in asked))
        waits, turns = Counter[str](), list[JSON]()
        for (engine_id, _), answer in zip(asked, answers, strict=True):
            waits.update(answer["waits"] if answer else {})
            turns += [{**turn, "engine_id": engine_id} | _words(turn) for turn in answer["turns"]] if answer else []
        turns.sort(key=lambda turn: -turn["quiet_s"])
        silent = [engine_id for (engine_id, _), answer in zip(asked, answers, strict=True) if answer is None]
        self._turns_at = monotonic()
        return {"count": sum(answer["count"] for answer in answers if answer), "waits": dict(waits), "turns": turns, "silent": silent}

    # -- the store ------------------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        async with self._refreshing:
            began = monotonic()
            if began < self._good_until:
                if self._silent:
                    raise BadRequest(self._silent, 503, "store_unavailable")
                return
            register = self._sessions.register
            try:
                async with asyncio.timeout(STORE_S):
                    before = list(register.rows)
                    register.take(await self._stores.port().heads(), before)
                    await self._learn(register.unknown(), register.learn)
            except (RolloutFTError, TimeoutError, OSError) as e:
                self._silent, self._good_until = f"the checkpoint store does not answer: {e or 'in time'}", monotonic() + SILENT_FOR_S
                raise BadRequest(self._silent, 503, "store_unavailable") from e
            self._silent = ""
            self._good_until = monotonic() + SHARE * (monotonic() - began)

    async def _learn(self, unknown: Sequence[str], learn: Callable[[Any], None]) -> None:
        for at in range(0, len(unknown), OUTLINES):
            learn(await self._stores.port().outlines(unknown[at : at + OUTLINES]))


def _abridged(fleet: JSON) -> JSON:
    """Of many engines those that are not as they should be come first, and no more than `MAX_ENGINES`; all are counted."""
    gravest = sorted(fleet["engines"], key=lambda engine: engine["state"] in (State.HEALTHY, State.RETIRED))
    states = dict(Counter(engine["state"] for engine in gravest))
    return {**fleet, "engines": gravest[:MAX_ENGINES], "engine_states": states, "nodes": {}}


def memory() -> tuple[Recent, Recoveries]:
    """What begins before there is anything to look at."""
    return Recent(secrets.token_hex(4)), Recoveries()


async def _said(call: Awaitable[JSON]) -> JSON | None:
    """None where there was no answer, whatever kept it."""
    try:
        return await call
    except Exception:
        return None


def _words(turn: JSON) -> JSON:
    what, remedy = WAITS[turn["waits_for"]]
    return {"waits_for_words": what, "remedy": remedy}
