"""What people see of a run that goes on, from a real one in this process: its lists, turns in flight, and one trial's timeline."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp
import orjson
import pytest
import pytest_asyncio

from rollout_ft.checkpoint.store import Store
from rollout_ft.checkpoint.view import View
from rollout_ft.config import Config
from rollout_ft.errors import BadRequest
from rollout_ft.fleet import looks
from rollout_ft.fleet.listing import STUCK_S, Query
from rollout_ft.fleet.looks import MAX_ENGINES, Looks, _abridged
from rollout_ft.fleet.register import Register
from rollout_ft.testing.local_run import LocalRun, local_run
from rollout_ft.trial.client import Session
from rollout_ft.types import JSON

CONFIG: JSON = {
    "engine": {"count": 2, "args": ["--model", "hash", "--tokens-per-s", "25"], "stream_interval_tokens": 1, "token_timeout_s": 30.0},
    "store": {"replicas": 1},
}  # fmt: skip
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run() -> AsyncGenerator[LocalRun]:
    async with local_run(Config.model_validate(CONFIG)) as made:
        await made.whole()
        yield made


async def get(run: LocalRun, path: str) -> tuple[Any, Any]:
    headers = {"authorization": f"Bearer {run.keys.operator}"}
    async with aiohttp.ClientSession() as http, http.get(run.url + path, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json(), answer.headers


async def ask(session: Session, tokens: int) -> None:
    body = {"model": "default", "messages": [{"role": "user", "content": "explain tides"}], "max_tokens": tokens}
    headers = {"authorization": f"Bearer {session.api_key}"}
    async with aiohttp.ClientSession() as http, http.post(f"{session.base_url}/chat/completions", json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()


async def test_a_group_is_had_by_its_name_also_page_by_page(run: LocalRun) -> None:
    for i in range(5):
        await run.client.open_session(trial_id=f"group-{i}", group_id="g7", task_id=f"t{i}")
    await run.client.open_session(trial_id="group-alone")
    await run.client.outcome("group-3", "completed", 0.5, "", 1)
    whole, headers = await get(run, "/trials?group_id=g7")
    assert [(t["trial_id"], t["task_id"]) for t in whole] == [(f"group-{i}", f"t{i}") for i in range(5)]
    assert headers["x-rollout-ft-total"] == "5"
    assert [(t["state"], t["outcome"], t["reward"]) for t in whole if t["outcome"]] == [("ended", "completed", 0.5)]
    first, headers = await get(run, "/trials?group_id=g7&limit=3")
    rest, last = await get(run, f"/trials?group_id=g7&limit=3&after={headers['x-rollout-ft-next']}")
    assert [t["trial_id"] for t in (*first, *rest)] == [t["trial_id"] for t in whole]
    assert "x-rollout-ft-next" not in last
    done, _ = await get(run, "/trials?group_id=g7&outcome=completed")
    assert [t["trial_id"] for t in done] == ["group-3"]


async def test_a_turn_in_flight_is_seen_with_its_age_its_last_token_and_what_it_waits_for(run: LocalRun) -> None:
    session = await run.client.open_session(trial_id="flying")
    asking = asyncio.create_task(ask(session, 60))
    while not (flying := [t for t in (await get(run, "/overview"))[0]["turns"]["turns"] if t["tokens"] > 3]):
        await asyncio.sleep(0.05)
    (turn,) = flying
    assert (turn["trial_id"], turn["turn"], turn["waits_for"]) == ("flying", 1, "tokens")
    assert turn["key"]
    assert 0 <= turn["quiet_s"] <= turn["age_s"] < STUCK_S
    assert turn["engine_id"] in ("engine-0", "engine-1")
    await run.client.request("POST", "/fleet/pause", {})
    while (seen := (await get(run, "/overview"))[0])["turns"]["waits"] != {"paused": 1}:
        await asyncio.sleep(0.05)
    assert any("/fleet/resume" in each["remedy"] for each in seen["problems"])
    await run.client.request("POST", "/fleet/resume", {})
    await asking
    while (await get(run, "/overview"))[0]["turns"]["count"]:
        await asyncio.sleep(0.05)


async def test_many_who_look_at_once_ask_the_engines_once(run: LocalRun) -> None:
    asked = 0
    engine: Any = next(iter(run.crew.engines.values()))
    in_flight = engine.in_flight

    async def counted(limit: int) -> JSON:
        nonlocal asked
        asked += 1
        return await in_flight(limit)

    await asyncio.sleep(1.1)
    engine.in_flight = counted
    await asyncio.gather(*(get(run, "/overview") for _ in range(8)))
    engine.in_flight = in_flight
    assert asked == 1


async def test_an_engine_that_does_not_say_is_named_and_the_rest_is_shown(run: LocalRun) -> None:
    async def broken(limit: int) -> JSON:
        raise RuntimeError("no")

    await run.client.open_session(trial_id="beside")
    engine: Any = run.crew.engines["engine-1"]
    in_flight, engine.in_flight = engine.in_flight, broken
    await asyncio.sleep(1.1)
    seen, _ = await get(run, "/overview")
    engine.in_flight = in_flight
    assert seen["turns"]["silent"] == ["engine-1"]
    assert seen["trials"]["known"] > 0


async def test_a_killed_engine_is_in_the_trials_timeline_and_among_the_recoveries(run: LocalRun) -> None:
    session = await run.client.open_session(trial_id="struck", task_id="q")
    asking = asyncio.create_task(ask(session, 50))
    while not (flying := [t for t in (await get(run, "/overview"))[0]["turns"]["turns"] if t["trial_id"] == "struck" and t["tokens"]]):
        await asyncio.sleep(0.05)
    engine_id = flying[0]["engine_id"]
    run.crew.engines[engine_id].unit.kill()
    await asking
    told, _ = await get(run, "/trials/struck/timeline")
    kinds = [moment["kind"] for moment in told["moments"]]
    assert [kind for kind in kinds if kind in ("opened", "fault", "moved", "resumed", "turn")] == [
        "opened",
        "fault",
        "moved",
        "resumed",
        "turn",
    ]
    assert (told["trial"]["trial_id"], told["left_out"]) == ("struck", 0)
    lost = next(each for each in (await get(run, "/overview"))[0]["recoveries"] if each["engine"] == engine_id)
    assert (lost["moved"], lost["resumed"]) == (1, 1)
    await run.whole()


async def test_events_are_told_once_from_a_cursor_on(run: LocalRun) -> None:
    before, _ = await get(run, "/events")
    await run.client.open_session(trial_id="eventful")
    after, _ = await get(run, f"/events?since={before['next']}")
    assert [(e["event"], e["trial"]) for e in after["events"]] == [("trial.opened", "eventful")]
    assert not after["missed"]


async def test_a_trial_that_was_collected_keeps_its_place_in_the_lists(run: LocalRun) -> None:
    await run.client.open_session(trial_id="collected", group_id="g9")
    await run.client.outcome("collected", "infra_exhausted", None, "engines died", 1)
    await run.client.release("collected")
    (trial,), _ = await get(run, "/trials?group_id=g9")
    assert (trial["state"], trial["outcome"], trial["attention"], trial["why"]) == ("released", "infra_exhausted", "lost", "engines died")
    told, _ = await get(run, "/trials/collected/timeline")
    assert [m["kind"] for m in told["moments"]] == ["opened", "ended"]


async def test_a_register_that_knows_nothing_learns_all_from_the_store(run: LocalRun) -> None:
    """As after the supervisor's death: nothing is known but what the store has."""
    store: Store = run.store
    heads = await store.heads()
    mine = run.register
    again = Register()
    again.take(heads, list(again.rows))
    again.learn(await store.outlines(again.unknown()))
    assert again.unknown() == []
    mine.take(heads, list(mine.rows))
    assert orjson.dumps(list(sorted_rows(again))) == orjson.dumps(list(sorted_rows(mine)))


