"""The HTTP side of the small engines: SGLang's routes, as one ASGI application.

Owns routes, bodies, status codes and the event stream. Must not know how tokens are made. Several engines share a
process as several ports of one server; the port a connection came in by says which engine it means. The subtle
invariant: a handler that ends for whatever reason leaves no request behind, since a client that went away would have
it computed for nobody.
"""

from __future__ import annotations

import asyncio
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import orjson

from rollout_ft.testing.small_engine import parsing
from rollout_ft.testing.small_engine.asgi import (
    Receive,
    Reply,
    Send,
    begin_stream,
    error_object,
    read_body,
    send_event,
    send_reply,
)
from rollout_ft.testing.small_engine.control import ROUTES, WITHOUT_BODY, Route
from rollout_ft.testing.small_engine.protocol import (
    JSON,
    ContractError,
    Died,
    DuplicateRid,
    SchemaError,
    ValueRefused,
    check_schema,
    parse_request,
    wants_stream,
)
from rollout_ft.testing.small_engine.running import Running
from rollout_ft.testing.small_engine.scheduler import Scheduler

_HEALTH_TIMEOUT_S = 20.0
_CLEAN_UP_S = 2.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server says about itself, and how it streams."""

    model_path: Path
    incremental_streaming_output: bool
    weight_version: str
    start_s: float


class Application:
    """ASGI over the engines, by port."""

    def __init__(self, engines: dict[int, Scheduler], settings: Settings) -> None:
        self._engines = engines
        self._settings = settings
        self._routes: dict[tuple[str, str], Route] = {
            ("GET", "/health"): self._health,
            ("GET", "/health_generate"): self._health_generate,
            ("GET", "/ready"): self._ready,
            ("GET", "/model_info"): self._model_info,
            ("GET", "/get_model_info"): self._model_info,
            ("GET", "/server_info"): self._server_info,
            ("GET", "/get_server_info"): self._server_info,
            ("GET", "/v1/loads"): self._loads,
            ("GET", "/v1/models"): self._models,
            ("POST", "/parse_function_call"): self._parse_function_call,
            ("POST", "/separate_reasoning"): self._separate_reasoning,
            **ROUTES,
        }

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        engine = self._engines[scope["server"][1]]
        method, path = scope["method"], scope["path"]
        raw = await read_body(receive)
        if raw is None:
            await send_reply(send, Reply(413, error_object("the body is too large", 413)))
            return
        try:
            body: Any = orjson.loads(raw) if raw else None
        except orjson.JSONDecodeError as error:
            await send_reply(send, Reply(400, error_object(f"the body is not JSON: {error}", 400)))
            return
        try:
            if path == "/generate" and method in ("POST", "PUT"):
                await self._generate(engine, body, receive, send)
            else:
                await send_reply(send, await self._answer(engine, method, path, body))
        except Died as died:
            # No reply and no cleanup, as when SGLang's scheduler dies and takes its server along.
            print(f"small engine: {died}: exiting", file=sys.stderr, flush=True)
            os._exit(1)

    async def _answer(self, engine: Scheduler, method: str, path: str, body: Any) -> Reply:
        route = self._routes.get((method, path))
        if route is None:
            known = path == "/generate" or any(path == other for _, other in self._routes)
            return Reply(405, {"detail": "Method Not Allowed"}) if known else Reply(404, {"detail": "Not Found"})
        if body is None and path not in WITHOUT_BODY and method == "POST":
            return Reply(400, error_object("1 validation error: body: Field required", 400))
        if not isinstance(body, dict | None):
            return Reply(400, error_object("2 validation errors: the body is not a JSON object", 400))
        try:
            return await route(engine, cast(JSON, body or {}))
        except SchemaError as error:
            return Reply(400, error_object(str(error), 400))

    async def _generate(self, engine: Scheduler, raw: Any, receive: Receive, send: Send) -> None:
        try:
            body = check_schema(raw)
            running = engine.submit(parse_request(body, engine.vocabulary, engine.limits.context_length))
        except SchemaError as error:
            await send_reply(send, Reply(400, error_object(str(error), 400)))
            return
        except ContractError as error:
            await send_reply(send, Reply(400, {"error": str(error)}))
            return
        except ValueRefused as refused:
            stream = wants_stream(raw)
            if stream and isinstance(refused, DuplicateRid):
                _abort_soon(engine, raw["rid"])
            await _refuse(send, refused, stream)
            return
        watcher = asyncio.create_task(_drop_on_disconnect(receive, engine, running))
        try:
            if running.request.stream:
                await self._stream(engine, running, send)
                _abort_soon(engine, running.request.rid)
            else:
                while running.finish is None:
                    running.changed.clear()
                    await running.changed.wait()
                await send_reply(send, _whole(engine, running))
        finally:
            watcher.cancel()
            engine.drop(running)

    async def _stream(self, engine: Scheduler, running: Running, send: Send) -> None:
        incremental = self._settings.incremental_streaming_output
        await begin_stream(send)
        ids_sent = text_sent = 0
        while True:
            await running.changed.wait()
            running.changed.clear()
            last = running.finish is not None
            if running.ended_waiting:
                chunk = running.last_of_a_waiting_one(engine.weights.told, incremental)
            else:
                chunk = running.reply(engine.weights.told, ids_sent, text_sent)
            if incremental:
                ids_sent += len(chunk["output_ids"])
                text_sent += len(chunk["text"])
            await send_event(send, chunk, last)
            if last:
                return

    async def _health(self, engine: Scheduler, body: JSON) -> Reply:
        """SGLang's, with SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION=false: the process answers, and that is all."""
        return Reply(200)

    async def _health_generate(self, engine: Scheduler, body: JSON) -> Reply:
        """Whether the run loop comes by. It samples nothing: a probe must not show in the count of tokens."""
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await engine.heartbeat()
        except TimeoutError:
            return Reply(503)
        return Reply(200)

    async def _ready(self, engine: Scheduler, body: JSON) -> Reply:
        return Reply(503 if engine.paused else 200)

    async def _model_info(self, engine: Scheduler, body: JSON) -> Reply:
        path = str(self._settings.model_path)
        info: JSON = {
            "model_path": path,
            "served_model_name": path,
            "tokenizer_path": path,
            "is_generation": True,
            "weight_version": engine.weights.told,
            "load_format": "auto",
            "reasoning_parser": None,
            "tool_call_parser": None,
            "disaggregation_mode": "null",
            "model_type": "gpt_neox",
            "architectures": ["SmallEngineForCausalLM"],
        }
        return Reply(200, info)

    async def _server_info(self, engine: Scheduler, body: JSON) -> Reply:
        limits = engine.limits
        # How long the parts of a start took: floats that tell one start from another.
        startup = {"load_weight": self._settings.start_s, "scheduler_e2e": self._settings.start_s}
        info: JSON = {
            "model_path": str(self._settings.model_path),
            "served_model_name": str(self._settings.model_path),
            "context_length": limits.context_length,
            "stream_interval": limits.stream_interval,
            "incremental_streaming_output": self._settings.incremental_streaming_output,
            "enable_memory_saver": engine.weights.saver,
            "max_running_requests": limits.max_running,
            "max_queued_requests": limits.max_queued,
            "disaggregation_mode": "null",
            "tp_size": 1,
            "pp_size": 1,
            "dp_size": 1,
            "nnodes": 1,
            "weight_version": self._settings.weight_version,
            "startup_time": {**startup, "tokenizer_e2e": self._settings.start_s},
            "version": "0.5.23",
        }
        state = {
            **info,
            "weight_version": engine.weights.version,
            "startup_time": startup,
            "world_size": 1,
            "effective_max_running_requests_per_dp": limits.max_running,
            "last_gen_throughput": 0.0,
        }
        return Reply(200, {**info, "internal_states": [state]})

    async def _loads(self, engine: Scheduler, body: JSON) -> Reply:
        now = datetime.now(UTC)
        load = {"timestamp": now.timestamp(), "dp_rank": 0, **engine.load()}
        load["queues"] = {"waiting": load["num_waiting_reqs"], "grammar": 0, "paused": 0, "retracted": 0, "prealloc_ready": 0}
        return Reply(200, {"timestamp": now.isoformat(), "version": "0.5.23", "accelerator": None, "num_accelerators": 1, "loads": [load]})

    async def _models(self, engine: Scheduler, body: JSON) -> Reply:
        path, limit = str(self._settings.model_path), engine.limits.context_length
        card = {"id": path, "object": "model", "owned_by": "sglang", "root": path, "max_model_len": limit}
        return Reply(200, {"object": "list", "data": [card]})

    async def _parse_function_call(self, engine: Scheduler, body: JSON) -> Reply:
        """SGLang answers 500 without a body of its own where a parser is unknown or raises."""
        try:
            if body["tool_call_parser"] not in parsing.TOOL_PARSERS:
                return Reply(500)
            text, calls = parsing.function_calls(body["text"], body.get("tools") or [], body["tool_call_parser"])
        except Exception:
            return Reply(500)
        return Reply(200, {"normal_text": text, "calls": calls})

    async def _separate_reasoning(self, engine: Scheduler, body: JSON) -> Reply:
        if body.get("reasoning_parser") not in parsing.REASONING_PARSERS or not isinstance(body.get("text"), str):
            return Reply(500)
        reasoning, text = parsing.separate_reasoning(body["text"], body["reasoning_parser"])
        return Reply(200, {"reasoning_text": reasoning, "text": text})


def _whole(engine: Scheduler, running: Running) -> Reply:
    finish = running.finish or {}
    if status := finish.get("status_code"):
        return Reply(status, error_object(finish["message"], status))
    if running.ended_waiting:
        return Reply(200, running.last_of_a_waiting_one(engine.weights.told, incremental=False))
    return Reply(200, running.reply(engine.weights.told))


def _abort_soon(engine: Scheduler, rid: str) -> None:
    """SGLang's clean-up behind every stream, one that was refused as well: whoever has the rid by then is aborted."""
    asyncio.get_running_loop().call_later(_CLEAN_UP_S, engine.abort, rid)


async def _drop_on_disconnect(receive: Receive, engine: Scheduler, running: Running) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    engine.drop(running)


async def _refuse(send: Send, refused: ValueRefused, stream: bool) -> None:
    if stream:
        error = {"message": refused.message, "type": "invalid_request_error", "code": refused.status, "retryable": False}
        await begin_stream(send)
        await send_event(send, {"error": error}, last=True)
    else:
        await send_reply(send, Reply(refused.status, {"error": {"message": refused.message}}))
