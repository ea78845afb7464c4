"""One engine under a trainer's commands, with turns that are driven as in a run."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from model_server import ModelServer

from rollout_ft.config import EngineConfig
from rollout_ft.engine.control import HTTPControl
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.generation import Generation, Order
from rollout_ft.engine.sglang import SGLang
from rollout_ft.engine.weights import EngineWeights
from rollout_ft.fleet.weights import Command, Weights, after
from rollout_ft.gateway.trainer import command_of
from rollout_ft.types import JSON

TOKENS, SEEN = 120, 8


@dataclass
class Played:
    engine: SGLang
    weights: EngineWeights
    driver: Driver
    fleet: Weights

    async def do(self, route: str, body: JSON) -> JSON:
        return await self.command(command_of(route, body))

    async def command(self, command: Command) -> JSON:
        then = after(self.fleet, command, 1.0)
        told = await self.weights.carry_out(command, then, 60)
        if told["ok"]:
            self.fleet = then
        return told


@contextlib.asynccontextmanager
async def played(server: ModelServer) -> AsyncIterator[Played]:
    engine, control = SGLang("e0", server.url), HTTPControl("e0", server.url)
    driver = Driver(engine, EngineConfig(first_token_timeout_s=60, token_timeout_s=60))
    weights = EngineWeights(engine, control, driver.gate, lambda *_, **__: None)
    await weights.start()
    try:
        yield Played(engine, weights, driver, Weights(1, (weights.version,)))
    finally:
        await control.aclose()
        await engine.aclose()


async def in_flight(p: Played) -> tuple[Generation, asyncio.Task[None]]:
    """A turn that has some tokens, and goes on."""
    sampling = {"temperature": 0.0, "ignore_eos": True, "stream_interval": 1}
    order = Order("k", "r", "d", b"9,10,11", sampling, TOKENS, 7, frozenset(), 2**20)
    generation, some = Generation(order), asyncio.Event()

    async def progress(g: Generation) -> JSON | None:
        if len(g.ids) >= SEEN:
            some.set()
        return None

    turn = asyncio.create_task(p.driver.run(generation, progress, 0.0))
    await some.wait()
    return generation, turn
