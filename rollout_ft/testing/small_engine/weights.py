"""The weights of one engine: what they are called, whether an update of them is open, and whether their memory is there.

Owns the rules of SGLang's control endpoints for weights and memory, with its messages. Must not know of requests. The
subtle invariant: there are two names. `version` is the scheduler's, which marks the tokens; `told` is the HTTP
server's, which `/model_info` shows. An update that fails after the weights were taken changes the first alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256

from rollout_ft.testing.small_engine.model import Model
from rollout_ft.testing.small_engine.protocol import JSON, Died, ValueRefused

MEMORY = ("kv_cache", "weights", "cuda_graph")


@dataclass(slots=True)
class Weights:
    """`saver`: memory is really given away, as with SGLang's --enable-memory-saver; without, releasing it changes nothing."""

    model: Model
    version: str
    saver: bool
    told: str = ""
    seed: str = ""
    updating: bool = False
    groups: set[str] = field(default_factory=set[str])
    released: set[str] = field(default_factory=set[str])
    _snapshot: str = ""

    def __post_init__(self) -> None:
        self.told = self.version
        self.load(self.version)

    def load(self, seed: str, file: bytes | None = None) -> None:
        try:
            self.model.load(seed, file)
        except ValueError as e:
            raise ValueRefused(f"Failed to update weights: {e}") from e
        self.seed = seed

    def begin(self) -> None:
        if self.updating:
            raise ValueRefused("a weight-update session is already open; call end_weight_update() first")
        self.updating = True

    def end(self) -> None:
        if not self.updating:
            raise ValueRefused("no weight-update session is open; call begin_weight_update() first")
        self.updating = False

    def must_be_updating(self, call: str) -> None:
        if not self.updating:
            raise ValueRefused(f"{call} must run between begin_weight_update() and end_weight_update()")

    def leave_group(self, name: str) -> None:
        if name not in self.groups:
            raise ValueRefused("The group to be destroyed does not exist.")
        self.groups.remove(name)

    def release(self, tags: list[str]) -> None:
        """Weights that lose their memory lose their content: they are to be loaded again."""
        self.released |= set(tags or MEMORY)
        if "kv_cache" in self.released:
            self.model.forget()

    def resume(self, tags: list[str]) -> None:
        for tag in tags or MEMORY:
            if tag not in self.released:
                raise Died(f"KeyError: {tag!r}, which was not released")
            self.released.remove(tag)
            if tag == "weights" and self.saver:
                self.load(f"what the memory happened to hold after {self.seed}")

    def must_be_there(self) -> None:
        if self.saver and self.released:
            raise Died(f"an illegal memory access: {', '.join(sorted(self.released))} released")

    def check(self, action: str) -> JSON:
        """The answer of `/weights_checker`."""
        answer: JSON = {"success": True, "message": "Success."}
        if action == "checksum":
            sums = {"model.weight": sha256(self.seed.encode()).hexdigest()[:16]}
            whole = sha256(self.seed.encode()).hexdigest()
            place = {"role": "target", "rank": 0, "size": 1}
            place |= {f"{kind}_{what}": value for kind in ("tp", "dp", "pp") for what, value in (("rank", 0), ("size", 1))}
            ranks = [{"checksums": sums, "per_gpu_checksum": whole, "parallelism_info": [place]}]
            return {**answer, "ranks": ranks, "per_engine_checksum": sha256(whole.encode()).hexdigest()}
        if action == "snapshot":
            self._snapshot = self.seed
        elif action == "reset_tensors":
            self.load(f"reset {self.seed}")
        elif action != "compare":
            raise ValueRefused(f"Unsupported action={action!r}")
        elif self._snapshot != self.seed:
            raise ValueRefused("the weights differ from the snapshot")
        return answer
