"""How an engine is started: the command, its environment, where its output goes.

Owns the command lines, and what we add to them. Starts nothing. The small engine and SGLang are started the same way and
speak the same protocol; only the command differs. What the user says comes last and wins, but for what could not work.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout_ft.config import VISIBLE, Config, model_dir
from rollout_ft.engine import arguments
from rollout_ft.engine.experts import shape_of
from rollout_ft.engine.ports import Ports
from rollout_ft.fleet.node import logs_dir

_SECRETS = re.compile(r"^RAY_AUTH|SECRET|API_KEY")
_DEFAULTS = [
    "--enable-cache-report", "--enable-metrics",
    "--max-queued-requests", "256",  # without a limit requests wait for longer than anybody waits for them
    "--soft-watchdog-timeout", "60",  # says in the log where it stands when it hangs
    "--watchdog-timeout", "3600",  # a pause of the trainer is no hang; what hangs is seen by its tokens long before
]  # fmt: skip
LEASE_MARGIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Rank:
    """Which of an engine's nodes this is, and where they meet (`host:port`, of rank 0)."""

    number: int = 0
    meet: str = ""


def command(config: Config, engine_id: str, ports: Ports, rank: Rank | None = None) -> list[str]:
    """The command line."""
    module = "sglang.launch_server" if config.engine.kind == "sglang" else "rollout_ft.testing.small_engine"
    program = config.engine.command or [sys.executable, "-m", module]
    return [*program, *server_args(config, engine_id, ports, rank)]


def server_args(config: Config, engine_id: str, ports: Ports, rank: Rank | None = None) -> list[str]:
    """All arguments, what we only suggest first and what the user says last."""
    suggested = _DEFAULTS if config.engine.kind == "sglang" else []
    return [*suggested, *_ours(config, ports, rank or Rank()), *user_args(config, engine_id)]


def user_args(config: Config, engine_id: str) -> list[str]:
    """`{engine}` in engine.args stands for the engine's id."""
    return [arg.replace("{engine}", engine_id) for arg in config.engine.args]


def _ours(config: Config, ports: Ports, rank: Rank) -> list[str]:
    """What other keys of the config say, and what is chosen for this start."""
    engine, model = config.engine, config.model
    ours = ["--incremental-streaming-output", "--stream-interval", str(engine.stream_interval_tokens)]
    ours += ["--context-length", str(model.context_tokens), *_routed(config), "--model-path", model_dir(config)]
    ours += ["--weight-version", model.weight_version] if model.weight_version else []
    ours += ["--host", "127.0.0.1", "--port", str(ports.server)]
    if engine.nodes > 1:
        ours += ["--nnodes", str(engine.nodes), "--node-rank", str(rank.number), "--dist-init-addr", rank.meet]
    if engine.kind == "sglang":
        ours += _meeting(arguments.sizes_of(engine.args), ports, several_nodes=engine.nodes > 1)
    return ours


def _meeting(sizes: arguments.Sizes, ports: Ports, *, several_nodes: bool) -> list[str]:
    """Where its processes meet. Several copies of a model would all be told the same port: SGLang chooses theirs."""
    if sizes.replicas > 1:
        return []
    meeting = ["--nccl-port", str(ports.nccl)]
    if sizes.attention_dp > 1 and not several_nodes:
        meeting += ["--dist-init-addr", f"127.0.0.1:{ports.rendezvous}"]
    return meeting


def _routed(config: Config) -> list[str]:
    """The small engine has no experts: it is told which it would have."""
    shape = shape_of(config)
    if shape is None:
        return []
    if config.engine.kind == "sglang":
        return ["--enable-return-routed-experts"]
    return ["--routed-experts", f"{shape.layers},{shape.topk},{shape.experts}"]


def environment(config: Config, gpus: Sequence[str] = ()) -> dict[str, str]:
    """The engine's environment: ours without secrets, with what the config adds. `gpus` are those that Ray assigned."""
    inherited = {k: v for k, v in os.environ.items() if not _SECRETS.search(k)}
    # Without leases an engine goes on for nobody when the network or this actor is lost.
    ours = {
        "SGLANG_TIMEOUT_KEEP_ALIVE": "75",  # its own is 5 s, as long as many clients keep idle connections: they would race
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false",  # else every /health is a generation
        "SGLANG_REQ_WAITING_TIMEOUT": f"{2 * config.engine.first_token_timeout_s + LEASE_MARGIN_S:g}",
        "SGLANG_REQ_RUNNING_TIMEOUT": f"{config.trial.attempt_timeout_s + LEASE_MARGIN_S:g}",
        "PYTHONUNBUFFERED": "1",
    }
    if gpus and VISIBLE not in inherited:  # Ray was told to leave it to us
        ours[VISIBLE] = ",".join(gpus)
    return {**inherited, **ours, **config.engine.env}


def log_path(name: str) -> str:
    """Beside Ray's own logs, where its dashboard shows them."""
    return str(Path(logs_dir()) / f"rollout_ft-{name.replace('/', '-')}.log")
