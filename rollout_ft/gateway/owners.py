"""The engine actors that hold sessions, as the gateway reaches them.

Owns the cache of session → owner, a line to each owner, and the watch on owners that have calls in flight. Knows
nothing of what the calls mean. An owner is never believed dead here: two missed pings and the supervisor is asked,
and only its answer breaks the calls that wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

from rollout_ft.engine.wire import Call, Reply, decode_reply, encode_delivered, encode_request
from rollout_ft.errors import BadRequest, SessionClosed
from rollout_ft.line import CallFailed, Door, Line, LineBroken, NobodyThere
from rollout_ft.types import JSON, Raw

LOCATE_PAUSE_S = 0.1
RELOCATE_PAUSE_S = 0.01
CONNECT_TIMEOUT_S = 5.0
MAX_LOSSES = 6
"""A request that takes so many owners along is not sent to another."""
MAX_CACHED = 65_536
"""Sessions whose owner is remembered; that of another is asked for again."""


@dataclass(slots=True, eq=False)
class Owner:
    url: str
    engine_id: str
    incarnation: int
    in_flight: int = 0
    misses: int = 0
    still_s: float = 0.0
    """How long its engine has been paused, as it said last; 0 while it generates."""
    lost: bool = False
    line: Line | None = None
    connecting: asyncio.Lock = field(default_factory=asyncio.Lock)
    pinging: asyncio.Task[None] | None = None


def _logged(task: asyncio.Task[None]) -> None:
    """A ping whose question to the supervisor failed is asked again with the next one."""
    if not task.cancelled() and task.exception() is not None:
        logging.getLogger("rollout_ft").warning("ping: %s", task.exception())


class Locator(Protocol):
    """The supervisor, as far as owners are concerned."""

    async def locate(self, sid: str, failed: tuple[str, int] | None) -> JSON: ...
    async def suspect(self, engine_id: str, incarnation: int, reason: str) -> bool: ...


class OwnerLost(Exception):
    """The owner cannot be reached, or says that it is not the owner; `in_flight`: the call had begun there."""

    def __init__(self, owner: Owner, in_flight: bool):
        super().__init__(owner.engine_id)
        self.owner, self.in_flight = owner, in_flight


class Owners:
    def __init__(self, locator: Locator, token: bytes, ping_s: float):
        self._locator, self._token, self._ping_s = locator, token, ping_s
        self._by_session: dict[str, Owner] = {}
        self._kept: dict[bytes, asyncio.Task[None]] = {}
        self._known: dict[tuple[str, int], Owner] = {}
        self._latest: dict[str, int] = {}
        self.waiting = 0
        """Requests for sessions that nobody can serve just now."""
        self._watch = asyncio.create_task(self._watch_owners())

    async def of(self, sid: str, failed: Owner | None = None) -> Owner:
        """The owner of a session; waits while nobody can serve it. Raises SessionClosed when it is over."""
        known = self._by_session.get(sid)
        if known is not None and known is not failed and not known.lost:
            return known
        if failed is not None:
            await asyncio.sleep(RELOCATE_PAUSE_S)  # an owner that is named again and again must not be asked in a spin
        while True:
            place = await self._locator.locate(sid, (failed.engine_id, failed.incarnation) if failed else None)
            if place["state"] == "closed":
                self.forget(sid)
                raise SessionClosed(place["message"])
            if place["state"] == "owned":
                key = (place["engine_id"], place["incarnation"])
                owner = self._known.setdefault(key, Owner(place["url"], *key))
                self._by_session[sid] = owner
                self._latest[owner.engine_id] = max(self._latest.get(owner.engine_id, 0), owner.incarnation)
                if len(self._by_session) > MAX_CACHED:
                    del self._by_session[next(iter(self._by_session))]
                return owner
            self.waiting += 1
            try:
                await asyncio.sleep(LOCATE_PAUSE_S)
            finally:
                self.waiting -= 1

    def incarnations(self) -> dict[str, int]:
        """The latest incarnation of each engine that was named here: none of these may come again as another engine."""
        return dict(self._latest)

    def forget(self, sid: str) -> None:
        self._by_session.pop(sid, None)

    async def call(self, owner: Owner, method: str, path: str, body: Raw | memoryview, headers: dict[bytes, bytes]) -> Reply:
        """One call to an owner: `(status, headers, body)`. Raises OwnerLost."""
        owner.in_flight += 1
        try:
            return await self._call(owner, method, path, body, headers)
        finally:
            owner.in_flight -= 1

    async def ask(self, sid: str, path: str, body: Raw) -> Reply:
        """The answer of whoever holds the session, to a call that may be made again. Raises SessionClosed, BadRequest (503)."""
        failed: Owner | None = None
        for _ in range(MAX_LOSSES):
            owner = await self.of(sid, failed)
            try:
                return await self.call(owner, "POST", path, body, {})
            except OwnerLost as e:
                failed = e.owner
        raise BadRequest("nobody who holds the session answers just now; ask again", 503, "unavailable")

    async def _call(self, owner: Owner, method: str, path: str, body: Raw | memoryview, headers: dict[bytes, bytes]) -> Reply:
        line = await self._line(owner)
        try:
            head = encode_request(method, path, headers)
            reply = decode_reply(await line.call(Call.REQUEST, len(head), head, body))
        except (LineBroken, CallFailed) as e:
            raise OwnerLost(owner, in_flight=True) from e
        moved = reply[1].get("x-rft-owner")
        if moved:
            raise OwnerLost(owner, in_flight=moved == "lost")
        return reply

    async def _line(self, owner: Owner) -> Line:
        if owner.line is not None and owner.line.open:
            return owner.line
        async with owner.connecting:
            if owner.line is None or not owner.line.open:
                host, _, port = owner.url.rpartition(":")
                try:
                    async with asyncio.timeout(CONNECT_TIMEOUT_S):
                        owner.line = await Line.to(Door(host, int(port), self._token))
                except (NobodyThere, TimeoutError) as e:
                    raise OwnerLost(owner, in_flight=False) from e
            return owner.line

    # -- reports --------------------------------------------------------------------------------------------------

    def keep(self, name: bytes, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs something to its end that nobody waits for; what runs already under that name is not begun again."""
        if name in self._kept:
            return
        task = self._kept[name] = asyncio.create_task(work())
        task.add_done_callback(lambda _: self._kept.pop(name, None))
        task.add_done_callback(lambda t: t.cancelled() or t.exception())

    def report(self, owner: Owner, sid: str, *, delivered: str) -> None:
        """Tells the owner that a reply was delivered; it hears of it before it hears of the next request."""
        if owner.line is not None:
            owner.line.tell(Call.DELIVERED, 0, encode_delivered(sid, delivered))

    # -- watching -------------------------------------------------------------------------------------------------

    async def _watch_owners(self) -> None:
        while True:
            for owner in list(self._known.values()):
                idle = owner.pinging is None or owner.pinging.done()
                if owner.in_flight and idle and not owner.lost:
                    owner.pinging = asyncio.create_task(self._ping(owner))
                    owner.pinging.add_done_callback(_logged)
            await asyncio.sleep(self._ping_s)

    async def _ping(self, owner: Owner) -> None:
        try:
            async with asyncio.timeout(self._ping_s):
                _, headers, _ = await self._call(owner, "GET", "/ping", b"", {})
            owner.still_s = float(headers.get("x-rft-still", 0))
            owner.misses = 0
            return
        except (TimeoutError, OwnerLost):
            owner.misses += 1
        if owner.misses >= 2 and await self._locator.suspect(owner.engine_id, owner.incarnation, "missed pings"):
            owner.lost = True
            self._known.pop((owner.engine_id, owner.incarnation), None)
            if owner.line is not None:
                owner.line.close()

    async def aclose(self) -> None:
        self._watch.cancel()
        for owner in self._known.values():
            if owner.line is not None:
                owner.line.close()
