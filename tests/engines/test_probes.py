"""What an engine that nobody uses, or that is paused, answers to who asks whether it works."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing

import pytest
from asking import call
from model_server import ModelServer, Start

from rollout_ft.config import EngineConfig
from rollout_ft.engine.canary import Canary, Probe
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.evidence import Evidence
from rollout_ft.engine.sglang import SGLang

pytestmark = pytest.mark.timeout(240)
ANSWERED = {Probe.GENERATE: Evidence.MOVED, Probe.INFO: Evidence.PROBE_ANSWERED}


def canary_of(engine: SGLang) -> Canary:
    return Driver(engine, EngineConfig(token_timeout_s=2, compile_timeout_s=20)).canary


@pytest.mark.smoke
@pytest.mark.parametrize("probe", Probe)
async def test_an_engine_that_works_answers(engine: SGLang, probe: Probe):
    canary = canary_of(engine)
    assert [await canary.sing(probe) for _ in range(3)] == [ANSWERED[probe]] * 3


async def test_the_canary_has_nothing_sampled(server: ModelServer, engine: SGLang):
    async with aclosing(engine.generate("canary", b"0", {"max_new_tokens": 0, "temperature": 0})) as stream:
        chunks = [chunk async for chunk in stream]
    assert [(chunk.ids, chunk.finish) for chunk in chunks] == [([], "length")]


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["abort", "in_place", "retract"])
async def test_the_scheduler_answers_while_it_is_paused(server: ModelServer, engine: SGLang, mode: str):
    assert (await call(server.url, "/pause_generation", {"mode": mode}))[0] == 200
    assert await canary_of(engine).sing(Probe.INFO) is Evidence.PROBE_ANSWERED


@pytest.mark.parametrize("probe", Probe)
async def test_a_scheduler_that_stands_still_answers_neither_and_both_again_when_it_goes_on(start: Start, probe: Probe):
    server = start()
    engine = SGLang("e0", server.url)
    canary = canary_of(engine)
    assert await canary.sing(probe) is ANSWERED[probe]
    os.kill(server.scheduler_pid, signal.SIGSTOP)
    assert await canary.sing(probe) is Evidence.PROBE_MISSED
    os.kill(server.scheduler_pid, signal.SIGCONT)
    async with asyncio.timeout(30):
        while await canary.sing(probe) is not ANSWERED[probe]:
            pass
    await engine.aclose()
