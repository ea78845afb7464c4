"""Real SGLang engines that somebody else owns: slime's loops end, and every turn goes on with the next weights."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from model_server import ModelServer
from owner import Owner

from rollout_ft.config import load
from rollout_ft.engine.attached import Attached, Report
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.generation import Generation, Order
from rollout_ft.engine.observer import Held
from rollout_ft.engine.sglang import SGLang
from rollout_ft.errors import EngineUnfit
from rollout_ft.session.template import load as load_template
from rollout_ft.types import JSON

TOKENS = 400


async def nothing(generation: Generation) -> JSON | None:
    return None


def generation(number: int, stop: int) -> Generation:
    sampling = {"temperature": 1.0, "ignore_eos": True}
    return Generation(Order(f"k{number}", "r", "d", b"%d,2,3" % (5 + number), sampling, TOKENS, number, frozenset(), stop, prompt_tokens=3))


async def test_smoke_slimes_loops_end_and_what_they_aborted_goes_on(sglang_server: ModelServer, tiny_model: Path):
    url = sglang_server.url
    settings = {
        "engine.kind": "sglang", "model.path": str(tiny_model), "model.context_tokens": 4096, "session.max_output_tokens": 512,
        "engine.attach.urls": [url], "engine.attach.poll_s": 0.5,
    }  # fmt: skip
    config = load(None, settings)
    template, owner = load_template(str(tiny_model)), Owner([url])
    unit = await Attached.start(config, "e", url, template.encode)
    engine = SGLang("e", url)
    driver, reports, before = Driver(engine, config.engine), list[Report](), ""
    try:
        await unit.watch(driver, reports.append)
        before = unit.state.version
        vocabulary = int(template.tokenizer.get_vocab_size(with_added_tokens=True))
        turns = [generation(n, vocabulary) for n in range(4)]
        running = asyncio.gather(*(driver.run(g, nothing, 0) for g in turns))
        async with asyncio.timeout(60):
            while not all(len(g.ids) > 8 for g in turns):
                await asyncio.sleep(0.01)
        await owner.abort_until_idle(30)
        async with asyncio.timeout(10):
            while unit.state.held is not Held.ABORTED or driver.calls:
                await asyncio.sleep(0.01)
        await owner.stays_idle(2)
        assert await owner.flush() == 1
        await owner.update("next")
        async with asyncio.timeout(120):
            await running
        assert [len(g.ids) for g in turns] == [TOKENS] * 4
        assert [[s.version for s in g.spans] for g in turns] == [[before, "next"]] * 4
        assert {r.open for r in reports} == {True, False}
    finally:
        await owner.name(before)
        await owner.http.close()
        await unit.aclose()
        await engine.aclose()


async def test_an_engine_of_a_smaller_context_is_refused(sglang_server: ModelServer, tiny_model: Path):
    settings: dict[str, Any] = {"engine.kind": "sglang", "model.path": str(tiny_model), "engine.attach.urls": [sglang_server.url]}
    with pytest.raises(EngineUnfit, match=r"model\.context_tokens"):
        await Attached.start(load(None, settings), "e", sglang_server.url, load_template(str(tiny_model)).encode)


async def test_an_engine_with_another_tokenizer_is_refused(sglang_server: ModelServer, tiny_model: Path):
    settings: dict[str, Any] = {
        "engine.kind": "sglang", "model.path": str(tiny_model), "model.context_tokens": 4096, "session.max_output_tokens": 512,
        "engine.attach.urls": [sglang_server.url],
    }  # fmt: skip
    with pytest.raises(EngineUnfit, match=r"tokenizer"):
        await Attached.start(load(None, settings), "e", sglang_server.url, lambda text: [1, 2, 3])
