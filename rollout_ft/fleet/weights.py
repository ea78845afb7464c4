"""Which weights the fleet should have, and whether it generates.

Owns the fleet's phase, the order of the versions and what an order of the trainer makes of both. Pure. A version is an
opaque string; the order is that in which the trainer named them. The reasons for not generating are kept side by side, for
trainers end a pause before they give the last of the memory back, or after.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import blake2b
from typing import Any

import orjson

from rollout_ft.types import JSON

MODES = ("abort", "in_place", "retract")
MEMORY = ("cuda_graph", "kv_cache", "weights")
"""What SGLang releases when no tags are named."""
MAX_VERSIONS = 4096
"""A version that is not among so many is older than all of them."""


class Phase(StrEnum):
    SERVING = "serving"
    PAUSED = "paused"
    UPDATING = "updating"
    OFFLOADED = "offloaded"


class Op(StrEnum):
    LEARN = "learn"
    """Nothing new: an engine is told where the fleet is."""
    PAUSE = "pause"
    RESUME = "resume"
    UPDATE = "update"
    """A whole update, in one order."""
    BEGIN = "begin"
    LOAD = "load"
    """One of the parts that weights come in, between `begin` and `end`."""
    END = "end"
    NAME = "name"
    """The weights that are loaded have this version."""
    OFFLOAD = "offload"
    ONLOAD = "onload"
    FORWARD = "forward"
    """Anything else that goes to every engine as it stands."""


@dataclass(frozen=True, slots=True)
class Command:
    """What a trainer asks of every engine. `path` and `body` are what an engine is sent; `how` is that of an update.

    `whole`: memory that the trainer has comes back first. `again`: a version that is there already is loaded all the same,
    for trainers that use one name, or none, for all."""

    op: Op
    version: str = ""
    how: str = ""
    mode: str = ""
    tags: tuple[str, ...] = ()
    path: str = ""
    body: JSON = field(default_factory=dict[str, Any])
    whole: bool = False
    again: bool = False

    @property
    def key(self) -> str:
        """The same for the same order."""
        said = [self.op, self.version, self.how, self.mode, self.tags, self.path, self.body, self.whole, self.again]
        return blake2b(orjson.dumps(said, option=orjson.OPT_SORT_KEYS), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Weights:
    """`versions`: as the trainer named them, the last is current. `source` is the last update, where it can be repeated for an
    engine that missed it. `still_since` (a wall clock) is when generating stopped, None while it goes on."""

    revision: int = 0
    versions: tuple[str, ...] = ()
    mode: str = ""
    released: tuple[str, ...] = ()
    begun: bool = False
    source: Command | None = None
    still_since: float | None = None
    still_s: float = 0.0
    """Of all that ended before."""

    @property
    def phase(self) -> Phase:
        if self.released:
            return Phase.OFFLOADED
        if self.begun:
            return Phase.UPDATING
        return Phase.PAUSED if self.mode else Phase.SERVING

    @property
    def version(self) -> str:
        return self.versions[-1] if self.versions else ""

    def behind(self, version: str) -> int:
        """How many updates came after this version."""
        known = self.versions
        return len(known) - 1 - known.index(version) if version in known else len(known)

    def describe(self, now: float) -> JSON:
        """`still_s`: how long the run has not generated, all in all. `now`: wall clock."""
        still_s = self.still_s + (max(0.0, now - self.still_since) if self.still_since else 0)
        return {
            "phase": self.phase.value, "mode": self.mode, "released": list(self.released), "version": self.version,
            "versions": list(self.versions[-16:]), "revision": self.revision, "still_since": self.still_since,
            "still_s": round(still_s, 3),
            "last_update": self.source.how if self.source else "",
        }  # fmt: skip


FIRST = frozenset({Op.LEARN, Op.PAUSE, Op.BEGIN, Op.OFFLOAD})
"""What holds for the fleet before the first engine has done it: an engine that joins meanwhile begins so. Everything else
holds once an engine has done it."""


def after(weights: Weights, command: Command, now: float) -> Weights:
    """The fleet's weights once the order was carried out; the same object when it changes nothing. `now`: wall clock."""
    made = _after(weights, command)
    if made.phase is not Phase.SERVING:
        made = replace(made, still_since=weights.still_since or now)
    elif weights.still_since is not None:
        made = replace(made, still_since=None, still_s=weights.still_s + max(0.0, now - weights.still_since))
    return weights if made == weights else replace(made, revision=weights.revision + 1)


def _after(weights: Weights, command: Command) -> Weights:
    match command.op:
        case Op.PAUSE:
            return replace(weights, mode=command.mode)
        case Op.RESUME:
            return replace(weights, mode="")
        case Op.BEGIN:
            return replace(weights, begun=True)
        case Op.END:
            return replace(weights, begun=False)
        case Op.UPDATE:
            released = () if command.whole else weights.released
            return replace(_named(weights, command.version), source=_source(command), released=released)
        case Op.LOAD:
            return replace(_named(weights, command.version), source=_source(command))
        case Op.NAME:
            return _renamed(weights, command.version)
        case Op.OFFLOAD:
            return replace(weights, released=tuple(sorted({*weights.released, *(command.tags or MEMORY)})))
        case Op.ONLOAD:
            back = command.tags or MEMORY
            return replace(weights, released=tuple(tag for tag in weights.released if tag not in back))
        case Op.LEARN | Op.FORWARD:
            return weights


def _source(command: Command) -> Command:
    """Tensors are not kept: nobody could send them again."""
    return command if command.how == "disk" else replace(command, path="", body={})


def _named(weights: Weights, version: str) -> Weights:
    """A version that comes again is the newest again."""
    if not version or version == weights.version:
        return weights
    return replace(weights, versions=(*(v for v in weights.versions if v != version), version)[-MAX_VERSIONS:])


def _renamed(weights: Weights, version: str) -> Weights:
    """Weights that were loaded from a disk before can be loaded under their new name."""
    source = weights.source
    if source is not None and source.how == "disk":
        source = replace(source, version=version, body={**source.body, "weight_version": version})
    return replace(_named(weights, version), source=source)


def for_engine(command: Command, index: int, count: int) -> Command:
    """What one of `count` engines is sent. Each gets ranks of its own in a group that is made for all of them.

    Raises ValueError when the ranks cannot be shared out."""
    if command.path != "/init_weights_update_group" or count <= 1:
        return command
    offset, world = command.body.get("rank_offset"), command.body.get("world_size")
    if not isinstance(offset, int) or not isinstance(world, int) or (world - offset) % count or world <= offset:
        raise ValueError(f"world_size - rank_offset must be a multiple of {count}, the number of engines that are up (GET /fleet)")
    return replace(command, body={**command.body, "rank_offset": offset + index * (world - offset) // count})


def latest(known: Iterable[Weights]) -> Weights:
    """Of what the engines remember, the newest."""
    return max(known, key=lambda w: w.revision, default=Weights())


def remedy(weights: Weights, released: bool) -> str:
    """What has to be done for an engine that is stale."""
    if released:
        return "give its memory back (/resume_memory_occupation), then load weights"
    if weights.source is not None and weights.source.how == "disk":
        return "it is brought up to date from disk"
    return "the trainer's next update brings it back (POST /fleet/weights)"
