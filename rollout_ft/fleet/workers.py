"""Which engines there are that somebody else owns: those that the config names, or the workers of their router.

Owns the reading of the list, again and again. Decides nothing about engines: who is new and who has left is told. A list that
cannot be read changes nothing, and nobody has left who is missing in one list alone: a router that starts anew lists nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
import orjson

from rollout_ft.clock import monotonic
from rollout_ft.config import AttachConfig
from rollout_ft.errors import ConfigError
from rollout_ft.types import JSON

MISSES = 3
"""In so many lists one after another an engine is missing that has left."""
READ_TIMEOUT_S = 5.0
ROUTES = ("/workers", "/list_workers")
"""sglang-router since 0.2.2, and those before it."""


def engine_id_of(url: str) -> str:
    """The same URL is the same engine, whoever supervises it."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"engine-{parts.hostname}:{port}{parts.path.rstrip('/').replace('/', '_')}"


def base_url(url: str) -> str:
    """Routers list each data-parallel rank of an engine as `URL@RANK`: it is one engine."""
    return url.partition("@")[0].rstrip("/") if url.rpartition("@")[2].isdigit() else url.rstrip("/")


def listed(answer: JSON) -> list[str]:
    """The URLs in a router's list, of either kind, each once. Workers that the router calls unhealthy are listed too: whether
    they serve is seen at them. Raises ValueError for what is no list."""
    workers: Any = answer.get("workers", answer.get("urls"))
    if not isinstance(workers, list):
        raise ValueError("neither workers nor urls")
    urls = [each if isinstance(each, str) else str(cast(JSON, each).get("url", "")) for each in cast("list[Any]", workers)]
    return list(dict.fromkeys(base_url(url) for url in urls if urlsplit(url).scheme in ("http", "https")))


class Roll:
    """Who is there. Pure."""

    def __init__(self, present: Collection[str] = ()):
        self._missing: dict[str, int] = dict.fromkeys(present, 0)

    def read(self, urls: Collection[str]) -> tuple[list[str], list[str]]:
        """`(who came, who left)` since the list before."""
        came = [url for url in urls if url not in self._missing]
        self._missing = {url: 0 if url in urls else self._missing[url] + 1 for url in self._missing} | dict.fromkeys(came, 0)
        left = [url for url, misses in self._missing.items() if misses >= MISSES]
        for url in left:
            del self._missing[url]
        return came, left


class Workers:
    def __init__(self, config: AttachConfig, timeout_s: float):
        self._config, self._timeout_s = config, timeout_s
        self._roll = Roll()
        self.trouble = ""
        """Why the list cannot be read just now."""

    async def first(self) -> list[str]:
        """The engines at the start; waits until there are some. Raises ConfigError when the router's list stays empty."""
        if self._config.urls:
            return [url.rstrip("/") for url in self._config.urls]
        until = monotonic() + self._timeout_s
        while True:
            urls = await self._read() or []
            if urls:
                self._roll = Roll(urls)
                return urls
            if monotonic() > until:
                reason = self.trouble or "it lists no worker"
                raise ConfigError(f"engine.attach.router_url: {self._config.router_url} for {self._timeout_s:g} s: {reason}")
            await asyncio.sleep(self._config.poll_s)

    async def follow(self, came: Callable[[str], None], left: Callable[[str, str], Awaitable[None]]) -> None:
        """Tells who comes and leaves from now on; returns at once where the config names the engines."""
        while self._config.router_url:
            await asyncio.sleep(self._config.poll_s)
            urls = await self._read()
            if urls is None:
                continue
            new, gone = self._roll.read(urls)
            for url in new:
                came(url)
            for url in gone:
                await left(url, "its router does not list it any more")

    async def _read(self) -> list[str] | None:
        try:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=READ_TIMEOUT_S)) as http:
                for route in ROUTES:
                    async with http.get(self._config.router_url.rstrip("/") + route) as answer:
                        if answer.status == 404:
                            continue
                        answer.raise_for_status()
                        urls = listed(orjson.loads(await answer.read()))
                        self.trouble = ""
                        return urls
            self.trouble = "neither /workers nor /list_workers: it is no router"
        except (aiohttp.ClientError, TimeoutError, ValueError, AttributeError) as e:
            self.trouble = f"{type(e).__name__}: {e}"
        return None
