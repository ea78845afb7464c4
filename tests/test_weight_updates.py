"""A trainer's updates on real Ray with real processes: nothing is lost by them, whatever dies meanwhile.

The small engine's weights are a hash of their version's name, and a token is a hash of the tokens before it and the
weights: what each token must be, given its version, is computed here again from the trajectory alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, Callable
from typing import Any

import aiohttp
import numpy as np
import pytest
import pytest_asyncio
from ray_run import Stage, staged

from rollout_ft.errors import BadRequest
from rollout_ft.rayapi import ray
from rollout_ft.testing.faults import Fault
from rollout_ft.testing.small_engine import MODEL_DIR
from rollout_ft.testing.small_engine.hash_model import HashModel
from rollout_ft.testing.small_engine.model import Sampling
from rollout_ft.testing.small_engine.vocabulary import load_vocabulary
from rollout_ft.trial.fleet import Fleet, SyncFleet

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

TASK = {"task_id": "q", "prompt": "Explain tides.", "turns": 3, "seed": 11, "timeout_s": 20.0, "max_tokens": 64}
SETTINGS = (
    "engine.args=[--tokens-per-s,'100',--model,hash,--enable-memory-saver]",
    "fleet.order_timeout_s=10",
    "fleet.update_timeout_s=5",
)
VOCABULARY = load_vocabulary(MODEL_DIR)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage() -> AsyncGenerator[Stage]:
    async with staged(*SETTINGS) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(stage: Stage) -> AsyncGenerator[Fleet]:
    """The fleet, whole and serving before and after."""
    made = Fleet(stage.run.client)
    await stage.whole()
    yield made
    await made.resume()
    await stage.whole()


class Versions:
    """Names that no test used before."""

    count = 0

    def __call__(self) -> str:
        self.count += 1
        return f"v{self.count}"


new_version = Versions()


async def until(condition: Callable[[], Any]) -> Any:
    async with asyncio.timeout(60):
        while not (found := await condition()):
            await asyncio.sleep(0.02)
        return found


async def described(stage: Stage) -> dict[str, dict[str, Any]]:
    """What the actor of each engine says of itself."""
    found: dict[str, dict[str, Any]] = {}
    for engine in (await stage.run.fleet())["engines"]:
        name = f"{stage.run.config.run}/{engine['engine_id']}/{engine['incarnation']}"
        with contextlib.suppress(Exception):
            found[engine["engine_id"]] = await ray.get_actor(name, stage.run.setup.namespace).describe.remote()
    return found


async def load(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http, http.get(url + "/v1/loads") as response:
        return (await response.json())["loads"][0]


async def generating(stage: Stage, tokens: int = 8) -> str:
    """The engine that has sampled so many tokens from now on, and samples still."""
    urls = {engine_id: d["engine_url"] for engine_id, d in (await described(stage)).items()}
    before = {engine_id: (await load(url))["tokens_sampled"] for engine_id, url in urls.items()}

    async def look() -> str:
        for engine_id, url in urls.items():
            now = await load(url)
            if now["num_running_reqs"] and now["tokens_sampled"] >= before[engine_id] + tokens:
                return engine_id
        return ""

    return await until(look)


def check_tokens(trajectory: dict[str, Any]) -> set[str]:
    """Each sampled token is the one that its version's weights give after the tokens before it. The versions."""
    found: set[str] = set()
    for path in trajectory["paths"]:
        ids, mask, spans = path["token_ids"], path["loss_mask"], path["version_spans"]
        models: dict[str, HashModel] = {}
        for span in spans:
            version, start, end = span["version"], span["start"], span["end"]
            found.add(version)
            model = models.setdefault(version, HashModel(VOCABULARY))
            model.load(version)
            for at in range(start, end):
                if mask[at]:
                    sampling = Sampling(0.0, 1.0, 0, 0.0, 0, False, frozenset({VOCABULARY.eos_id}))
                    tokens, logprobs = model.start(np.array(ids[:at], dtype=np.int32), sampling).sample(1, frozenset())
                    assert (tokens[0], np.float32(logprobs[0])) == (ids[at], np.float32(path["logprobs"][at])), (version, at)
    return found


