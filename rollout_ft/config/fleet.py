"""The fleet: how its members are watched, drained, paused and replaced.

Owns the keys `fleet.…`. Does not know what an engine is asked. What is replaced on suspicion has a limit; what ended has none.
"""

from __future__ import annotations

from pydantic import Field

from rollout_ft.config.base import Seconds, Settings


class FleetConfig(Settings):
    drain_timeout_s: Seconds = 600
    """How long the turns of an engine that is drained have to end; after that they go on at another."""
    ping_s: Seconds = 1
    """The supervisor pings every actor so often and waits so long for the answer; two misses and it is replaced."""
    order_timeout_s: Seconds = 60
    """How long an engine may take to pause, to go on, to give its memory up or to get it back."""
    update_timeout_s: Seconds = 600
    """How long an engine may take to load weights. One of ours that does not answer by then is replaced."""
    max_pause_s: Seconds = 3600
    """A pause, an update or an offload that takes longer is called out, in an event and by `GET /fleet`. It is not ended, for
    the trainer may rely on it: nothing is lost by waiting."""
    max_kills_share: float = Field(default=0.25, gt=0, le=1)
    """Of the engines, at least one, this share at most is replaced within `kill_window_s` on suspicion: because it stands
    still, fails or does not answer. That many at once have a cause in common, which no replacement cures. An engine whose
    process ended is replaced whenever that happens."""
    kill_window_s: Seconds = 60
    warmup_s: Seconds = 30
    """A new engine's share of new sessions grows to that of the others over this time."""
