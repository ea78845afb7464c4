"""What a user may say on SGLang's command line, and what is ours to say.

Owns the list of arguments that are made from other keys, and the sizes of an engine. Pure: which arguments the installed
version knows is `installed`'s affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

OWNED = {
    "--model-path": "model.path", "--model": "model.path", "--context-length": "model.context_tokens",
    "--weight-version": "model.weight_version", "--stream-interval": "engine.stream_interval_tokens",
    "--enable-return-routed-experts": "samples.routed_experts",
    "--nnodes": "engine.nodes", "--node-rank": "engine.nodes",
}  # fmt: skip
"""Arguments that another key of the config says."""
_OURS = "it is chosen for each start, so that no two engines collide; leave it out"
_LOOPBACK = "the engine listens on the loopback address for its own actor alone; leave it out"
_PROTOCOL = "the engine is spoken to over HTTP; leave it out"
_PARTS = "a prefill or decode worker serves nobody alone; attach their router as one engine (engine.attach)"
REFUSED = {
    "--port": _OURS, "--nccl-port": _OURS, "--dist-init-addr": _OURS, "--nccl-init-addr": _OURS,
    "--incremental-streaming-output": "it is always on; leave it out",
    "--host": _LOOPBACK, "--ssl-keyfile": _LOOPBACK, "--ssl-certfile": _LOOPBACK, "--api-key": _LOOPBACK, "--admin-api-key": _LOOPBACK,
    "--grpc-mode": _PROTOCOL, "--smg-grpc-mode": _PROTOCOL, "--encoder-only": _PROTOCOL,
    "--use-ray": "its processes would outlive their engine: they are actors of their own; leave it out",
    "--config": "arguments in a file cannot be checked; write them into engine.args",
    "--disaggregation-mode": _PARTS,
}  # fmt: skip
"""Arguments that cannot be used at all, and why."""
_ASSIGNED = ("--base-gpu-id", "--gpu-id-step")
"""Of GPUs that Ray did not assign."""
_SIZES = {
    "--tp": "tp", "--tp-size": "tp", "--tensor-parallel-size": "tp",
    "--pp": "pp", "--pp-size": "pp", "--pipeline-parallel-size": "pp",
    "--dp": "dp", "--dp-size": "dp", "--data-parallel-size": "dp",
    "--attn-dp-size": "attention_dp", "--attention-data-parallel-size": "attention_dp",
}  # fmt: skip
SHORT = frozenset({"--tp", "--pp", "--dp", "--ep"})
"""Abbreviations that everybody writes. Others could hide an argument that is ours."""
_DP_ATTENTION = "--enable-dp-attention"


@dataclass(frozen=True, slots=True)
class Sizes:
    tp: int = 1
    pp: int = 1
    dp: int = 1
    attention_dp: int = 1
    """Data parallelism inside of the tensor parallel group: it needs no GPUs of its own."""

    @property
    def replicas(self) -> int:
        """Copies of the model, each with GPUs and a rendezvous of its own."""
        return 1 if self.attention_dp > 1 else self.dp

    @property
    def gpus(self) -> int:
        return self.tp * self.pp * self.replicas

    def __str__(self) -> str:
        return f"tensor {self.tp} x pipeline {self.pp} x data {self.replicas}"


def sizes_of(args: Sequence[str]) -> Sizes:
    """Raises ValueError naming the argument whose value is no size."""
    found: dict[str, int] = {}
    for name, value in _pairs(args):
        if name in _SIZES:
            if not value.isdecimal() or not int(value):
                raise ValueError(f"engine.args: {name} needs a number of at least 1, not {value!r}")
            found[_SIZES[name]] = int(value)
    if any(name == _DP_ATTENTION for name, _ in _pairs(args)):
        found["attention_dp"] = found.get("dp", 1)
    return Sizes(**found)


def check(args: Sequence[str], *, num_gpus: float, nodes: int) -> None:
    """Raises ValueError naming the argument, and the key that says it or the reason why nobody can."""
    for name, _ in _pairs(args):
        if name in OWNED:
            raise ValueError(f"engine.args: {name} is not to be set here: set {OWNED[name]}")
        if name in REFUSED:
            raise ValueError(f"engine.args: {name} cannot be used: {REFUSED[name]}")
        if num_gpus and name in _ASSIGNED:
            raise ValueError(f"engine.args: {name} cannot be used with engine.num_gpus: Ray assigns the GPUs, and they count from 0")
    sizes = sizes_of(args)
    if nodes > 1 and sizes.tp * sizes.pp % nodes:
        raise ValueError(f"engine.nodes: {nodes} nodes cannot share {sizes} evenly; set --tp-size to a multiple of engine.nodes")
    if nodes > 1 and sizes.replicas > 1:
        raise ValueError("engine.nodes: an engine of several nodes is one replica; set engine.count, or use --attn-dp-size")
    if num_gpus and sizes.gpus != max(1, round(num_gpus * nodes)):
        raise ValueError(
            f"engine.num_gpus: {num_gpus:g} on each of {nodes} node(s) do not fit {sizes} = {sizes.gpus} GPUs; "
            f"set engine.num_gpus to {-(-sizes.gpus // nodes)}, or --tp-size in engine.args"
        )


def _pairs(args: Sequence[str]) -> list[tuple[str, str]]:
    """Each option with the word that may be its value."""
    pairs: list[tuple[str, str]] = []
    for i, word in enumerate(args):
        if word.startswith("--"):
            name, eq, value = word.partition("=")
            pairs.append((name, value if eq else args[i + 1] if i + 1 < len(args) else ""))
    return pairs
