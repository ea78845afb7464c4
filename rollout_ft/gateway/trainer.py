"""The routes of trainers: pause, update, resume, offload, under our names and under SGLang's.

Owns the shapes of these requests, and what of them is said to whom. Knows nothing of engines. A trainer that points at one
SGLang server may point here: its call goes to every engine, with the body as it stands, and the answer has SGLang's keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rollout_ft.errors import BadRequest
from rollout_ft.fleet.weights import Command, Op
from rollout_ft.types import JSON

Version = Annotated[str, Field(min_length=1, max_length=256)]
Tag = Literal["kv_cache", "weights", "cuda_graph"]
PATHS = {how: f"/update_weights_from_{how}" for how in ("disk", "tensor", "distributed", "ipc")}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PauseBody(_Body):
    mode: Literal["abort", "in_place", "retract"] = "abort"
    """As SGLang has them. What is in flight is continued after the pause in each of them."""


class ResumeBody(_Body):
    torch_empty_cache: bool = True


class OffloadBody(_Body):
    tags: list[Tag] = []
    """None are all."""


class WeightsBody(_Body):
    """`disk` needs `path`; the body of `tensor`, `distributed` and `ipc` is what SGLang's own route takes; `external`: the
    trainer has done it at the engines, and they are asked whether they say so."""

    version: Version
    how: Literal["disk", "tensor", "distributed", "ipc", "external"] = "disk"
    path: str = ""
    body: dict[str, Any] = {}

    @model_validator(mode="after")
    def _is_whole(self) -> WeightsBody:
        if self.how == "disk" and not (self.path or self.body.get("model_path")):
            raise ValueError("path is missing: the directory of the weights, which every engine can read")
        if self.how not in ("disk", "external") and not self.body:
            raise ValueError(f"body is missing: what SGLang's /update_weights_from_{self.how} takes")
        if self.body.get("weight_version", self.version) != self.version:
            raise ValueError("body.weight_version is another than version")
        return self

    def command(self) -> Command:
        body = {**self.body, "weight_version": self.version}
        if self.how == "disk":
            body["model_path"] = self.path or body["model_path"]
        path = PATHS.get(self.how, "")
        return Command(Op.UPDATE, self.version, self.how, path=path, body=body if path else {}, whole=True)


class AnyBody(BaseModel):
    """A body of SGLang's: what we do not know of it is passed on."""

    model_config = ConfigDict(extra="allow", strict=True)


class LoadBody(AnyBody):
    weight_version: Version | None = None


class NameBody(AnyBody):
    new_version: Version


class TagsBody(AnyBody):
    tags: list[Tag] | None = None


def _pause(b: Any) -> Command:
    return Command(Op.PAUSE, mode=b.mode)


def _load(how: str, b: Any) -> Command:
    """From a disk, and by handles, the weights come whole; else in parts, between `begin` and `end`."""
    version = b.weight_version or ""
    if how in ("disk", "ipc"):
        return Command(Op.UPDATE, version, how, path=PATHS[how], body=_sent(b), again=how == "disk" or not version)
    return Command(Op.LOAD, version, how, path=PATHS[how], body=_sent(b))


def _sent(b: BaseModel) -> JSON:
    return b.model_dump(exclude_unset=True)


_MADE: dict[str, tuple[type[BaseModel], Callable[[Any], Command]]] = {
    "fleet/pause": (PauseBody, _pause),
    "fleet/resume": (ResumeBody, lambda b: Command(Op.RESUME, body=_sent(b))),
    "fleet/weights": (WeightsBody, WeightsBody.command),
    "fleet/offload": (OffloadBody, lambda b: Command(Op.OFFLOAD, tags=tuple(sorted(b.tags)))),
    "pause_generation": (PauseBody, _pause),
    "continue_generation": (ResumeBody, lambda b: Command(Op.RESUME, body=_sent(b))),
    "update_weights_from_disk": (LoadBody, lambda b: _load("disk", b)),
    "update_weights_from_tensor": (LoadBody, lambda b: _load("tensor", b)),
    "update_weights_from_distributed": (LoadBody, lambda b: _load("distributed", b)),
    "update_weights_from_ipc": (LoadBody, lambda b: _load("ipc", b)),
    "update_weight_version": (NameBody, lambda b: Command(Op.NAME, b.new_version, path="/update_weight_version", body=_sent(b))),
    "begin_weight_update": (AnyBody, lambda b: Command(Op.BEGIN, body=_sent(b))),
    "end_weight_update": (AnyBody, lambda b: Command(Op.END, body=_sent(b))),
    "release_memory_occupation": (TagsBody, lambda b: Command(Op.OFFLOAD, tags=tuple(sorted(b.tags or ())))),
    "resume_memory_occupation": (TagsBody, lambda b: Command(Op.ONLOAD, tags=tuple(sorted(b.tags or ())))),
    "init_weights_update_group": (AnyBody, lambda b: Command(Op.FORWARD, path="/init_weights_update_group", body=_sent(b))),
    "destroy_weights_update_group": (AnyBody, lambda b: Command(Op.FORWARD, path="/destroy_weights_update_group", body=_sent(b))),
    "flush_cache": (AnyBody, lambda b: Command(Op.FORWARD, path="/flush_cache", body=_sent(b))),
}
BODIES = {route: model for route, (model, _) in _MADE.items()}
"""The model of each route's body, for the API's document."""


def command_of(route: str, body: JSON) -> Command:
    """What a route of `BODIES` and a body ask for. Raises BadRequest."""
    model, make = _MADE[route]
    try:
        return make(model.model_validate(body))
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(str(p) for p in first["loc"])
        raise BadRequest(f"{field}: {first['msg']}" if field else str(first["msg"]), param=field or None) from None


def reply_of(route: str, done: JSON) -> JSON:
    """The answer: ours, and beside it what SGLang's own says."""
    if route.startswith("fleet/"):
        return done
    failed = sorted(i for i, report in done["engines"].items() if not report["ok"])
    message = f"done, but not by {', '.join(failed)}" if failed else "done by every engine"
    return {"success": True, "status": "ok", "message": message, **done}
