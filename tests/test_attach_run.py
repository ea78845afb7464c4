"""A real run on engines that somebody else owns: who comes, who goes, and what becomes of their sessions."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

import aiohttp
import orjson
import pytest
from owner import owned
from ray_run import MARK, nothing_left

import rollout_ft
from rollout_ft.fleet.workers import engine_id_of
from rollout_ft.testing.small_engine import MODEL_DIR
from rollout_ft.types import JSON

pytestmark = pytest.mark.timeout(240)
OVERRIDES = {
    "ray.address": "local", "model.path": str(MODEL_DIR), "engine.attach.router_url": "", "engine.attach.poll_s": 0.25,
    "engine.first_token_timeout_s": 5, "engine.token_timeout_s": 2, "engine.start_timeout_s": 20, "engine.stream_interval_tokens": 4,
    "engine.partial_flush_s": 0.2, "gateway.host": "127.0.0.1", "gateway.port": 0, "gateway.advertise_url": "", "gateway.ping_s": 0.5,
    "session.max_output_tokens": 512,
}  # fmt: skip


class Stage:
    def __init__(self, run: rollout_ft.Run):
        self.run = run
        self.events: list[JSON] = []
        run.on_event = self.events.append

    async def engines(self) -> dict[str, JSON]:
        return {e["engine_id"]: e for e in (await self.run.fleet())["engines"]}

    async def until(self, holds: Callable[[dict[str, JSON]], bool], limit_s: float = 60) -> None:
        async with asyncio.timeout(limit_s):
            while not holds(await self.engines()):
                await asyncio.sleep(0.05)

    async def heard(self, name: str, limit_s: float = 60, **fields: Any) -> JSON:
        async with asyncio.timeout(limit_s):
            while True:
                for event in self.events:
                    if event["event"] == name and fields.items() <= event.items():
                        return event
                await asyncio.sleep(0.05)

    async def post(self, path: str, body: JSON) -> tuple[int, JSON]:
        headers = {"authorization": f"Bearer {self.run.operator_key}"}
        async with aiohttp.ClientSession() as http, http.post(self.run.gateway_url + path, json=body, headers=headers) as answer:
            return answer.status, await answer.json()

    async def owner_of(self, session_id: str) -> str:
        located = await self.run.supervisor.ask("locate", session_id, None)
        return located["engine_id"]


class Talk:
    """One session that talks, turn after turn; every turn must be answered."""

    def __init__(self, session: Any):
        self.session, self.turns = session, 0
        self.messages: list[JSON] = [{"role": "user", "content": "begin"}]

    async def turn(self, tokens: int = 40) -> None:
        url, headers = f"{self.session.base_url}/chat/completions", {"authorization": f"Bearer {self.session.api_key}"}
        body = {"messages": self.messages, "max_tokens": tokens, "min_tokens": tokens}
        while True:
            async with aiohttp.ClientSession() as http, http.post(url, json=body, headers=headers) as answer:
                told = await answer.json()
                if answer.status == 503:
                    await asyncio.sleep(0.2)
                    continue
                assert answer.status == 200, told
                break
        self.messages += [told["choices"][0]["message"], {"role": "user", "content": f"go on {self.turns}"}]
        self.turns += 1

    async def many(self, turns: int, tokens: int = 40) -> None:
        for _ in range(turns):
            await self.turn(tokens)


async def talks(stage: Stage, count: int) -> list[Talk]:
    return [Talk(await stage.run.open_session(trial_id=f"t{i}-{uuid.uuid4().hex[:6]}")) for i in range(count)]


@contextlib.asynccontextmanager
async def attached(urls: list[str], **more: Any) -> AsyncGenerator[Stage]:
    mark = os.environ[MARK] = uuid.uuid4().hex
    overrides = {**OVERRIDES, "engine.attach.urls": urls, **{k.replace("__", "."): v for k, v in more.items()}}
    async with rollout_ft.start("configs/attach.yaml", overrides) as run:
        yield Stage(run)
    os.environ.pop(MARK)
    await nothing_left(mark)


def states(engines: dict[str, JSON]) -> list[str]:
    return [e["state"] for e in engines.values()]


async def test_slimes_loops_over_a_real_run_lose_no_turn():
    async with owned(3) as (owner, engines), attached(engines.urls) as stage:
        everybody = await talks(stage, 9)
        trials = asyncio.gather(*(t.many(5) for t in everybody))
        for version in ("v1", "v2"):
            await asyncio.sleep(0.6)  # into some turns, wherever they are
            await owner.abort_until_idle()
            await stage.until(lambda now: not any(e["open"] for e in now.values()))
            await owner.becomes_idle()
            await owner.stays_idle(1)
            assert await owner.flush() == 1
            await owner.update(version)
            await stage.until(lambda now: all(e["open"] for e in now.values()))
        await trials
        assert [t.turns for t in everybody] == [5] * 9
        assert {e["incarnation"] for e in (await stage.engines()).values()} == {1}
        assert {e["weight_version"] for e in (await stage.engines()).values()} == {"v2"}
        assert set(states(await stage.engines())) == {"healthy"}


async def test_an_engine_that_dies_is_asked_for_and_awaited_and_its_sessions_go_on():
    asked: asyncio.Queue[JSON] = asyncio.Queue()
    async with contextlib.AsyncExitStack() as stack:
        _, one = await stack.enter_async_context(owned(1))
        _, other = await stack.enter_async_context(owned(1))
        replace_url = await stack.enter_async_context(_callback(asked))
        async with attached([*one.urls, *other.urls], engine__attach__replace_url=replace_url) as stage:
            everybody = await talks(stage, 4)
            trials = asyncio.gather(*(t.many(4) for t in everybody))
            await asyncio.sleep(0.5)
            one.kill()
            told = await asyncio.wait_for(asked.get(), 30)
            assert (told["url"], told["incarnation"]) == (one.urls[0], 1)
            await trials
            assert [t.turns for t in everybody] == [4] * 4
            await one.again()
            name = engine_id_of(one.urls[0])
            await stage.until(lambda now: now[name]["state"] == "healthy")
            assert (await stage.engines())[name]["incarnation"] > 1


async def test_a_drained_engine_finishes_its_turns_and_its_sessions_move_when_asked_for():
    async with owned(2) as (_, engines), attached(engines.urls) as stage:
        everybody = await talks(stage, 4)
        await asyncio.gather(*(t.turn() for t in everybody))
        name = engine_id_of(engines.urls[0])
        there = [t for t in everybody if await stage.owner_of(t.session.session_id) == name]
        assert there
        running = asyncio.gather(*(t.turn(tokens=150) for t in there))
        await asyncio.sleep(0.3)
        status, told = await stage.post("/fleet/drain", {"engine_id": name})
        assert (status, told["draining"]) == (200, True)
        await running
        await stage.until(lambda now: now[name]["state"] == "retired")
        await asyncio.gather(*(t.turn() for t in everybody))
        assert {await stage.owner_of(t.session.session_id) for t in there} == {engine_id_of(engines.urls[1])}
        status, _ = await stage.post("/fleet/engines", {"urls": [engines.urls[0]]})
        await stage.until(lambda now: now[name]["state"] == "healthy")
        assert (await stage.engines())[name]["incarnation"] > 1
        assert (await stage.post("/fleet/drain", {"engine_id": "engine-7"}))[0] == 404
        assert (await stage.post("/fleet/engines", {"count": 3}))[0] == 400


async def test_a_routers_workers_come_and_go_and_come_back_as_others():
    answer: JSON = {}
    async with owned(2) as (_, engines), _listing(answer) as router:
        a, b = engines.urls
        answer["workers"] = [{"url": a, "worker_type": "regular", "is_healthy": True}]
        async with attached([], engine__attach__urls=[], engine__attach__router_url=router) as stage:
            everybody = await talks(stage, 3)
            await asyncio.gather(*(t.turn() for t in everybody))
            answer["workers"] = [{"url": a}, {"url": b}]
            await stage.until(lambda now: set(states(now)) == {"healthy"} and len(now) == 2)
            trials = asyncio.gather(*(t.many(3) for t in everybody))
            answer["workers"] = [{"url": b}]
            await stage.until(lambda now: now[engine_id_of(a)]["state"] == "retired")
            await trials
            answer["workers"] = [{"url": a}, {"url": b}]
            await stage.until(lambda now: now[engine_id_of(a)]["state"] == "healthy")
            assert (await stage.engines())[engine_id_of(a)]["incarnation"] > 1


async def test_an_update_that_goes_from_engine_to_engine_stops_nobody_for_ever():
    async with owned(2) as (owner, engines), attached(engines.urls, engine__attach__version_grace_s=3) as stage:
        one, other = (engine_id_of(url) for url in engines.urls)
        everybody = await talks(stage, 4)
        await asyncio.gather(*(t.turn() for t in everybody))
        await owner.name("v1", engines.urls[0])
        await stage.until(lambda now: (now[one]["state"], now[other]["state"]) == ("healthy", "stale"))
        await asyncio.gather(*(t.turn() for t in everybody))  # all at the one that has the new weights
        assert {await stage.owner_of(t.session.session_id) for t in everybody} == {one}
        await owner.name("v1", engines.urls[1])
        await stage.until(lambda now: set(states(now)) == {"healthy"})
        await owner.name("v2", engines.urls[0])
        await stage.until(lambda now: now[other]["state"] == "stale")
        await owner.name("v1", engines.urls[0])  # taken back
        await stage.until(lambda now: set(states(now)) == {"healthy"})
        await asyncio.gather(*(t.turn() for t in everybody))


async def test_an_engine_that_does_not_fit_is_refused_with_the_reason_and_the_others_serve():
    async with owned(1) as (_, fits), owned(1, "--context-length", "1024") as (_, small), attached([*fits.urls, *small.urls]) as stage:
        name = engine_id_of(small.urls[0])
        await stage.until(lambda now: now[name]["state"] == "retired")
        assert "model.context_tokens" in (await stage.engines())[name]["reason"]
        await (await talks(stage, 1))[0].turn()


@contextlib.asynccontextmanager
async def _http(reply: Callable[[bytes], bytes]) -> AsyncGenerator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0)
        data = reply(await reader.readexactly(length))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(data) + data)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def _callback(asked: asyncio.Queue[JSON]) -> contextlib.AbstractAsyncContextManager[str]:
    def reply(body: bytes) -> bytes:
        asked.put_nowait(orjson.loads(body))
        return b"{}"

    return _http(reply)


def _listing(answer: JSON) -> contextlib.AbstractAsyncContextManager[str]:
    return _http(lambda body: orjson.dumps(answer))
