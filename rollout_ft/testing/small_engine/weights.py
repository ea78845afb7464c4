"""SGLang's ways to load weights in parts, and to give memory up and get it back.

Owns the order in which that is allowed. Must not know how weights are made of it: a version's name is all that there is.
The subtle invariant: what kills SGLang's scheduler kills this process as well, a release while something runs and a resume
of what was not released among it, so that whoever gets along here gets along there.
"""

from __future__ import annotations

import os
import sys

from rollout_ft.testing.small_engine.asgi import Reply
from rollout_ft.testing.small_engine.protocol import JSON
from rollout_ft.testing.small_engine.scheduler import Scheduler

ALL_TAGS = ("kv_cache", "weights", "cuda_graph")
PARTS = ("tensor", "distributed")
_NO_SESSION = "no weight-update session is open; call begin_weight_update() first"


class Loader:
    """The update session and the released memory of one engine."""

    def __init__(self, engine: Scheduler) -> None:
        self._engine = engine
        self._open = False
        self._released: set[str] = set()

    def begin(self) -> Reply:
        if self._open:
            return _refused("a weight-update session is already open; call end_weight_update() first")
        self._open = True
        return _done()

    def end(self) -> Reply:
        if not self._open:
            return _refused(_NO_SESSION)
        self._open = False
        return _done()

    async def load(self, how: str, body: JSON) -> Reply:
        """Loads what the version names; `{"fail": …}` in the body is refused with that, as if it could not be loaded."""
        if how in PARTS and not self._open:
            return _refused(f"update_weights_from_{how} must run between begin_weight_update() and end_weight_update()")
        if body.get("fail"):
            return _refused(str(body["fail"]))
        if body.get("abort_all_requests"):
            self._engine.abort_all()
        version = str(body.get("weight_version") or self._engine.version)
        await self._engine.update_weights(version, version, bool(body.get("flush_cache", True)))
        return _done()

    def release(self, body: JSON) -> Reply:
        if not self._engine.idle:
            die("release_memory_occupation should be called only when server is idle")
        self._released |= _tags(body)
        return Reply(200)

    def resume(self, body: JSON) -> Reply:
        if not _tags(body) <= self._released:
            die(f"KeyError: {sorted(_tags(body) - self._released)}")
        self._released -= _tags(body)
        return Reply(200)

    @property
    def released(self) -> bool:
        """Whether anything of the memory is gone: nothing can be computed then."""
        return bool(self._released)


def _tags(body: JSON) -> set[str]:
    return {*(body.get("tags") or ALL_TAGS)}


def _done() -> Reply:
    return Reply(200, {"success": True, "message": "Success"})


def _refused(message: str) -> Reply:
    return Reply(400, {"success": False, "message": message})


def die(why: str) -> None:
    """As SGLang's scheduler dies of an assertion, and takes its server along."""
    print(f"small engine: {why}: exiting", file=sys.stderr, flush=True)
    os._exit(1)