async def play(stage: Stage, name: str, *faults: Fault, **task: Any) -> tuple[Any, Any]:
    return await stage.play(name, {**TASK, "sampling": {"temperature": 0}, **task}, *faults)


@pytest.mark.parametrize("mode", ["abort", "in_place", "retract"])
async def test_a_turn_goes_on_with_the_new_weights_after_a_pause(stage: Stage, fleet: Fleet, mode: Any):
    version, name = new_version(), f"go-on-{mode}"
    trial = asyncio.create_task(play(stage, name))
    await generating(stage)
    async with fleet.paused(mode):
        done = await fleet.update(version, path=str(MODEL_DIR))
    assert all(report["ok"] for report in done["engines"].values()), done
    result, trajectory = await trial
    assert (result.outcome, result.attempts, result.tokens_wasted, result.faults_survived) == ("completed", 1, 0, 0)
    versions = check_tokens(trajectory)
    assert len(versions) == 2
    assert version in versions


async def test_a_paused_fleet_samples_nothing_and_loses_nobody(stage: Stage, fleet: Fleet):
    """The pause is longer than every deadline for a token, and than the client waits: its retries attach."""
    trial = asyncio.create_task(play(stage, "long-pause", timeout_s=3.0))
    engine = await generating(stage)
    events = len(stage.events)
    await fleet.pause("in_place")
    before = {e: await load(d["engine_url"]) for e, d in (await described(stage)).items()}
    await asyncio.sleep(4.5)  # three times engine.token_timeout_s: the time itself is what is tested
    after = {e: await load(d["engine_url"]) for e, d in (await described(stage)).items()}
    assert {e: a["tokens_sampled"] for e, a in after.items()} == {e: b["tokens_sampled"] for e, b in before.items()}
    assert (await fleet.state())["weights"]["phase"] == "paused"
    await fleet.resume()
    result, trajectory = await trial
    assert (result.outcome, result.attempts, result.tokens_wasted) == ("completed", 1, 0)
    assert trajectory["metadata"]["turns_in_trajectory"] == 3
    assert not [e for e in stage.events[events:] if e["event"] in ("engine.lost", "engine.dead", "session.moved")], engine
    check_tokens(trajectory)


async def test_an_engine_that_is_killed_in_an_update_comes_back_with_its_weights(stage: Stage, fleet: Fleet):
    version = new_version()
    trial = asyncio.create_task(play(stage, "killed"))
    engine = await generating(stage)
    await fleet.pause("retract")
    pid = (await described(stage))[engine]["engine_pid"]
    os.kill(pid, signal.SIGSTOP)  # so that the update is under way when it dies
    update = asyncio.create_task(fleet.update(version, path=str(MODEL_DIR)))
    await asyncio.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    done = await update
    assert (done["ok"], done["engines"][engine]["ok"]) == (True, False), done
    await fleet.resume()
    result, trajectory = await trial
    assert (result.outcome, result.attempts, result.tokens_wasted) == ("completed", 1, 0)
    assert version in check_tokens(trajectory)
    await stage.whole()
    assert {e["weight_version"] for e in (await fleet.state())["engines"]} == {version}


async def test_an_engine_that_does_not_answer_an_update_is_replaced(stage: Stage, fleet: Fleet):
    version = new_version()
    await fleet.pause("abort")
    frozen = await described(stage)
    os.kill(frozen["engine-1"]["engine_pid"], signal.SIGSTOP)
    done = await fleet.update(version, path=str(MODEL_DIR))
    assert "no answer within 5 s" in done["engines"]["engine-1"]["error"], done
    await fleet.resume()
    await stage.whole()
    state = await fleet.state()
    assert [(e["weight_version"], e["incarnation"] - frozen[e["engine_id"]]["incarnation"]) for e in state["engines"]] == [
        (version, 0), (version, 1)
    ]  # fmt: skip


