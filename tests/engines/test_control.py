"""The answers of the control endpoints, the misuse that ends a server, and what it tells of itself."""

from __future__ import annotations

from typing import Any

import pytest
from asking import call, in_flight, load, whole
from model_server import ModelServer, Start

from rollout_ft.engine.sglang import SGLang

pytestmark = pytest.mark.timeout(240)

TENSORS = {"serialized_named_tensors": ["AAAA"]}
GONE = r"disconnected|reset|refused"
RECEIVED = {"names": ["a"], "dtypes": ["float32"], "shapes": [[1]]}


async def test_an_update_of_weights_has_a_beginning_and_an_end(server: ModelServer):
    done = (200, {"success": True, "message": "Success"})
    assert await call(server.url, "/begin_weight_update", {}) == done
    status, again = await call(server.url, "/begin_weight_update", {})
    assert (status, again["message"]) == (400, "a weight-update session is already open; call end_weight_update() first")
    assert await call(server.url, "/end_weight_update", {}) == done
    status, again = await call(server.url, "/end_weight_update", {})
    assert (status, again["message"]) == (400, "no weight-update session is open; call begin_weight_update() first")


@pytest.mark.parametrize(("call_name", "sent"), [("update_weights_from_tensor", TENSORS), ("update_weights_from_distributed", RECEIVED)])
async def test_tensors_are_taken_between_a_beginning_and_an_end_alone(server: ModelServer, call_name: str, sent: dict[str, Any]):
    status, answer = await call(server.url, f"/{call_name}", sent)
    message = f"{call_name} must run between begin_weight_update() and end_weight_update()"
    assert (status, answer) == (400, {"success": False, "message": message})


async def test_tensors_are_received_from_a_group_that_was_joined(server: ModelServer):
    await call(server.url, "/begin_weight_update", {})
    status, answer = await call(server.url, "/update_weights_from_distributed", RECEIVED)
    await call(server.url, "/end_weight_update", {})
    expected = "Failed to receive weights: Group weight_update_group not in []. Please call `init_weights_update_group` first."
    assert (status, answer) == (400, {"success": False, "message": expected})
    status, answer = await call(server.url, "/destroy_weights_update_group", {})
    assert (status, answer["message"]) == (400, "The group to be destroyed does not exist.")


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/begin_weight_update", {"selector": "x"}), ("/update_weights_from_tensor", {}), ("/update_weights_from_distributed", {}),
        ("/update_weights_from_tensor", {"serialized_named_tensors": "x"}), ("/update_weights_from_ipc", {}),
        ("/init_weights_update_group", {}), ("/update_weight_version", {}), ("/update_weight_version", {"new_version": 5}),
        ("/update_weights_from_disk", {}), ("/pause_generation", {"mode": "x"}), ("/pause_generation", None),
        ("/continue_generation", None), ("/end_weight_update", None), ("/release_memory_occupation", None),
        ("/resume_memory_occupation", {"tags": 5}), ("/generate", [1]),
    ],
    ids=str,
)  # fmt: skip
async def test_a_body_that_is_not_one_is_400_with_a_message(server: ModelServer, path: str, sent: Any):
    status, answer = await call(server.url, path, sent)
    assert (status, answer["object"]) == (400, "error")
    assert "validation error" in answer["message"]


async def test_weights_that_are_not_there_are_400(server: ModelServer):
    status, answer = await call(server.url, "/update_weights_from_disk", {"model_path": "/nowhere/at/all", "weight_version": "x"})
    assert (status, answer["success"], answer["num_paused_requests"]) == (400, False, 0)


async def test_the_checker_tells_equal_weights(server: ModelServer):
    status, first = await call(server.url, "/weights_checker", {"action": "checksum"})
    assert (status, first["success"]) == (200, True)
    assert first["ranks"][0]["checksums"]
    assert (await call(server.url, "/weights_checker", method="GET"))[1]["per_engine_checksum"] == first["per_engine_checksum"]
    assert await call(server.url, "/weights_checker", {"action": "snapshot"}) == (200, {"success": True, "message": "Success."})
    status, answer = await call(server.url, "/weights_checker", {"action": "nonsense"})
    assert (status, answer) == (400, {"success": False, "message": "Unsupported action='nonsense'"})


