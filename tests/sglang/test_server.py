"""The real SGLang on a CPU: that it starts, answers, and ends whole."""

from __future__ import annotations

import psutil
from model_server import ModelServer, Start

from rollout_ft.engine.sglang import SGLang


async def test_smoke_a_generation_through_our_adapter(sglang_server: ModelServer):
    engine = SGLang("e0", sglang_server.url)
    sampling = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}
    chunks = [chunk async for chunk in engine.generate("smoke", b"10,20,30", sampling)]
    await engine.aclose()
    ids = [i for chunk in chunks for i in chunk.ids]
    assert (len(ids), chunks[-1].finish) == (20, "length")
    assert len(set(ids)) > 5, "the tiny model says something"


def test_nothing_of_a_server_outlives_its_guard(start_sglang: Start):
    server = start_sglang()
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    assert len(family) >= 3
    assert server.scheduler_pid in [process.pid for process in family]
    server.kill()
    _gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
