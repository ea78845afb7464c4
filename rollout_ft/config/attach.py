"""Engines of somebody else: where they are, and how long what their owner does to them is waited for.

Owns the keys `engine.attach.…`, and that they come from one source. Knows nothing of engines that we start: what of their
keys is refused beside these is `engine`'s affair.
"""

from __future__ import annotations

from pydantic import model_validator

from rollout_ft.config.base import Seconds, Settings, is_url


class AttachConfig(Settings):
    """Engines that somebody else owns: `urls`, or the workers of the router at `router_url`. They are watched and used, and
    never killed, paused, updated or probed with generations."""

    urls: list[str] = []
    """One `http://host:port` for each engine."""
    router_url: str = ""
    """Of an sglang-router (`GET /workers`) or an older one (`GET /list_workers`): its workers are read again each `poll_s`."""
    replace_url: str = ""
    """POST `{url, reason, incarnation}` goes there when an engine is lost. Empty: that the owner replaces it is awaited."""
    poll_s: Seconds = 1
    """Each engine is asked so often whether it is ready, for its weight version and its load."""
    spread_s: Seconds = 3
    """Owners abort all their engines within so long: an abort that was not ours closes all of them, and one whose turns run
    on for longer was spared."""
    others_s: Seconds = 5
    """An aborted engine is open again when it has requests that are not ours for so long. Longer than its owner waits
    between two aborts (slime: 3 s)."""
    reopen_idle_s: Seconds | None = None
    """An aborted engine counts as open when it was idle for so long: for an owner that aborts, and then neither pauses it nor
    gives it another weight version, nor says `POST /fleet/resume`. None: never, since what it waits for may take hours."""
    memory_settle_s: Seconds | None = None
    """An engine started with --enable-memory-saver does not tell whether its owner has its memory, and dies of a request
    then. Once it is ready with new weights the rest of the memory is there after so long. None: it opens when somebody says
    so (`POST /fleet/resume`), or when others send requests."""
    move_parked_s: Seconds = 10
    """What waits at a closed engine goes to others when one has been open for so long meanwhile: owners open all of them at
    about the same time, and where a session was its prefix is cached."""
    version_grace_s: Seconds = 30
    """The newest weight version that was seen to arrive is the fleet's, and engines with another serve nothing. Where no
    engine that is ready has it for so long, it is the one that most of them have."""

    @property
    def active(self) -> bool:
        return bool(self.urls or self.router_url)

    @model_validator(mode="after")
    def _one_source(self) -> AttachConfig:
        if self.urls and self.router_url:
            raise ValueError("engine.attach.urls and engine.attach.router_url: set one of them")
        for key in ("router_url", "replace_url"):
            if (url := getattr(self, key)) and not is_url(url):
                raise ValueError(f"engine.attach.{key}: {url!r} is no http:// or https:// URL")
        for url in self.urls:
            if not is_url(url):
                raise ValueError(f"engine.attach.urls: {url!r} is no http:// or https:// URL")
        if len({url.rstrip("/") for url in self.urls}) != len(self.urls):
            raise ValueError("engine.attach.urls names an engine twice")
        return self
