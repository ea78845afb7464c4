"""One turn's output over several engine calls, on an engine that does as it is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from rollout_ft.config import EngineConfig
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.generation import Generation, Order, Progress, logprob_bytes
from rollout_ft.engine.port import Chunk, EngineInfo
from rollout_ft.errors import EngineLost, EngineRefused
from rollout_ft.session.tree import ids_bytes
from rollout_ft.types import JSON, Partial, VersionSpan

STOP = 99
SOON = (5, 5)


@dataclass
class Call:
    rid: str
    input_json: bytes
    sampling: JSON


STALL = "stall"
Step = Chunk | Exception | str


@dataclass
class Script:
    """An engine that plays one list of steps per call: chunks are sent, errors raised, `STALL` never ends."""

    plays: list[Sequence[Step]]
    calls: list[Call] = field(default_factory=list[Call])
    open: int = 0

    async def generate(self, rid: str, input_json: bytes, sampling: JSON, routed_from: int | None = None) -> AsyncIterator[Chunk]:
        self.calls.append(Call(rid, input_json, sampling))
        self.open += 1
        try:
            for step in self.plays[len(self.calls) - 1]:
                if isinstance(step, Chunk):
                    yield step
                elif isinstance(step, Exception):
                    raise step
                else:
                    await asyncio.Event().wait()
        finally:
            self.open -= 1

    async def abort(self, rid: str) -> None:
        raise AssertionError("not the generation's affair")

    async def load(self) -> int | None:
        return 0

    async def alive(self) -> bool:
        return True

    async def ready(self) -> bool:
        return True

    async def info(self) -> EngineInfo:
        return EngineInfo("v0", "script")

    async def aclose(self) -> None:
        return None


def chunk(*ids: int, finish: str = "", so_far: int | None = None, version: str = "v0", logprob: float = -0.5) -> Chunk:
    end = so_far if so_far is not None else len(ids)
    return Chunk(list(ids), [logprob] * len(ids), (VersionSpan(version, 0, end),), finish)


def make(max_new_tokens: int = 10, **sampling: Any) -> Generation:
    order = Order(
        turn_key="key", request_id="r1", prompt_digest="digest", input_json=b"7,8", sampling=sampling,
        max_new_tokens=max_new_tokens, seed=42, stop_ids=frozenset({STOP}), vocab_size=100,
    )  # fmt: skip
    return Generation(order)


def partial(*ids: int, generations: int = 1, wasted: int = 0) -> Partial:
    spans = (VersionSpan("v0", 0, len(ids)),)
    return Partial("key", "old", "r0", "digest", ids_bytes(list(ids)), logprob_bytes([-0.25] * len(ids)), spans, generations, wasted)


async def nothing(_: Generation) -> None:
    return None


async def run(g: Generation, *plays: Sequence[Step], deadlines: tuple[float, float] = SOON, budget: int = 3) -> Script:
    engine = Script(list(plays))
    await drive(g, engine, deadlines, budget)
    return engine


async def drive(
    g: Generation, engine: Script, deadlines: tuple[float, float] = SOON, budget: int = 3, progress: Progress = nothing
) -> None:
    first_token_s, token_s = deadlines
    settings = EngineConfig(
        first_token_timeout_s=first_token_s, token_timeout_s=token_s, compile_timeout_s=0.01, max_generations_per_turn=budget
    )  # fmt: skip
    await Driver(engine, settings, luck=lambda: 0.0).run(g, progress, 0)


async def test_chunks_become_the_output_in_their_order():
    g = make()
    await run(g, [chunk(1, 2), chunk(3, so_far=3), chunk(STOP, so_far=4, finish="stop")])
    assert (g.ids, g.finish, g.calls) == ([1, 2, 3, STOP], "stop", 1)
    assert g.logprobs == [-0.5] * 4
    assert g.spans == (VersionSpan("v0", 0, 4),)


async def test_the_engine_is_asked_for_the_prompt_the_limit_and_the_seed():
    engine = await run(make(10, temperature=0.5), [chunk(1, finish="length")])
    assert engine.calls[0].input_json == b"7,8"
    assert engine.calls[0].sampling == {"temperature": 0.5, "max_new_tokens": 10, "sampling_seed": 42}


async def test_it_continues_another_engines_partial_from_its_last_token():
    g = make(10)
    g.adopt(partial(1, 2, 3, generations=2, wasted=5))
    engine = await run(g, [chunk(4, finish="length")])
    assert engine.calls[0].input_json == b"7,8,1,2,3"
    assert engine.calls[0].sampling == {"max_new_tokens": 7, "sampling_seed": 42}
    assert (g.ids, g.logprobs) == ([1, 2, 3, 4], [-0.25] * 3 + [-0.5])
    assert (g.calls, g.wasted, g.reused) == (3, 5, 3)


async def test_the_versions_of_both_engines_are_kept():
    g = make()
    g.adopt(partial(1, 2))
    await run(g, [chunk(3, version="v1"), chunk(4, so_far=2, version="v1", finish="stop")])
    assert g.spans == (VersionSpan("v0", 0, 2), VersionSpan("v1", 2, 4))


async def test_a_demanded_minimum_counts_what_was_sampled_before():
    g = make(10, min_new_tokens=5)
    g.adopt(partial(1, 2, 3))
    engine = await run(g, [chunk(4, finish="stop")])
    assert engine.calls[0].sampling["min_new_tokens"] == 2


@pytest.mark.parametrize(("ids", "finish"), [([1, 2, STOP], "stop"), ([1] * 10, "length")])
async def test_a_partial_that_is_whole_needs_no_call(ids: list[int], finish: str):
    g = make(10)
    g.adopt(partial(*ids))
    engine = await run(g)
    assert (g.finish, g.ids, engine.calls, g.calls) == (finish, ids, [], 1)


async def test_every_call_has_a_rid_of_its_own():
    g = make()
    engine = await run(g, [chunk(1, finish="abort")], [chunk(2, finish="abort")], [chunk(3, finish="stop")])
    rids = [c.rid for c in engine.calls]
    assert len(set(rids)) == 3
    assert g.rid == rids[-1]


async def test_what_was_sampled_before_an_abort_is_kept_and_the_next_call_continues_it():
    g = make(10)
    engine = await run(g, [chunk(1, 2), chunk(3, so_far=3, finish="abort")], [chunk(4, finish="stop")])
    assert (g.ids, g.wasted) == ([1, 2, 3, 4], 0)
    assert engine.calls[1].input_json == b"7,8,1,2,3"
    assert engine.calls[1].sampling == {"max_new_tokens": 7, "sampling_seed": 42}


async def test_an_abort_behind_the_stop_token_leaves_nothing_to_do():
    g = make()
    engine = await run(g, [chunk(1, STOP), chunk(finish="abort", so_far=2)])
    assert (g.finish, len(engine.calls)) == ("stop", 1)


@pytest.mark.parametrize(
    "bad",
    [
        Chunk([3], [float("nan")], ()), Chunk([3], [float("-inf")], ()), Chunk([3, 4], [-1.0, float("inf")], ()),
        Chunk([100], [-1.0], ()), Chunk([3, -1], [-1.0, -1.0], ()), Chunk([2**31], [-1.0], ()),
    ],
)  # fmt: skip
async def test_nonsense_from_the_engine_is_refused_and_nothing_of_its_chunk_is_kept(bad: Chunk):
    g = make()
    engine = await run(g, [chunk(1, 2), bad], [chunk(5, finish="stop")])
    assert g.ids == [1, 2, 5]
    assert len(g.logprobs) == 3
    assert engine.calls[1].input_json == b"7,8,1,2"


@pytest.mark.parametrize("bad", [Chunk([3, 4], [-1.0], ()), Chunk([3], [], ())])
async def test_a_token_without_a_logprob_is_nonsense_too(bad: Chunk):
    g = make()
    await run(g, [chunk(1, 2), bad], [chunk(5, finish="stop")])
    assert (len(g.ids), len(g.logprobs)) == (3, 3)


async def test_no_first_token_within_its_deadline_is_a_lost_engine():
    with pytest.raises(EngineLost, match="stalled"):
        async with asyncio.timeout(5):
            await run(make(), [STALL], deadlines=(0.05, 60))


async def test_no_next_token_within_its_deadline_is_a_lost_engine_and_what_came_before_stays():
    g = make()
    with pytest.raises(EngineLost, match="stalled"):
        async with asyncio.timeout(5):
            await run(g, [chunk(1, 2), STALL], deadlines=(60, 0.05))
    assert g.ids == [1, 2]
    spans = (VersionSpan("v0", 0, 2),)
    assert g.partial() == Partial("key", g.rid, "r1", "digest", ids_bytes([1, 2]), logprob_bytes([-0.5] * 2), spans, 1, 0)


async def test_a_partial_goes_on_elsewhere_as_if_nothing_had_happened():
    there, here = make(), make()
    with pytest.raises(EngineLost):
        await run(there, [chunk(1, 2), EngineLost("e", "killed")])
    here.adopt(there.partial())
    await run(here, [chunk(3), chunk(STOP, so_far=2, finish="stop")])
    whole = make()
    await run(whole, [chunk(1, 2), chunk(3, so_far=3), chunk(STOP, so_far=4, finish="stop")])
    assert (here.ids, here.logprobs, here.spans, here.finish) == (whole.ids, whole.logprobs, whole.spans, whole.finish)


async def test_a_lost_engine_is_not_asked_again():
    engine = Script([[EngineLost("e", "killed")], []])
    with pytest.raises(EngineLost, match="killed"):
        await drive(make(), engine)
    assert len(engine.calls) == 1


async def test_a_spent_budget_is_told():
    g = make()
    engine = Script([[chunk(1), EngineRefused(502, "x")], [EngineRefused(500, "no")], [EngineRefused(500, "no")], []])
    with pytest.raises(EngineRefused, match="budget of 3") as e:
        await drive(g, engine)
    assert (e.value.status, len(engine.calls), g.ids) == (500, 3, [1])


async def test_a_request_that_the_engine_calls_wrong_is_not_repeated():
    engine = Script([[EngineRefused(400, "too long")], []])
    with pytest.raises(EngineRefused, match="too long"):
        await drive(make(), engine)
    assert len(engine.calls) == 1


async def test_what_a_stop_string_may_have_begun_in_is_sampled_again_and_counted_as_wasted():
    g = make(10, stop=["ab"])
    engine = await run(g, [chunk(1, 2, 3, 4, finish="abort")], [chunk(5, finish="stop")])
    assert engine.calls[1].input_json == b"7,8,1,2"
    assert (g.ids, g.wasted, g.spans) == ([1, 2, 5], 2, (VersionSpan("v0", 0, 3),))


async def test_what_a_grammar_constrains_starts_over():
    g = make(10, json_schema="{}")
    g.adopt(partial(1, 2, 3))
    engine = await run(g, [chunk(5, finish="stop")])
    assert engine.calls[0].input_json == b"7,8"
    assert (g.ids, g.wasted, g.reused, g.regenerated) == ([5], 3, 0, True)


async def test_a_fault_plan_may_add_sampling_parameters():
    async def slow(_: Generation) -> JSON:
        return {"custom_params": {"tokens_per_s": 1}}

    engine = Script([[chunk(1, finish="stop")]])
    await drive(make(), engine, progress=slow)
    assert engine.calls[0].sampling["custom_params"] == {"tokens_per_s": 1}


async def test_progress_is_told_after_every_chunk():
    seen: list[int] = []

    async def watch(g: Generation) -> None:
        seen.append(len(g.ids))

    await drive(make(), Script([[chunk(1), chunk(2, 3, so_far=3), chunk(4, so_far=4, finish="stop")]]), progress=watch)
    assert seen == [0, 1, 3]


@pytest.mark.parametrize("steps", [[chunk(1), EngineRefused(500, "no")], [chunk(1), STALL], [chunk(1), EngineLost("e", "x")]])
async def test_no_stream_stays_open_whatever_ends_a_call(steps: list[Step]):
    engine = Script([steps])
    with contextlib.suppress(EngineLost, EngineRefused):
        await drive(make(), engine, (1, 0.02), 1)
    assert (len(engine.calls), engine.open) == (1, 0)


async def test_a_cancelled_generation_closes_its_stream_and_keeps_what_it_has():
    g, engine, moved = make(), Script([[chunk(1), STALL]]), asyncio.Event()

    async def told(g: Generation) -> None:
        if g.ids:
            moved.set()

    task = asyncio.create_task(drive(g, engine, progress=told))
    await moved.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (engine.open, g.ids, g.finish) == (0, [1], "")