def sorted_rows(register: Register) -> list[JSON]:
    return [row.describe("") for _, row in sorted(register.rows.items())]


class Silent:
    asked = 0

    def port(self) -> Silent:
        return self

    async def heads(self) -> None:
        self.asked += 1
        raise OSError("nobody is there")


async def test_a_store_that_does_not_answer_is_not_asked_by_each_who_looks_but_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now, store, nothing = 100.0, Silent(), None
    monkeypatch.setattr(looks, "monotonic", lambda: now)
    some: Any = (nothing, store, type("Sessions", (), {"register": Register()}), nothing, nothing)
    made = Looks(*some)
    for _ in range(5):
        with pytest.raises(BadRequest, match="does not answer: nobody is there"):
            await made.trials(Query())
    assert store.asked == 1
    now += looks.SILENT_FOR_S
    with pytest.raises(BadRequest):
        await made.trials(Query())
    assert store.asked == 2


async def test_a_thousand_engines_are_abridged_with_those_in_trouble_first():
    engines = [{"engine_id": f"e{i}", "state": "dead" if i == 900 else "healthy"} for i in range(1000)]
    told = _abridged({"engines": engines, "nodes": {"a": "b"}})
    assert (told["engines"][0]["engine_id"], len(told["engines"])) == ("e900", MAX_ENGINES)
    assert told["engine_states"] == {"dead": 1, "healthy": 999}


async def test_an_empty_store_has_no_outlines() -> None:
    assert await Store("a", View(1, ("a",), 1)).outlines(["nobody"]) == {}
