"""Time, as everything here sees it.

Owns the two ways to ask for the time: `monotonic` for every deadline and timer, `wall` for what people read.
Decisions take the time as an argument or a `Clock`; nothing pure reads a clock by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds on a clock that never jumps; only differences mean anything."""

monotonic: Clock = time.monotonic
wall: Clock = time.time