async def test_an_engine_that_refuses_an_update_serves_nothing_until_the_next(stage: Stage, fleet: Fleet):
    """One of two engines cannot flush its cache, for a turn is frozen in it: the turn goes on with the other."""
    version, trial = new_version(), asyncio.create_task(play(stage, "refused"))
    engine = await generating(stage)
    await fleet.pause("in_place")
    body = {"zmq_handles": {}, "weight_version": version, "flush_cache": True}
    done = await stage.run.client.request("POST", "/update_weights_from_ipc", body)
    assert {e: d["ok"] for e, d in done["engines"].items()} == {e: e != engine for e in done["engines"]}
    await fleet.resume()
    result, trajectory = await trial
    assert (result.outcome, result.attempts, result.faults_survived) == ("completed", 1, 0)
    assert version in check_tokens(trajectory)
    state = await fleet.state()
    assert {e["engine_id"]: e["state"] for e in state["engines"]} == {e: "stale" if e == engine else "healthy" for e in done["engines"]}
    assert any(engine in w and "trainer's next update" in w for w in state["warnings"])
    await fleet.update(newer := new_version(), path=str(MODEL_DIR))
    await stage.whole()
    assert {e["weight_version"] for e in (await fleet.state())["engines"]} == {newer}


async def test_a_supervisor_that_is_killed_in_a_pause_knows_of_it_again(stage: Stage, fleet: Fleet):
    version = new_version()
    trial = asyncio.create_task(play(stage, "rebuilt"))
    await generating(stage)
    await fleet.pause("in_place")
    await fleet.update(version, path=str(MODEL_DIR))
    was = (await fleet.state())["weights"]
    await kill(stage, "supervisor")
    now = (await fleet.state())["weights"]
    assert now.pop("still_s") >= was.pop("still_s")
    assert now == was
    await fleet.resume()
    result, trajectory = await trial
    assert (result.outcome, result.attempts, result.tokens_wasted) == ("completed", 1, 0)
    assert version in check_tokens(trajectory)


@pytest.mark.parametrize("role", ["supervisor", "gateway"])
async def test_a_call_survives_whoever_dies_in_the_middle_of_it(stage: Stage, fleet: Fleet, role: str):
    """One engine is slow to answer, and meanwhile those who carry the call are killed."""
    version = new_version()
    pid = (await described(stage))["engine-0"]["engine_pid"]
    os.kill(pid, signal.SIGSTOP)
    update = asyncio.create_task(fleet.update(version, path=str(MODEL_DIR)))

    async def under_way() -> bool:
        return (await described(stage))["engine-1"]["weights"]["version"] == version

    await until(under_way)
    for _ in range(2 if role == "gateway" else 1):
        await kill(stage, role)
    os.kill(pid, signal.SIGCONT)
    done = await update
    assert {e: d["version"] for e, d in done["engines"].items() if d["ok"]} == {"engine-0": version, "engine-1": version}
    assert (await fleet.state())["weights"]["versions"][-2:].count(version) == 1


async def kill(stage: Stage, role: str) -> None:
    """SIGKILL to the process of one actor of this kind."""
    pids: dict[str, int] = await stage.run.supervisor.ask("pids")
    os.kill(next(pid for name, pid in pids.items() if role in name), signal.SIGKILL)


async def test_memory_that_the_trainer_takes_comes_back_with_weights(stage: Stage, fleet: Fleet):
    """The engines die of whatever is computed without memory: nothing is."""
    version, trial = new_version(), asyncio.create_task(play(stage, "offloaded"))
    await generating(stage)
    before = {e: d["engine_pid"] for e, d in (await described(stage)).items()}
    assert (await fleet.offload())["weights"]["phase"] == "offloaded"
    assert (await fleet.offload())["ok"]
    assert {e["state"] for e in (await fleet.state())["engines"]} == {"offloaded"}
    opened = await stage.run.open_session(trial_id=f"opened-{version}")
    assert opened.turns == 0
    back = await stage.run.client.request("POST", "/resume_memory_occupation", {})
    assert (back["success"], {e["state"] for e in (await fleet.state())["engines"]}) == (True, {"stale"})
    assert (await fleet.update(version, path=str(MODEL_DIR)))["weights"]["phase"] == "serving"
    result, trajectory = await trial
    assert (result.outcome, result.attempts, result.tokens_wasted) == ("completed", 1, 0)
    assert version in check_tokens(trajectory)
    assert {e: d["engine_pid"] for e, d in (await described(stage)).items()} == before


