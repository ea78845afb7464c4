"""Which weight version the fleet has, where trainers load weights into engines and tell nobody.

Owns the order of the versions, which is that of their arrival: a version that an engine got while it was looked at, and that
nobody had before, is the newest. Pure. What an engine has when it is attached or restarted is no arrival, for it may be what
its command line says. Nothing stops for ever: where no engine that is ready has the newest version for `grace_s` (it was
taken back, or who had it is gone), it is the one that most of them have.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

MAX_VERSIONS = 4096


@dataclass(frozen=True, slots=True)
class Has:
    """What an engine has; `ready`: its owner lets it serve."""

    engine_id: str
    version: str
    ready: bool


class Newest:
    def __init__(self, grace_s: float, version: str = ""):
        self._grace_s = grace_s
        self.version = version
        self._known: OrderedDict[str, None] = OrderedDict.fromkeys([version] if version else [])
        self._arrived = False
        self._without_since: float | None = None

    def arrived(self, version: str) -> bool:
        """An engine got this version while it was looked at. Whether it is the newest from now on."""
        if version in self._known:
            return False
        self._become(version)
        self._arrived = True
        return True

    def told(self, version: str) -> None:
        """The trainer says which it is."""
        self._become(version)
        self._arrived = True

    def among(self, engines: Collection[Has], now: float) -> bool:
        """What the engines have just now. Whether another version is the newest from now on."""
        for each in engines:
            self._known.setdefault(each.version)
        ready = [e.version for e in engines if e.ready]
        if not self._arrived:  # until one arrives, the engines that were found decide among themselves
            return self._most(ready or [e.version for e in engines])
        if not ready or self.version in ready:
            self._without_since = None
            return False
        if self._without_since is None:
            self._without_since = now
        if now - self._without_since < self._grace_s:
            return False
        return self._most(ready)

    def _most(self, versions: list[str]) -> bool:
        if not versions:
            return False
        counted = Counter(versions)
        best = max(counted, key=lambda v: (counted[v], v == self.version, list(self._known).index(v)))
        if best == self.version:
            return False
        self._become(best)
        return True

    def _become(self, version: str) -> None:
        self.version, self._without_since = version, None
        self._known[version] = None
        while len(self._known) > MAX_VERSIONS:
            self._known.popitem(last=False)