async def test_memory_that_is_not_saved_is_released_in_name_alone(server: ModelServer):
    reply = await whole(server.url, 5)
    for path in ("/release_memory_occupation", "/release_memory_occupation"):
        assert await call(server.url, path, {}) == (200, None)
    assert await call(server.url, "/resume_memory_occupation", {"tags": ["weights"]}) == (200, None)
    assert (await whole(server.url, 5))["output_ids"] == reply["output_ids"]
    for tag in ("kv_cache", "cuda_graph"):
        assert await call(server.url, "/resume_memory_occupation", {"tags": [tag]}) == (200, None)


async def test_memory_is_released_under_a_generation_that_was_retracted(server: ModelServer, engine: SGLang):
    async with in_flight(engine, 300) as (told, task):
        await call(server.url, "/pause_generation", {"mode": "retract"})
        assert (await call(server.url, "/release_memory_occupation", {}))[0] == 200
        assert (await call(server.url, "/resume_memory_occupation", {}))[0] == 200
        await call(server.url, "/continue_generation", {})
        await task
    assert told.finish == "length"


async def test_memory_that_is_released_while_something_runs_is_the_end_of_a_server(start: Start):
    server = start()
    engine = SGLang("e0", server.url)
    async with in_flight(engine):
        with pytest.raises(Exception, match=GONE):
            await call(server.url, "/release_memory_occupation", {})
    await engine.aclose()
    server.wait_until_gone(30)


async def test_memory_that_is_resumed_without_a_release_is_the_end_of_a_server(start: Start):
    server = start()
    with pytest.raises(Exception, match=GONE):
        await call(server.url, "/resume_memory_occupation", {})
    server.wait_until_gone(30)


async def test_no_tensors_at_all_are_the_end_of_a_server(start: Start):
    server = start()
    await call(server.url, "/begin_weight_update", {})
    with pytest.raises(Exception, match=GONE):
        await call(server.url, "/update_weights_from_tensor", {"serialized_named_tensors": []})
    server.wait_until_gone(30)


@pytest.mark.parametrize("path", ["/ready", "/health", "/health_generate", "/v1/models", "/get_model_info", "/get_server_info"])
async def test_a_server_that_serves_says_so(server: ModelServer, path: str):
    assert (await call(server.url, path, method="GET"))[0] == 200


@pytest.mark.smoke
async def test_what_is_told_has_the_shape_that_is_relied_on(server: ModelServer, engine: SGLang):
    model = (await call(server.url, "/model_info", method="GET"))[1]
    assert model["model_path"] == str(server.model)
    assert isinstance(model["weight_version"], str)
    info = await engine.info()
    assert (info.model_path, info.weight_version) == (model["model_path"], model["weight_version"])
    told = (await call(server.url, "/server_info", method="GET"))[1]
    assert {key: told[key] for key in ("tp_size", "pp_size", "dp_size", "nnodes")} == dict.fromkeys(
        ("tp_size", "pp_size", "dp_size", "nnodes"), 1
    )
    assert (told["disaggregation_mode"], model["disaggregation_mode"]) == ("null", "null")
    assert told["incremental_streaming_output"] is True
    assert told["version"].startswith("0.5.")
    (state,) = told["internal_states"]
    assert isinstance(state["weight_version"], str)
    assert state["effective_max_running_requests_per_dp"] > 0
    assert told["startup_time"]["scheduler_e2e"] > 0
    now = await load(server.url)
    assert {key: now[key] for key in ("dp_rank", "num_running_reqs", "num_waiting_reqs")} == {
        "dp_rank": 0, "num_running_reqs": 0, "num_waiting_reqs": 0,
    }  # fmt: skip
    assert now["max_running_requests"] > 0


async def test_a_start_is_told_from_another_by_its_times(start: Start, server: ModelServer):
    first, second = [(await call(url, "/server_info", method="GET"))[1]["startup_time"] for url in (server.url, start().url)]
    assert first != second
    assert first == (await call(server.url, "/server_info", method="GET"))[1]["startup_time"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", "/get_weight_version", 404), ("GET", "/generate", 405)]
)
async def test_what_is_not_there_is_not_there(server: ModelServer, method: str, path: str, status: int):
    assert (await call(server.url, path, method=method))[0] == status
