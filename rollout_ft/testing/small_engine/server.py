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
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

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
from rollout_ft.testing.small_engine.protocol import (
    JSON,
    OutOfVocabulary,
    SchemaError,
    ValueRefused,
    check_schema,
    parse_request,
    wants_stream,
)
from rollout_ft.testing.small_engine.running import Running
from rollout_ft.testing.small_engine.scheduler import PauseMode, Scheduler
from rollout_ft.testing.small_engine.weights import Loader, die

_HEALTH_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server says about itself, and how it streams."""

    model_path: Path
    incremental_streaming_output: bool
    started: float


class Application:
    """ASGI over the engines, by port."""

    def __init__(self, engines: dict[int, Scheduler], settings: Settings) -> None:
        self._engines = engines
        self._settings = settings
        self._loaders = {engine: Loader(engine) for engine in engines.values()}
        self._routes: dict[tuple[str, str], Callable[[Scheduler, JSON], Awaitable[Reply]]] = {
            ("GET", "/health"): self._health,
            ("GET", "/health_generate"): self._health_generate,
            ("GET", "/ready"): self._ready,
            ("GET", "/model_info"): self._model_info,
            ("GET", "/get_model_info"): self._model_info,
            ("GET", "/server_info"): self._server_info,
            ("GET", "/get_server_info"): self._server_info,
            ("GET", "/v1/loads"): self._loads,
            ("GET", "/v1/models"): self._models,
            ("POST", "/abort_request"): self._abort_request,
            ("POST", "/pause_generation"): self._pause_generation,
            ("POST", "/continue_generation"): self._continue_generation,
            ("POST", "/update_weights_from_disk"): self._update_weights_from_disk,
            ("POST", "/update_weight_version"): self._update_weight_version,
            ("POST", "/update_weights_from_tensor"): partial(self._load, "tensor"),
            ("POST", "/update_weights_from_distributed"): partial(self._load, "distributed"),
            ("POST", "/update_weights_from_ipc"): partial(self._load, "ipc"),
            ("POST", "/begin_weight_update"): self._begin_weight_update,
            ("POST", "/end_weight_update"): self._end_weight_update,
            ("POST", "/release_memory_occupation"): self._release_memory,
            ("POST", "/resume_memory_occupation"): self._resume_memory,
            ("POST", "/parse_function_call"): self._parse_function_call,
            ("POST", "/separate_reasoning"): self._separate_reasoning,
            ("GET", "/flush_cache"): self._flush_cache,
            ("POST", "/flush_cache"): self._flush_cache,
        }

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        engine = self._engines[scope["server"][1]]
        method, path = scope["method"], scope["path"]
        raw = await read_body(receive) if method in ("POST", "PUT") else b""
        if raw is None:
            await send_reply(send, Reply(413, error_object("the body is too large", 413)))
            return
        try:
            body: Any = orjson.loads(raw) if raw else {}
        except orjson.JSONDecodeError as error:
            await send_reply(send, Reply(400, error_object(f"the body is not JSON: {error}", 400)))
            return
        if path == "/generate" and method in ("POST", "PUT"):
            await self._generate(engine, body, receive, send)
            return
        route = self._routes.get((method, path))
        if route is None:
            await send_reply(send, Reply(404, {"detail": "Not Found"}))
        elif not isinstance(body, dict):
            await send_reply(send, Reply(400, error_object("the body is not a JSON object", 400)))
        else:
            await send_reply(send, await route(engine, cast(JSON, body)))

    async def _generate(self, engine: Scheduler, raw: Any, receive: Receive, send: Send) -> None:
        try:
            body = check_schema(raw)
        except SchemaError as error:
            await send_reply(send, Reply(400, error_object(str(error), 400)))
            return
        try:
            if self._loaders[engine].released:
                die("a request came while the memory was released")
            running = engine.submit(parse_request(body, engine.vocabulary, engine.limits.context_length))
        except OutOfVocabulary as error:
            # No reply and no cleanup: SGLang's scheduler dies of an IndexError here, and takes its server along.
            print(f"small engine: {error}: exiting", file=sys.stderr, flush=True)
            os._exit(1)
        except ValueRefused as refused:
            await _refuse(send, refused, wants_stream(body))
            return
        watcher = asyncio.create_task(_abort_on_disconnect(receive, engine, running))
        try:
            if running.request.stream:
                await self._stream(engine, running, send)
            else:
                while running.finish is None:
                    running.changed.clear()
                    await running.changed.wait()
                await send_reply(send, Reply(200, running.reply(engine.version)))
        finally:
            watcher.cancel()
            _abort(engine, running)

    async def _stream(self, engine: Scheduler, running: Running, send: Send) -> None:
        incremental = self._settings.incremental_streaming_output
        await begin_stream(send)
        ids_sent = text_sent = 0
        while True:
            await running.changed.wait()
            running.changed.clear()
            last = running.finish is not None
            chunk = running.reply(engine.version, ids_sent, text_sent)
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
            "tokenizer_path": path,
            "is_generation": True,
            "weight_version": engine.version,
            "vocab_size": engine.vocabulary.size,
            "context_length": engine.limits.context_length,
        }
        return Reply(200, info)

    async def _server_info(self, engine: Scheduler, body: JSON) -> Reply:
        limits = engine.limits
        info: JSON = {
            "model_path": str(self._settings.model_path),
            "served_model_name": self._settings.model_path.name,
            "context_length": limits.context_length,
            "stream_interval": limits.stream_interval,
            "incremental_streaming_output": self._settings.incremental_streaming_output,
            "max_running_requests": limits.max_running,
            "max_queued_requests": limits.max_queued,
            "tp_size": 1,
            "pp_size": 1,
            "dp_size": 1,
            "weight_version": engine.version,
            "startup_time": self._settings.started,
            "version": "small",
            "internal_states": [engine.load()],
        }
        return Reply(200, info)

    async def _loads(self, engine: Scheduler, body: JSON) -> Reply:
        loads = [{"dp_rank": 0, **engine.load()}]
        return Reply(200, {"timestamp": time.time(), "version": "small", "dp_rank_count": 1, "loads": loads})

    async def _models(self, engine: Scheduler, body: JSON) -> Reply:
        path, limit = str(self._settings.model_path), engine.limits.context_length
        card = {"id": path, "object": "model", "owned_by": "sglang", "root": path, "max_model_len": limit}
        return Reply(200, {"object": "list", "data": [card]})

    async def _abort_request(self, engine: Scheduler, body: JSON) -> Reply:
        if body.get("abort_all"):
            engine.abort_all()
        else:
            engine.abort(str(body.get("rid") or ""))
        return Reply(200)

    async def _pause_generation(self, engine: Scheduler, body: JSON) -> Reply:
        mode = body.get("mode", "abort")
        if mode not in get_args(PauseMode):
            return Reply(400, error_object(f"mode must be one of {', '.join(get_args(PauseMode))}", 400))
        engine.pause(mode)
        return Reply(200, {"message": "Generation paused successfully.", "status": "ok"})

    async def _continue_generation(self, engine: Scheduler, body: JSON) -> Reply:
        if self._loaders[engine].released and engine.in_flight:
            die("requests go on while the memory is released")
        engine.resume()
        return Reply(200, {"message": "Generation continued successfully.", "status": "ok"})

    async def _update_weights_from_disk(self, engine: Scheduler, body: JSON) -> Reply:
        """The weights that the file `seed` of `model_path` names, or else those that the version's name gives."""
        version: str = body.get("weight_version") or engine.version
        try:
            if body.get("fail"):
                raise ValueRefused(str(body["fail"]))
            seed = _weights_seed(Path(str(body.get("model_path", ""))), version)
            if body.get("abort_all_requests", False):
                engine.abort_all()
            await engine.update_weights(version, seed, bool(body.get("flush_cache", True)))
        except ValueRefused as refused:
            return Reply(400, {"success": False, "message": refused.message, "num_paused_requests": 0})
        return Reply(200, {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0})

    async def _update_weight_version(self, engine: Scheduler, body: JSON) -> Reply:
        version = body.get("new_version")
        if not isinstance(version, str) or not version:
            return Reply(400, error_object("new_version must be a string", 400))
        if body.get("abort_all_requests", True):
            engine.abort_all()
        engine.set_version(version)
        message = f"Weight version updated to {version}"
        return Reply(200, {"success": True, "message": message, "new_version": version})

    async def _load(self, how: str, engine: Scheduler, body: JSON) -> Reply:
        try:
            return await self._loaders[engine].load(how, body)
        except ValueRefused as refused:
            return Reply(400, {"success": False, "message": refused.message})

    async def _begin_weight_update(self, engine: Scheduler, body: JSON) -> Reply:
        return self._loaders[engine].begin()

    async def _end_weight_update(self, engine: Scheduler, body: JSON) -> Reply:
        return self._loaders[engine].end()

    async def _release_memory(self, engine: Scheduler, body: JSON) -> Reply:
        return self._loaders[engine].release(body)

    async def _resume_memory(self, engine: Scheduler, body: JSON) -> Reply:
        return self._loaders[engine].resume(body)

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

    async def _flush_cache(self, engine: Scheduler, body: JSON) -> Reply:
        if not engine.flush_cache():
            return Reply(400, {"success": False, "message": "Cache not flushed: requests are in flight."})
        return Reply(200, {"success": True, "message": "Cache flushed."})


def _weights_seed(directory: Path, version: str) -> str:
    if not directory.is_dir():
        raise ValueRefused(f"model_path {directory} is no directory")
    seed = directory / "seed"
    return seed.read_text(encoding="utf-8").strip() if seed.is_file() else version


def _abort(engine: Scheduler, running: Running) -> None:
    if running.finish is None:
        engine.abort(running.request.rid)


async def _abort_on_disconnect(receive: Receive, engine: Scheduler, running: Running) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    _abort(engine, running)


async def _refuse(send: Send, refused: ValueRefused, stream: bool) -> None:
    if stream:
        error = {"error": {"message": refused.message, "code": refused.status, "retryable": refused.status == 503}}
        await begin_stream(send)
        await send_event(send, error, last=True)
    elif refused.status == 400:
        await send_reply(send, Reply(400, {"error": {"message": refused.message}}))
    else:
        await send_reply(send, Reply(refused.status, error_object(refused.message, refused.status)))
