"""A real SGLang of two data-parallel ranks: a session stays on the one that has its prefix, and both take new weights."""

from __future__ import annotations

import orjson
from asking import greedy
from commanded import played
from model_server import Start

from rollout_ft.engine.driver import Driver
from rollout_ft.engine.port import Chunk

TWO = ("--dp-size", "2")
A_CORE_EACH = {"SGLANG_CPU_OMP_THREADS_BIND": "0|0"}
SESSIONS = ("session-0", "session-3", "session-5", "session-6")


async def turn(driver: Driver, prompt: list[int], rank: int | None) -> tuple[list[int], int]:
    """What it sampled, and how much of the prompt was cached."""
    chunks: list[Chunk] = [c async for c in driver.engine.generate("", orjson.dumps(prompt)[1:-1], greedy(16), rank=rank)]
    return [i for c in chunks for i in c.ids], max(c.cached for c in chunks)


async def test_a_session_stays_on_the_rank_that_has_its_prefix(start_sglang: Start):
    server = start_sglang(*TWO, env=A_CORE_EACH)
    async with played(server) as p:
        p.driver.ranks = await p.engine.ranks()
        assert {p.driver.rank_of(each) for each in SESSIONS} == {0, 1}
        for n, session_id in enumerate(SESSIONS):
            rank, prompt = p.driver.rank_of(session_id), list(range(10 + n, 130 + n))
            assert rank is not None
            sampled, cached = await turn(p.driver, prompt, rank)
            assert cached == 0
            assert (await turn(p.driver, [*prompt, *sampled, 7], 1 - rank))[1] == 0
            assert (await turn(p.driver, [*prompt, *sampled, 7], rank))[1] >= len(prompt)
        done = await p.do("fleet/weights", {"version": "of-both", "path": str(server.model)})
        assert (done["ok"], done["version"]) == (True, "of-both"), done
        for session_id in SESSIONS:
            chunks = [c async for c in p.engine.generate("", b"5,6,7", greedy(4), rank=p.driver.rank_of(session_id))]
            assert [s.version for s in chunks[-1].spans] == ["of-both"]
