"""A gateway sends an owner what is new of a large body, and the whole wherever that is not enough."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson
import pytest
from stack import KEYS, Stack, _bound, stack

from rollout_ft.config import Config
from rollout_ft.engine import http
from rollout_ft.faultpoints import Inert
from rollout_ft.gateway.asgi import Server
from rollout_ft.gateway.gateway import KEPT_BYTES, Gateway
from rollout_ft.gateway.owners import Owners
from rollout_ft.line import token_of
from rollout_ft.types import JSON

SID = "t~1"
LARGE = "x" * (KEPT_BYTES + 1)


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what the owner was sent."""
    sizes: list[int] = []
    take = http.received

    def taken(argument: int, payload: bytearray) -> Any:
        sizes.append(len(payload))
        return take(argument, payload)

    monkeypatch.setattr(http, "received", taken)
    return sizes


@contextlib.asynccontextmanager
async def gateways(**config: Any) -> AsyncIterator[tuple[Stack, list[str]]]:
    """Two in front of one owner, and the session's URL at each."""
    settings = Config.model_validate({"gateway": config, "session": {"max_output_tokens": 64}, "model": {"context_tokens": 2 * KEPT_BYTES}})
    async with stack(settings) as s:
        await s.open("t")
        sock, port = _bound()
        owners = Owners(s.supervisor, token_of(KEYS.internal), 60)
        second = Gateway(settings.gateway, KEYS, s.supervisor, owners, s.url, Inert(), settings.model)
        server = Server(second.handle, sock, settings.gateway)
        await server.ready()
        try:
            yield s, [f"{url}/sessions/{SID}/v1/chat/completions" for url in (s.url, f"http://127.0.0.1:{port}")]
        finally:
            await owners.aclose()
            await server.aclose()


async def ask(client: aiohttp.ClientSession, url: str, messages: list[JSON], **fields: Any) -> JSON:
    async with client.post(
        url, data=orjson.dumps({"messages": messages, **fields}), headers={"authorization": f"Bearer {KEYS.session(SID)}"}
    ) as r:
        assert r.status == 200, await r.text()
        return orjson.loads(await r.read())["choices"][0]["message"]


async def conversation(through: list[int], **config: Any) -> tuple[list[JSON], bytes]:
    """A turn through each of these gateways; what was said, and the trajectory."""
    async with gateways(**config) as (s, urls), aiohttp.ClientSession() as client:
        messages: list[JSON] = [{"role": "system", "content": LARGE}]
        for turn, gateway in enumerate(through):
            messages.append({"role": "user", "content": f"turn {turn}"})
            messages.append(await ask(client, urls[gateway], messages))
        made = orjson.loads(await s.supervisor.read_session(SID, "trajectory"))
        return messages, orjson.dumps([path["token_ids"] for path in made["paths"]])


async def test_of_a_large_body_the_owner_is_sent_once_what_it_has_read(received: list[int]):
    await conversation([0, 0, 0, 0])
    assert received[0] > KEPT_BYTES
    assert max(received[1:]) < 1000


@pytest.mark.parametrize("through", [[0, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0]])
async def test_whichever_gateway_a_turn_comes_by_the_trajectory_is_the_same(through: list[int], received: list[int]):
    assert await conversation(through) == await conversation([0] * len(through), kept_body_bytes=0)
    assert sum(size > KEPT_BYTES for size in received[-len(through) :]) == len(through)


async def test_a_retry_a_change_and_a_rollback_are_what_they_are_without_it(received: list[int]):
    async with gateways() as (s, (url, _)), aiohttp.ClientSession() as client:
        first: list[JSON] = [{"role": "system", "content": LARGE}, {"role": "user", "content": "a"}]
        one = await ask(client, url, first)
        longer = [*first, one, {"role": "user", "content": "b"}]
        two = await ask(client, url, longer)
        calls = s.engine.calls
        async with client.post(
            url,
            data=orjson.dumps({"messages": longer}),
            headers={"authorization": f"Bearer {KEYS.session(SID)}", "x-stainless-retry-count": "1"},
        ) as r:
            assert (orjson.loads(await r.read())["choices"][0]["message"], s.engine.calls) == (two, calls)
        assert max(received[1:]) < 1000
        await ask(client, url, [*first, one, {"role": "user", "content": "other"}])
        await ask(client, url, [{"role": "system", "content": LARGE + "y"}, {"role": "user", "content": "a"}])
        assert s.engine.calls == calls + 2


async def test_what_is_wrong_behind_a_body_that_was_read_is_told_as_if_all_of_it_were_sent():
    async with gateways() as (_, urls), aiohttp.ClientSession() as client:
        headers = {"authorization": f"Bearer {KEYS.session(SID)}"}
        messages: list[JSON] = [{"role": "system", "content": LARGE}, {"role": "user", "content": "a"}]
        messages.append(await ask(client, urls[0], messages))
        good = orjson.dumps({"messages": [*messages, {"role": "user", "content": "b"}]})
        for bad in (good[:-1], good.replace(b"}]}", b"},]}"), good[:-1] + b',"messages":[]}', good[:-1] + b',"n":2}'):
            told: list[tuple[int, bytes]] = []
            for url in urls:
                async with client.post(url, data=bad, headers=headers) as r:
                    told.append((r.status, await r.read()))
            assert told[0] == told[1]
            assert told[0][0] == 400
        await ask(client, urls[0], [*messages, {"role": "user", "content": "b"}])