async def test_a_trainer_that_gives_the_memory_back_and_goes_on_without_an_update_gets_the_last_one_again(stage: Stage, fleet: Fleet):
    version = new_version()
    await fleet.update(version, path=str(MODEL_DIR))
    await fleet.offload()
    await stage.run.client.request("POST", "/resume_memory_occupation", {})
    assert {e["state"] for e in (await fleet.state())["engines"]} == {"stale"}
    await fleet.resume()
    await stage.whole()
    assert {e["weight_version"] for e in (await fleet.state())["engines"]} == {version}


async def test_an_engine_that_dies_while_the_trainer_has_the_memory_is_not_started_in_it(stage: Stage, fleet: Fleet):
    version = new_version()
    await fleet.offload()
    os.kill((await described(stage))["engine-0"]["engine_pid"], signal.SIGKILL)

    async def dead() -> bool:
        return (await fleet.state())["engines"][0]["state"] == "dead"

    await until(dead)
    done = await fleet.update(version, path=str(MODEL_DIR))
    assert (done["engines"]["engine-0"]["ok"], done["engines"]["engine-1"]["ok"]) == (False, True)
    await stage.whole()
    assert {e["weight_version"] for e in (await fleet.state())["engines"]} == {version}


async def test_a_trainer_of_one_sglang_server_may_point_at_the_fleet(stage: Stage, fleet: Fleet):
    """The calls of a colocated step, as they are made to SGLang, in parts and with the cache given back last."""
    version, ask = new_version(), stage.run.client.request
    trial = asyncio.create_task(play(stage, "step"))
    await generating(stage)
    await ask("POST", "/pause_generation", {"mode": "retract"})
    await ask("GET", "/flush_cache")
    await ask("POST", "/release_memory_occupation", {"tags": ["weights", "kv_cache"]})
    await ask("POST", "/resume_memory_occupation", {"tags": ["weights"]})
    await ask("POST", "/begin_weight_update", {})
    for part in ("a", "b", "b"):  # an answer was lost
        body = {"serialized_named_tensors": [part], "weight_version": version, "flush_cache": False}
        assert (await ask("POST", "/update_weights_from_tensor", body))["success"]
    await ask("POST", "/end_weight_update", {})
    await ask("POST", "/continue_generation", {})
    assert (await fleet.state())["weights"]["phase"] == "offloaded"
    await ask("POST", "/resume_memory_occupation", {"tags": ["kv_cache"]})
    result, trajectory = await trial
    assert (result.outcome, result.attempts, result.tokens_wasted) == ("completed", 1, 0)
    assert version in check_tokens(trajectory)
    assert await ask("GET", "/model_info") == {"weight_version": version, "is_generation": True}


async def test_an_update_that_no_engine_could_make_changes_no_version(stage: Stage, fleet: Fleet):
    before = (await fleet.state())["weights"]["version"]
    with pytest.raises(BadRequest, match=r"engine-0: .*no directory.*engine-1: ") as refused:
        await fleet.update("never", path="/nowhere")
    assert refused.value.status == 409
    assert (await fleet.state())["weights"]["version"] == before
    await fleet.update(before, path=str(MODEL_DIR))
    await stage.whole()


async def test_a_version_that_the_engines_do_not_have_is_not_believed(stage: Stage, fleet: Fleet):
    version, urls = new_version(), {e: d["engine_url"] for e, d in (await described(stage)).items()}
    async with fleet.paused("abort"), aiohttp.ClientSession() as http:
        for engine in ("engine-0",):
            await http.post(urls[engine] + "/update_weight_version", json={"new_version": version})
        done = await fleet.update(version, "external")
    assert {e: d["ok"] for e, d in done["engines"].items()} == {"engine-0": True, "engine-1": False}
    assert [e["state"] for e in (await fleet.state())["engines"]] == ["healthy", "stale"]
    await fleet.update(version, path=str(MODEL_DIR))
    await stage.whole()


async def test_a_trainer_without_an_event_loop_has_the_same_calls(stage: Stage, fleet: Fleet):
    version = new_version()

    def train() -> list[str]:
        with SyncFleet(stage.run.gateway_url, stage.run.operator_key) as sync:
            with sync.paused("in_place"):
                sync.update(version, path=str(MODEL_DIR))
                paused = sync.state()["weights"]["phase"]
            return [paused, sync.state()["weights"]["phase"], sync.state()["weights"]["version"]]

    assert await asyncio.to_thread(train) == ["paused", "serving", version]
