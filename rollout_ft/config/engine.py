"""The engines: what is started, on what, and how long it may take before it is given up.

Owns the keys `engine.…`, and which of them go together. Does not know SGLang's arguments. Deadlines here are floors and a
ceiling: what lies between is measured.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rollout_ft.config.attach import AttachConfig
from rollout_ft.config.base import Seconds, Settings
from rollout_ft.config.calls import AdmissionConfig, RetryConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"


class EngineConfig(Settings):
    kind: Literal["small", "sglang"] = "small"
    count: int = Field(default=3, ge=1)
    command: list[str] = []
    """What is run in place of `python -m sglang.launch_server` (or of the small engine): a program of another environment,
    or a wrapper around it. It is given the same arguments."""
    args: list[str] = []
    """More arguments for the engine's command line, as they stand; `{engine}` is the engine's id. SGLang's are checked against
    the installed version, and those that another key says are refused."""
    env: dict[str, str] = {}
    num_gpus: float = Field(default=0, ge=0)
    """GPUs that Ray assigns to one engine, on each of its nodes: as many as its parallel sizes take; a fraction shares one."""
    nodes: int = Field(default=1, ge=1)
    """Nodes that one engine stretches over, each with `num_gpus`: the loss of any of them is the loss of the engine."""
    log_bytes: int = Field(default=256 * 2**20, ge=2**16)
    """What the logs of one engine may take on its node, those of its earlier starts included; the oldest lines go first."""
    start_timeout_s: Seconds = 120
    first_token_timeout_s: Seconds = 30
    """A floor: no first token for so long, and none of any other call, and the engine hangs. Longer prompts are given longer,
    by the speed of prefill that was measured here."""
    token_timeout_s: Seconds = 10
    """A floor: no token of any call for so long while one is due, and the engine hangs, whatever its /health says. It is
    longer while chunks are seen to come further apart, and while somebody's long prompt is computed."""
    timeout_factor: float = Field(default=3, ge=1)
    """How many times of what this engine was seen to need it may take, where that is more than the floors."""
    compile_timeout_s: Seconds = 180
    """What a new engine does for the first time may take so long: kernels are compiled."""
    max_timeout_s: Seconds = 600
    """The ceiling: no call waits longer for a token, nor for its turn in the engine's queue."""
    canary_idle_s: Seconds = 10
    """An engine that nobody used for so long is asked to compute one token's prompt, and while paused for its /server_info."""
    dead_after: int = Field(default=3, ge=1)
    """Failures in a row, of requests (broken connections, 5xx) or of probes, after which it is replaced."""
    stream_interval_tokens: int = Field(default=16, ge=1)
    partial_flush_s: Seconds = 1
    admission: AdmissionConfig = AdmissionConfig()
    retry: RetryConfig = RetryConfig()
    max_generations_per_turn: int = Field(default=6, ge=1)
    """Of one turn, whoever asks for it again and whichever engines it moves to; an attempt of a trial begins anew."""
    max_restarts: int = Field(default=100, ge=0)
    """Replacements of one engine within `restart_window_s` before it is retired. One that is attached is awaited for as long as
    it is listed."""
    restart_window_s: Seconds = 3600
    attach: AttachConfig = AttachConfig()

    @model_validator(mode="after")
    def _deadlines_fit(self) -> EngineConfig:
        for name in ("first_token_timeout_s", "token_timeout_s", "compile_timeout_s"):
            if getattr(self, name) > self.max_timeout_s:
                raise ValueError(f"engine.{name} is longer than engine.max_timeout_s, its ceiling: raise that, or lower this")
        return self

    @model_validator(mode="after")
    def _attached_is_not_launched(self) -> EngineConfig:
        if not self.attach.active:
            return self
        if self.kind == "small":
            raise ValueError("engine.attach needs engine.kind sglang: the small engine is started by us")
        for key in ("command", "args", "env", "num_gpus", "count"):
            if getattr(self, key) if key != "count" else "count" in self.model_fields_set:
                raise ValueError(f"engine.{key} is for engines that we start; remove it, or engine.attach")
        if self.token_timeout_s <= 2 * self.attach.poll_s:
            raise ValueError("engine.token_timeout_s must be more than twice engine.attach.poll_s: a pause would look like a hang")
        return self

    @model_validator(mode="after")
    def _gpus_fit(self) -> EngineConfig:
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(f"engine.num_gpus: {self.num_gpus:g}: Ray assigns whole GPUs, or a part of one")
        if self.nodes > 1 and 0 < self.num_gpus < 1:
            raise ValueError("engine.nodes: an engine that shares a GPU has one node; set engine.num_gpus to 1 or more")
        if self.num_gpus and VISIBLE in self.env:
            raise ValueError(f"engine.env: {VISIBLE} is Ray's to set with engine.num_gpus; leave one of them out")
        return self
