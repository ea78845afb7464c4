"""A trainer's commands at one engine, with a turn in flight that is driven as in a run: pauses, updates, memory."""

from __future__ import annotations

from typing import Any

import pytest
from commanded import TOKENS, in_flight, played
from model_server import ModelServer

from rollout_ft.fleet.weights import Command, Op

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("mode", ["abort", "in_place", "retract"])
async def test_a_turn_goes_on_under_new_weights_and_costs_one_generation(server: ModelServer, mode: str):
    async with played(server) as p:
        generation, turn = await in_flight(p)
        before, version = p.weights.version, f"of-{mode}"
        assert (await p.do("fleet/pause", {"mode": mode}))["ok"]
        assert (await p.do("fleet/weights", {"version": version, "path": str(server.model)}))["ok"]
        sampled = len(generation.ids)
        assert (await p.do("fleet/resume", {}))["ok"]
        await turn
        assert (len(generation.ids), generation.calls, generation.finish) == (TOKENS, 1, "length")
        assert [s.version for s in generation.spans] == [before, version]
        assert sampled <= generation.spans[1].start + 1 < TOKENS


async def test_a_turn_survives_that_the_trainer_takes_the_memory(server: ModelServer):
    async with played(server) as p:
        generation, turn = await in_flight(p)
        assert (await p.do("fleet/offload", {}))["ok"]
        assert (await p.do("fleet/offload", {}))["ok"]
        back: Any = await p.do("resume_memory_occupation", {})
        assert (back["ok"], back["offloaded"], bool(back["stale"])) == (True, False, True)
        assert (await p.do("resume_memory_occupation", {}))["ok"]
        done = await p.do("fleet/weights", {"version": "of-memory", "path": str(server.model)})
        assert (done["ok"], done["stale"]) == (True, "")
        await turn
        assert (len(generation.ids), generation.spans[-1].version) == (TOKENS, "of-memory")


async def test_an_update_in_parts_that_fails_leaves_the_engine_stale_and_alive(server: ModelServer):
    """No group was joined, so that nothing can be received; the bracket is closed all the same."""
    async with played(server) as p:
        body = {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]], "group_name": "nobody's"}
        failed = await p.do("fleet/weights", {"version": "of-nothing", "how": "distributed", "body": body})
        assert "init_weights_update_group" in failed["error"]
        assert failed["stale"]
        assert (await p.do("fleet/weights", {"version": "of-disk", "path": str(server.model)}))["ok"]
        assert not p.driver.gate.closed
        assert (await p.command(Command(Op.BEGIN)))["ok"]
        assert (await p.command(Command(Op.END)))["ok"]
