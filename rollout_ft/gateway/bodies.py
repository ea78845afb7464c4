"""The large bodies that owners have read: of the next one, an owner is sent only what stands behind.

Owns the last large body of each session that came by here, and the owner's name for what it has read of it; the longest
unused is given up first. Knows nothing of what a body says.

The subtle invariant: what is not sent was compared here, byte for byte, with what that name stands for. Whether the
owner still goes by the name is for the owner to say; it asks for the whole where it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from rollout_ft.types import Raw


@dataclass(frozen=True, slots=True)
class _Read:
    name: bytes
    end: int
    body: Raw


class Bodies:
    def __init__(self, most_bytes: int):
        self._most_bytes = most_bytes
        self._read: dict[str, _Read] = {}
        self.bytes = 0

    def known(self, sid: str, body: Raw) -> tuple[bytes, int]:
        """The owner's name for how this body begins, and how long that is; nothing where it begins otherwise."""
        read = self._read.get(sid)
        if read is None:
            return b"", 0
        with memoryview(read.body)[: read.end] as same:
            return (read.name, read.end) if body.startswith(same) else (b"", 0)

    def keep(self, sid: str, name: str, body: Raw) -> None:
        """The owner has read this body, and named what it will not need again: `…:end`."""
        self.forget(sid)
        self._read[sid] = _Read(name.encode(), int(name.rpartition(":")[2]), body)
        self.bytes += len(body)
        while self.bytes > self._most_bytes:
            self.forget(next(iter(self._read)))

    def forget(self, sid: str) -> None:
        read = self._read.pop(sid, None)
        self.bytes -= len(read.body) if read else 0
