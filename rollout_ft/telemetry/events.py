"""What happened, once per transition, in the words of DESIGN section 3.

Owns the shape of an event and a bounded buffer of those not collected yet. Knows nothing of who reads them. An event
is never made on a poll or per token; when nobody collects, the oldest are dropped and counted.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from rollout_ft.clock import wall
from rollout_ft.types import JSON

MAX_BUFFERED = 10_000
_log = logging.getLogger("rollout_ft")


class Events:
    def __init__(self, source: str):
        self._source = source
        self._buffer: deque[JSON] = deque(maxlen=MAX_BUFFERED)
        self.dropped = 0

    def emit(self, name: str, **fields: Any) -> None:
        """`name` is `noun.verb`, as `engine.lost`; ids and causes are fields."""
        if len(self._buffer) == MAX_BUFFERED:
            self.dropped += 1
        self._buffer.append({"time": wall(), "event": name, "source": self._source, **fields})
        _log.info("%s %s", name, " ".join(f"{k}={v}" for k, v in fields.items()))

    def take(self) -> list[JSON]:
        """All events since the last call."""
        taken = list(self._buffer)
        self._buffer.clear()
        return taken
