"""The cluster: which one is joined or started, and how.

Owns the keys `ray.…` alone, and imports no Ray: the command line reads a config before it needs one.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rollout_ft.config.base import Settings


class RayConfig(Settings):
    address: str = "auto"
    """`auto`: join the cluster that RAY_ADDRESS or this machine's running Ray names, else start one; `local`: always
    start one; anything else: the address to join."""
    namespace: str = "rollout_ft"
    auth_mode: Literal["token", "disabled"] = "token"
    """Used for a cluster that we start, unless RAY_AUTH_MODE says otherwise."""
    num_cpus: int | None = None
    object_store_bytes: int = Field(default=256 * 2**20, ge=80 * 2**20)
    dashboard: bool = False
