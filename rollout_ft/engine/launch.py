"""How an engine is started: the command, its environment, where its output goes.

Owns the command lines. Starts nothing. The small engine and SGLang are started the same way and speak the same
protocol; only the command differs.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from rollout_ft.config import Config, model_dir
from rollout_ft.engine.experts import shape_of
from rollout_ft.fleet.node import logs_dir

_SECRETS = re.compile(r"^RAY_AUTH|SECRET|API_KEY")


def command(config: Config, engine_id: str, port: int) -> list[str]:
    """The command line; `{engine}` in engine.args stands for the engine's id."""
    engine = config.engine
    common = ["--model-path", model_dir(config), "--host", "127.0.0.1", "--port", str(port)]
    if engine.kind == "sglang":
        program = [*(engine.command or [sys.executable, "-m", "sglang.launch_server"]), "--incremental-streaming-output"]
        program += ["--stream-interval", str(engine.stream_interval_tokens), "--context-length", str(config.model.context_tokens)]
    else:
        program = [*(engine.command or [sys.executable, "-m", "rollout_ft.testing.small_engine"]), "--incremental-streaming-output"]
        program += ["--stream-interval", str(engine.stream_interval_tokens), "--context-length", str(config.model.context_tokens)]
    return [*program, *_routed(config), *common, *(arg.replace("{engine}", engine_id) for arg in engine.args)]


def _routed(config: Config) -> list[str]:
    """The small engine has no experts: it is told which it would have."""
    shape = shape_of(config)
    if shape is None:
        return []
    if config.engine.kind == "sglang":
        return ["--enable-return-routed-experts"]
    return ["--routed-experts", f"{shape.layers},{shape.topk},{shape.experts}"]


def environment(config: Config) -> dict[str, str]:
    """The engine's environment: ours without secrets, with what the config adds."""
    inherited = {k: v for k, v in os.environ.items() if not _SECRETS.search(k)}
    # SGLang's own keep-alive is 5 s, as long as many clients keep idle connections: they would race.
    return {**inherited, "SGLANG_TIMEOUT_KEEP_ALIVE": "75", "PYTHONUNBUFFERED": "1", **config.engine.env}


def log_path(name: str) -> str:
    """Beside Ray's own logs, where its dashboard shows them."""
    return str(Path(logs_dir()) / f"rollout_ft-{name.replace('/', '-')}.log")
