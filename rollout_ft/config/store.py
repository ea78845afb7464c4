"""The checkpoint store: how many replicas, where they stand, and what they keep.

Owns the keys `store.…`. Does not know what a commit is. What no commit could ever fulfil is refused here.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from rollout_ft.config.base import Seconds, Settings
from rollout_ft.fleet.spread import Placement


class StoreConfig(Settings):
    replicas: int = Field(default=2, ge=1)
    min_replicas: int = Field(default=1, ge=1)
    commit_timeout_s: Seconds = 10
    call_timeout_s: Seconds = 2
    placement: Placement = Placement.SPREAD
    """`spread`: replicas stand on distinct nodes where there are several, and on the head last; `distinct`: never two on
    one node, however few replicas that leaves; `any`: where Ray puts them."""
    journal_dir: str = ""
    """Where commits are journalled on disk, a directory that every node with a replica sees; `none`: only in the memory of
    the replicas. Empty: `journal` in the directory that `run` writes to, elsewhere none."""
    memory_bytes: int = Field(default=4 * 2**30, ge=2**20)
    """What one replica keeps of its trials in memory and in Ray's object store. Past it the oldest sealed segments are
    in the journal alone, and are read back from there; without a journal the object store spills them to Ray's disk.
    Trials that were collected and released take nothing."""

    payload_copies: int = Field(default=1, ge=1)
    """On how many replicas the routed experts of a turn are kept; with the last of them they are lost, and no turn is."""
    payload_bytes: int = Field(default=4 * 2**30, ge=0)
    """Of routed experts on one replica, all trials together; what comes beyond is not kept. Ray may spill it to disk."""

    @model_validator(mode="after")
    def _min_fits(self) -> StoreConfig:
        if self.min_replicas > self.replicas:
            raise ValueError("store.min_replicas is larger than store.replicas: no commit could ever succeed")
        if self.payload_copies > self.replicas:
            raise ValueError("store.payload_copies is larger than store.replicas")
        return self
