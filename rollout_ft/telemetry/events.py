"""What happened, once per transition, in the words of DESIGN section 3.

Owns the shape of an event and a bounded buffer of those not collected yet; which events there are is `telemetry.vocabulary`'s.
Knows nothing of who reads them. An event is never made on a poll or per token.

The subtle invariant: each event of a process has the number after the one before it, so that whoever reads them knows what it lacks,
and an event is forgotten only when its reader has said that it has it: a call whose answer was lost is repeated.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from rollout_ft.clock import wall
from rollout_ft.telemetry.words import on_one_line
from rollout_ft.types import JSON, split_session_id

MAX_BUFFERED = 10_000
"""The oldest are dropped where nobody collects them: their numbers are missing."""
_log = logging.getLogger("rollout_ft")


class Events:
    def __init__(self, source: str):
        self._source, self._seq, self._heard = source, 0, 0
        self._buffer: deque[JSON] = deque(maxlen=MAX_BUFFERED)

    def emit(self, name: str, **fields: Any) -> None:
        """`name` is `noun.verb`, as `engine.lost`; ids and causes are fields. What concerns a session names its trial and attempt."""
        self._seq += 1
        named = split_session_id(fields["session"]) if "session" in fields and "trial" not in fields else None
        if named is not None:
            fields = {"trial": named[0], "attempt": named[1], **fields}
        self._buffer.append({"time": wall(), "event": name, "source": self._source, "seq": self._seq, **fields})
        _log.info("%s %s", name, on_one_line(" ".join(f"{k}={v}" for k, v in fields.items())))

    def unheard(self, heard: int) -> list[JSON]:
        """Those after number `heard`; its reader has the others, which are forgotten."""
        while self._buffer and self._buffer[0]["seq"] <= heard:
            self._buffer.popleft()
        return list(self._buffer)

    def take(self) -> list[JSON]:
        """All since the last call, for a reader in this process."""
        taken = self.unheard(self._heard)
        self._heard = self._seq
        return taken
