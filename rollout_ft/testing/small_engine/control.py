"""SGLang's control endpoints: abort, pause, weights and memory, as functions of an engine and a body.

Owns their bodies and answers. Must not know of HTTP. What SGLang does to itself when it is misused happens here too: to
release memory in use, to resume what was not released or to send no tensors ends the engine.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from rollout_ft.testing.small_engine.asgi import Reply
from rollout_ft.testing.small_engine.protocol import JSON, Died, SchemaError, ValueRefused
from rollout_ft.testing.small_engine.scheduler import PauseMode, Scheduler

Route = Callable[[Scheduler, JSON], Awaitable[Reply]]
WITHOUT_BODY = frozenset({"/flush_cache", "/weights_checker"})


async def _abort_request(engine: Scheduler, body: JSON) -> Reply:
    rid = _field(body, "rid", str, "")
    if body.get("abort_all"):
        engine.abort_all()
    elif rid:
        engine.abort(rid)
    return Reply(200)


async def _pause_generation(engine: Scheduler, body: JSON) -> Reply:
    mode = body.get("mode", "abort")
    if mode not in get_args(PauseMode):
        raise SchemaError(f"2 validation errors: mode: Input should be {', '.join(get_args(PauseMode))}")
    engine.pause(mode)
    return Reply(200, {"message": "Generation paused successfully.", "status": "ok"})


async def _continue_generation(engine: Scheduler, body: JSON) -> Reply:
    engine.resume()
    return Reply(200, {"message": "Generation continued successfully.", "status": "ok"})


async def _flush_cache(engine: Scheduler, body: JSON) -> Reply:
    return Reply(200, text="Cache flushed.\n") if engine.flush_cache() else Reply(400, text="Flush cache failed.\n")


async def _update_from_disk(engine: Scheduler, body: JSON) -> Reply:
    """The weights in `model.safetensors` of `model_path`, or those that its file `seed` names, or else those that the version's
    name gives."""

    async def update() -> str:
        directory = Path(_field(body, "model_path", str))
        if not directory.is_dir():
            raise ValueRefused(f"Failed to get weights iterator: '{directory}' is no directory.")
        seed, tensors = directory / "seed", directory / "model.safetensors"
        if tensors.is_file():
            file = tensors.read_bytes()
            await _take(engine, body, sha256(file).hexdigest(), file)
        else:
            await _take(engine, body, seed.read_text(encoding="utf-8").strip() if seed.is_file() else None)
        return "Succeeded to update model weights."

    return await _updated(body, update, num_paused_requests=0)


async def _update_from_tensor(engine: Scheduler, body: JSON) -> Reply:
    async def update() -> str:
        tensors = _field(body, "serialized_named_tensors", list)
        if not all(isinstance(tensor, str) for tensor in tensors):
            raise SchemaError("2 validation errors: serialized_named_tensors: Input should be a valid string")
        engine.weights.must_be_updating("update_weights_from_tensor")
        if not tensors:
            raise Died("IndexError: list index out of range")
        await _take(engine, body, None)
        return "Success"

    return await _updated(body, update)


async def _update_from_distributed(engine: Scheduler, body: JSON) -> Reply:
    async def update() -> str:
        for name in ("names", "dtypes", "shapes"):
            _field(body, name, list)
        engine.weights.must_be_updating("update_weights_from_distributed")
        group, known = _field(body, "group_name", str, "weight_update_group"), sorted(engine.weights.groups)
        if group not in known:
            reason = f"Group {group} not in {known}. Please call `init_weights_update_group` first."
            raise ValueRefused(f"Failed to receive weights: {reason}")
        await _take(engine, body, None)
        return "Succeeded to update parameter online."

    return await _updated(body, update)


async def _update_from_ipc(engine: Scheduler, body: JSON) -> Reply:
    """As SGLang with the package checkpoint-engine."""

    async def update() -> str:
        _field(body, "zmq_handles", dict)
        await _take(engine, body, None)
        return "Succeeded to update model weights."

    return await _updated(body, update)


async def _take(engine: Scheduler, body: JSON, seed: str | None, file: bytes | None = None) -> None:
    if body.get("abort_all_requests", False):
        engine.abort_all()
    await engine.update_weights(_field(body, "weight_version", str, None), seed, bool(body.get("flush_cache", True)), file)


async def _updated(body: JSON, update: Callable[[], Awaitable[str]], **more: int) -> Reply:
    try:
        message = await update()
    except ValueRefused as refused:
        return Reply(400, {"success": False, "message": refused.message, **more})
    if body.get("weight_version") is not None:
        message += f" Weight version updated to {body['weight_version']}."
    return Reply(200, {"success": True, "message": message, **more})


async def _update_weight_version(engine: Scheduler, body: JSON) -> Reply:
    version = _field(body, "new_version", str)
    if body.get("abort_all_requests", True):
        engine.abort_all()
    engine.set_version(version)
    return Reply(200, {"success": True, "message": f"Weight version updated to {version}", "new_version": version})


async def _begin_weight_update(engine: Scheduler, body: JSON) -> Reply:
    if body.get("selector", "all") not in ("target", "draft", "all"):
        raise SchemaError("2 validation errors: selector: Input should be 'target', 'draft' or 'all'")
    return _done(engine.weights.begin)


async def _end_weight_update(engine: Scheduler, body: JSON) -> Reply:
    return _done(engine.weights.end)


async def _init_weights_update_group(engine: Scheduler, body: JSON) -> Reply:
    """SGLang answers when the trainer has joined; there is nobody to wait for here."""
    _field(body, "master_address", str)
    for name in ("master_port", "rank_offset", "world_size"):
        _field(body, name, int)
    engine.weights.groups.add(_field(body, "group_name", str, "weight_update_group"))
    return Reply(200, {"success": True, "message": "Succeeded to initialize custom process group."})


async def _destroy_weights_update_group(engine: Scheduler, body: JSON) -> Reply:
    name = _field(body, "group_name", str, "weight_update_group")
    return _done(lambda: engine.weights.leave_group(name), "Succeeded to destroy custom process group.")


async def _weights_checker(engine: Scheduler, body: JSON) -> Reply:
    try:
        return Reply(200, engine.weights.check(_field(body, "action", str, "checksum")))
    except ValueRefused as refused:
        return Reply(400, {"success": False, "message": refused.message})


async def _release_memory(engine: Scheduler, body: JSON) -> Reply:
    engine.release_memory(_field(body, "tags", list, []))
    return Reply(200, text="null")


async def _resume_memory(engine: Scheduler, body: JSON) -> Reply:
    engine.weights.resume(_field(body, "tags", list, []))
    return Reply(200, text="null")


def _done(act: Callable[[], None], message: str = "Success") -> Reply:
    try:
        act()
    except ValueRefused as refused:
        return Reply(400, {"success": False, "message": refused.message})
    return Reply(200, {"success": True, "message": message})


_MISSING: Any = object()


def _field(body: JSON, name: str, kind: type, default: Any = _MISSING) -> Any:
    """A field of a body, or `default` where it is left out or null."""
    value = body.get(name)
    if value is None and default is not _MISSING:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        problem = "Field required" if name not in body else f"Input should be a valid {kind.__name__}"
        raise SchemaError(f"2 validation errors: {name}: {problem}")
    return value


ROUTES: dict[tuple[str, str], Route] = {
    ("POST", "/abort_request"): _abort_request,
    ("POST", "/pause_generation"): _pause_generation,
    ("POST", "/continue_generation"): _continue_generation,
    ("POST", "/update_weights_from_disk"): _update_from_disk,
    ("POST", "/update_weights_from_tensor"): _update_from_tensor,
    ("POST", "/update_weights_from_distributed"): _update_from_distributed,
    ("POST", "/update_weights_from_ipc"): _update_from_ipc,
    ("POST", "/update_weight_version"): _update_weight_version,
    ("POST", "/begin_weight_update"): _begin_weight_update,
    ("POST", "/end_weight_update"): _end_weight_update,
    ("POST", "/init_weights_update_group"): _init_weights_update_group,
    ("POST", "/destroy_weights_update_group"): _destroy_weights_update_group,
    **{(method, "/flush_cache"): _flush_cache for method in ("GET", "POST")},
    **{(method, "/weights_checker"): _weights_checker for method in ("GET", "POST")},
    **{(method, "/release_memory_occupation"): _release_memory for method in ("GET", "POST")},
    **{(method, "/resume_memory_occupation"): _resume_memory for method in ("GET", "POST")},
}
