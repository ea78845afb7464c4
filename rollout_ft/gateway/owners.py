"""The engine actors that hold sessions, as the gateway reaches them.

Owns the cache of session → owner, the pooled connections, and the watch on owners that have calls in flight. Knows
nothing of what the calls mean. An owner is never believed dead here: two missed pings and the supervisor is asked,
and only its answer breaks the calls that wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import orjson

from rollout_ft.errors import SessionClosed
from rollout_ft.types import JSON

LOCATE_PAUSE_S = 0.1
RELOCATE_PAUSE_S = 0.01


@dataclass(slots=True, eq=False)
class Owner:
    url: str
    engine_id: str
    incarnation: int
    in_flight: int = 0
    misses: int = 0
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    reports: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    pinging: asyncio.Task[None] | None = None
    reporting: asyncio.Task[None] | None = None


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
    def __init__(self, locator: Locator, secret: tuple[bytes, bytes], ping_s: float):
        self._locator, self._ping_s = locator, ping_s
        self._auth = {secret[0].decode(): secret[1].decode()}
        self._by_session: dict[str, Owner] = {}
        self._kept: set[asyncio.Task[None]] = set()
        self._known: dict[tuple[str, int], Owner] = {}
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        self.http = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
        )
        self._watch = asyncio.create_task(self._watch_owners())

    async def of(self, sid: str, failed: Owner | None = None) -> Owner:
        """The owner of a session; waits while nobody can serve it. Raises SessionClosed when it is over."""
        known = self._by_session.get(sid)
        if known is not None and known is not failed and not known.lost.is_set():
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
                return owner
            await asyncio.sleep(LOCATE_PAUSE_S)

    def forget(self, sid: str) -> None:
        self._by_session.pop(sid, None)

    async def call(self, owner: Owner, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """One call to an owner: `(status, headers, body)`. Raises OwnerLost."""
        owner.in_flight += 1
        call = asyncio.create_task(self._call(owner, method, path, body, headers))
        lost = asyncio.create_task(owner.lost.wait())
        try:
            await asyncio.wait({call, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done():
                raise OwnerLost(owner, in_flight=True)
            return call.result()
        finally:
            owner.in_flight -= 1
            call.cancel()
            lost.cancel()

    async def _call(self, owner: Owner, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        try:
            async with self.http.request(method, owner.url + path, data=body, headers={**headers, **self._auth}) as r:
                moved = r.headers.get("x-rft-owner")
                if moved:
                    raise OwnerLost(owner, in_flight=moved == "lost")
                return r.status, dict(r.headers), await r.read()
        except aiohttp.ClientConnectorError as e:
            raise OwnerLost(owner, in_flight=False) from e
        except (aiohttp.ClientError, ConnectionError) as e:
            raise OwnerLost(owner, in_flight=True) from e

    # -- reports --------------------------------------------------------------------------------------------------

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs something to its end that nobody waits for."""
        task = asyncio.create_task(work)
        self._kept.add(task)
        task.add_done_callback(self._kept.discard)
        task.add_done_callback(lambda t: t.cancelled() or t.exception())

    def report(self, owner: Owner, sid: str, *, delivered: str) -> None:
        """Tells the owner that a reply was delivered, together with whatever else there is to tell it then."""
        owner.reports.setdefault(sid, []).append(delivered)
        if owner.reporting is None or owner.reporting.done():
            owner.reporting = asyncio.create_task(self._send_reports(owner))

    async def reported(self, owner: Owner) -> None:
        """Returns when what was to be reported is: evidence must not arrive after the request that depends on it."""
        if owner.reporting is not None and not owner.reporting.done():
            await asyncio.wait({owner.reporting}, timeout=1)

    async def _send_reports(self, owner: Owner) -> None:
        while owner.reports:
            batch, owner.reports = owner.reports, {}
            body = orjson.dumps(list(batch.items()))
            with contextlib.suppress(OwnerLost):
                await self.call(owner, "POST", "/reports", body, {})

    # -- watching -------------------------------------------------------------------------------------------------

    async def _watch_owners(self) -> None:
        while True:
            for owner in list(self._known.values()):
                idle = owner.pinging is None or owner.pinging.done()
                if owner.in_flight and idle and not owner.lost.is_set():
                    owner.pinging = asyncio.create_task(self._ping(owner))
                    owner.pinging.add_done_callback(_logged)
            await asyncio.sleep(self._ping_s)

    async def _ping(self, owner: Owner) -> None:
        try:
            async with asyncio.timeout(self._ping_s):
                await self._call(owner, "GET", "/ping", b"", {})
            owner.misses = 0
            return
        except (TimeoutError, OwnerLost):
            owner.misses += 1
        if owner.misses >= 2 and await self._locator.suspect(owner.engine_id, owner.incarnation, "missed pings"):
            owner.lost.set()
            self._known.pop((owner.engine_id, owner.incarnation), None)

    async def aclose(self) -> None:
        self._watch.cancel()
        await self.http.close()
