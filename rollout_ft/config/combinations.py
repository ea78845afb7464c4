"""What keys of different sections cannot say together.

Owns the checks that need more than one section; those within a section are its own. Every one names the key to change.
SGLang's arguments are checked here, since what they may be depends on the engine's GPUs and nodes and on its kind.
"""

from __future__ import annotations

from rollout_ft.config.engine import EngineConfig
from rollout_ft.config.model import ModelConfig
from rollout_ft.config.session import SessionConfig
from rollout_ft.engine import arguments


def check(engine: EngineConfig, model: ModelConfig, session: SessionConfig) -> None:
    if engine.kind == "sglang" and model.path == "small":
        raise ValueError("engine.kind sglang needs model.path: the directory of a real model")
    if engine.kind == "sglang":
        arguments.check(engine.args, num_gpus=engine.num_gpus, nodes=engine.nodes)
    if session.max_output_tokens >= model.context_tokens:
        raise ValueError("session.max_output_tokens leaves no room for a prompt in model.context_tokens")
    if model.tool_parser == "gpt-oss" != model.reasoning_parser:
        raise ValueError("model.tool_parser gpt-oss needs model.reasoning_parser gpt-oss: it drops the reasoning otherwise")
