"""An engine that dies, hangs or closes a connection, as the adapter and a generation on it see it."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from asking import LONG, PROMPT, Told, greedy, in_flight, listen, whole
from model_server import ModelServer, Start

from rollout_ft.engine.generation import Generation, Order
from rollout_ft.engine.pace import Floors, Pace
from rollout_ft.engine.patience import Patience
from rollout_ft.engine.sglang import SGLang
from rollout_ft.errors import EngineLost
from rollout_ft.types import JSON

pytestmark = pytest.mark.timeout(240)

KEEP_ALIVE_S = 5.0


@pytest.mark.parametrize("victim", ["scheduler", "server"])
async def test_a_process_that_is_killed_ends_the_stream_and_the_engine(start: Start, victim: str):
    server = start()
    engine = SGLang("e0", server.url)
    async with in_flight(engine) as (told, task):
        os.kill(server.scheduler_pid if victim == "scheduler" else server.pid, signal.SIGKILL)
        with pytest.raises(EngineLost):
            await task
    assert len(told.ids) >= 20
    server.wait_until_gone(30)
    assert not await engine.alive()
    await engine.aclose()


async def given_up(reason: str) -> bool:
    return True


async def quiet(generation: Generation) -> JSON | None:
    return None


@pytest.mark.parametrize("victim", ["scheduler", "server"])
async def test_a_process_that_is_stopped_is_a_stall_and_goes_on_when_it_does(start: Start, victim: str):
    server = start()
    engine = SGLang("e0", server.url)
    pid = server.scheduler_pid if victim == "scheduler" else server.pid
    order = Order("key", "request", "", ",".join(map(str, PROMPT)).encode(), greedy(LONG), LONG, 7, frozenset(), 1 << 31)
    generation = Generation(order)

    async def stop_in_the_middle(generation: Generation) -> JSON | None:
        if len(generation.ids) >= 20:
            os.kill(pid, signal.SIGSTOP)
        return None

    patience = Patience(Pace(Floors(60, 1.5, 60, 600, 3)), given_up)
    with pytest.raises(EngineLost, match="stalled"):
        await generation.call(engine, patience, stop_in_the_middle, lambda: None)
    os.kill(pid, signal.SIGCONT)
    assert len((await whole(server.url, 5))["output_ids"]) == 5
    assert await engine.ready()
    await engine.aclose()


async def test_a_connection_is_let_go_before_the_server_closes_it(server: ModelServer):
    """The server closes what was idle for five seconds: a request sent just then would fail for no reason."""
    adapters = [SGLang(f"e{i}", server.url) for i in range(40)]

    async def ask_again(engine: SGLang, after_s: float) -> None:
        await listen(engine, Told(), 1)
        await asyncio.sleep(after_s)
        await listen(engine, Told(), 1)

    try:
        async with asyncio.TaskGroup() as group:
            for i, adapter in enumerate(adapters):
                group.create_task(ask_again(adapter, KEEP_ALIVE_S - 0.1 + i / 200))
    finally:
        for adapter in adapters:
            await adapter.aclose()
