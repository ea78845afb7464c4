"""The list of a router's workers, as it is read again and again."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.config import AttachConfig
from rollout_ft.errors import ConfigError
from rollout_ft.fleet.workers import MISSES, Roll, Workers, base_url, engine_id_of, listed

A, B = "http://10.0.0.5:15000", "http://10.0.0.6:15000"
WORKER = {"id": "d1fd5ee4", "url": A, "model_id": "m", "worker_type": "regular", "is_healthy": True, "load": 0, "connection_mode": "HTTP"}


def test_both_kinds_of_lists_are_read():
    assert listed({"workers": [WORKER, {**WORKER, "url": B}], "total": 2}) == [A, B]
    assert listed({"urls": [A, B + "/"]}) == [A, B]


def test_a_worker_that_its_router_calls_unhealthy_is_still_there():
    assert listed({"workers": [{**WORKER, "is_healthy": False}]}) == [A]


def test_the_ranks_of_one_engine_are_one_engine():
    assert listed({"urls": [f"{A}@0", f"{A}@1"]}) == [A]
    assert base_url("http://me@host:1") == "http://me@host:1"


def test_workers_that_speak_no_http_are_left_out():
    assert listed({"workers": [{**WORKER, "url": "grpc://10.0.0.7:1"}]}) == []


@pytest.mark.parametrize("answer", [{}, {"workers": None}, {"detail": "Not Found"}])
def test_what_is_no_list_is_none(answer: dict[str, Any]):
    with pytest.raises(ValueError, match="neither"):
        listed(answer)


def test_an_engine_has_one_name_whoever_writes_its_url():
    assert engine_id_of(A) == engine_id_of(A + "/") == "engine-10.0.0.5:15000"
    assert engine_id_of("https://gpu7/engines/1") == "engine-gpu7:443_engines_1"


def test_who_is_missing_once_has_not_left():
    roll = Roll([A, B])
    for _ in range(MISSES - 1):
        assert roll.read([A]) == ([], [])
    assert roll.read([A, B]) == ([], [])


def test_who_is_missing_for_long_has_left_and_comes_back_as_new():
    roll = Roll([A, B])
    assert [roll.read([A])[1] for _ in range(MISSES)][-1] == [B]
    assert roll.read([A]) == ([], [])
    assert roll.read([A, B]) == ([B], [])


@given(st.lists(st.sets(st.sampled_from("abc")), max_size=30))
def test_whoever_came_is_there_until_it_left(lists: list[set[str]]):
    roll, there = Roll(), set[str]()
    for urls in lists:
        came, left = roll.read(urls)
        assert not set(came) & there
        there |= set(came)
        assert set(left) <= there - urls
        there -= set(left)
        assert urls <= there


class Router:
    """Answers GETs from `answers`, by path."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1].decode()
        status, body = self.answers.get(path, (404, {}))
        data = json.dumps(body).encode()
        writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % (status, len(data)) + data)
        await writer.drain()
        writer.close()


async def follow(workers: Workers) -> tuple[asyncio.Queue[tuple[str, str]], asyncio.Task[None]]:
    told: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def left(url: str, why: str) -> None:
        told.put_nowait(("left", url))

    return told, asyncio.create_task(workers.follow(lambda url: told.put_nowait(("came", url)), left))


@pytest.mark.parametrize(("route", "answer"), [("/workers", {"workers": [WORKER]}), ("/list_workers", {"urls": [A]})])
async def test_who_comes_and_who_leaves_is_told(route: str, answer: Any):
    router = Router()
    async with router as url:
        router.answers[route] = (200, answer)
        workers = Workers(AttachConfig(router_url=url, poll_s=0.02), 5)
        assert await workers.first() == [A]
        told, task = await follow(workers)
        router.answers[route] = (200, {"urls": [A, B]})
        assert await asyncio.wait_for(told.get(), 5) == ("came", B)
        router.answers[route] = (200, {"urls": [B]})
        assert await asyncio.wait_for(told.get(), 5) == ("left", A)
        task.cancel()


async def test_a_list_that_cannot_be_read_changes_nothing():
    router = Router()
    async with router as url:
        router.answers["/workers"] = (200, {"workers": [WORKER]})
        workers = Workers(AttachConfig(router_url=url, poll_s=0.02), 5)
        await workers.first()
        told, task = await follow(workers)
        router.answers["/workers"] = (500, {})
        async with asyncio.timeout(5):
            while not workers.trouble:
                await asyncio.sleep(0.01)
        router.answers["/workers"] = (200, {"urls": [A, B]})
        assert await asyncio.wait_for(told.get(), 5) == ("came", B)
        task.cancel()


async def test_a_router_without_workers_is_said_by_its_key():
    router = Router()
    async with router as url:
        router.answers["/workers"] = (200, {"workers": []})
        with pytest.raises(ConfigError, match=r"engine\.attach\.router_url: .*lists no worker"):
            await Workers(AttachConfig(router_url=url, poll_s=0.02), 0.1).first()
        router.answers.clear()
        with pytest.raises(ConfigError, match="no router"):
            await Workers(AttachConfig(router_url=url, poll_s=0.02), 0.1).first()
