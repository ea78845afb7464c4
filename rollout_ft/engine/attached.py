"""An engine that somebody else owns: looked at once a second, used while it is open, let go of when it is gone.

Owns the GETs and the gate's reason OWNER. Decides nothing: `observer` does. What is asked of the engine is cheap and never a
generation; what it does not answer, while its owner may have it, is no death.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import aiohttp
import orjson

from rollout_ft.clock import monotonic
from rollout_ft.config import Config, model_dir
from rollout_ft.engine import observer
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.fit import PROBE, Facts, Wanted, facts_of, judge, router_facts, started_of, wanted_model
from rollout_ft.engine.gate import Closed
from rollout_ft.engine.observer import Held, Look, Observed, Reach, Rules
from rollout_ft.errors import EngineLost, EngineUnfit
from rollout_ft.types import JSON

LOOK_TIMEOUT_S = 5.0
FACTS_TIMEOUT_S = 20.0
RETRY_S = 0.5
STARTED_EVERY = 15
"""Looks between two that ask when the engine was started, which costs it more than the others; after a failure it is asked at once."""
SOONER = 4
"""How much more often a closed engine is looked at."""


@dataclass(frozen=True, slots=True)
class Report:
    """What the fleet is told when it changes."""

    open: bool
    held: str
    version: str
    spared: bool
    why: str


class Owned:
    """The engine's own answers. Raises ConnectionRefusedError when nobody listens, TimeoutError when nothing comes."""

    def __init__(self, url: str):
        self.url = url
        # The server may close idle connections after 5 s; ours are let go before that.
        connector = aiohttp.TCPConnector(keepalive_timeout=2)
        self._http = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    async def get(self, path: str, timeout_s: float = LOOK_TIMEOUT_S) -> tuple[int, JSON]:
        return await self._ask("GET", path, None, timeout_s)

    async def post(self, path: str, body: JSON, timeout_s: float = LOOK_TIMEOUT_S) -> tuple[int, JSON]:
        return await self._ask("POST", path, body, timeout_s)

    async def _ask(self, method: str, path: str, body: JSON | None, timeout_s: float) -> tuple[int, JSON]:
        try:
            async with self._http.request(method, self.url + path, json=body, timeout=aiohttp.ClientTimeout(total=timeout_s)) as answer:
                content = await answer.read()
        except aiohttp.ClientConnectorError as e:
            raise (ConnectionRefusedError if isinstance(e.os_error, ConnectionRefusedError) else TimeoutError)(str(e)) from e
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as e:
            raise TimeoutError(f"{path}: {type(e).__name__}") from e
        with contextlib.suppress(orjson.JSONDecodeError):
            data: Any = orjson.loads(content) if content else {}
            return answer.status, cast(JSON, data) if isinstance(data, dict) else {}
        return answer.status, {}

    async def aclose(self) -> None:
        await self._http.close()


class Attached:
    """A `Unit`."""

    ours = False

    def __init__(self, owned: Owned, config: Config, facts: Facts, warnings: tuple[str, ...]):
        self._owned, self.url, self.facts, self.warnings = owned, owned.url, facts, warnings
        self._config = config.engine.attach
        self.rules = Rules(
            self._config.spread_s, self._config.others_s, self._config.reopen_idle_s, self._config.memory_settle_s, facts.memory_saver
        )
        self.state = Observed(started=facts.started)
        self.loads: list[JSON] = []
        """Of each data-parallel rank, at the last look."""
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._wake = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._told: Report | None = None
        self._looks = 0
        self._lengths: dict[int, int] = {}
        self._moved = -1.0

    @classmethod
    async def start(cls, config: Config, engine_id: str, url: str, encode: Callable[[str], list[int]]) -> Attached:
        """Waits for the engine to answer, and says what it is. Whether its owner has it just now is seen later.

        Raises EngineUnfit when it cannot be used, EngineLost when it is not there within `engine.start_timeout_s`.
        """
        owned, timeout_s, last = Owned(url), config.engine.start_timeout_s, "no answer"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        facts = await _facts(owned)
                        break
                    except (ConnectionRefusedError, TimeoutError) as e:
                        last = "connection refused" if isinstance(e, ConnectionRefusedError) else f"no answer ({e})"
                        await asyncio.sleep(RETRY_S)
            fit = judge(facts, _wanted(config), await _tokens(owned, facts, encode))
            if fit.refused:
                raise EngineUnfit(url, fit.refused)
        except BaseException as e:
            await owned.aclose()
            if isinstance(e, TimeoutError):
                raise EngineLost(engine_id, f"{url} is not there after {timeout_s:g} s (engine.start_timeout_s): {last}") from None
            raise
        return cls(owned, config, facts, fit.warnings)

    async def watch(self, driver: Driver, tell: Callable[[Report], None]) -> None:
        """Looks at the engine once, and again and again from now on; `tell` hears what changes."""
        self._driver, self._tell = driver, tell
        driver.theirs, driver.look = self.aborted, self.look
        await self.look()
        self._watching = asyncio.create_task(self._watch())

    # -- what is seen ---------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while not self.state.ended:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.poll_s / (1 if self.state.open else SOONER)):
                    await self._wake.wait()
            self._wake.clear()
            await self.look()

    async def look(self) -> None:
        """One look that begins now or later."""
        if self._looking is not None:
            await asyncio.shield(self._looking)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
        await asyncio.shield(self._looking)

    async def _look(self) -> None:
        try:
            seen = await self._seen()  # meanwhile it may have been closed or opened: the state is that of afterwards
            self._become(observer.looked(self.state, seen, self.rules))
        finally:
            self._looking = None

    async def _seen(self) -> Look:
        """The version first: an engine that is ready after that was so with this version."""
        began = monotonic()
        ask_started = self._looks % STARTED_EVERY == 0 or self.state.missed or self.state.refused
        self._looks += 1
        self._follow_calls(began)
        try:
            if self.facts.router:
                return await self._router_seen(began)
            _, model = await self._owned.get("/model_info")
            ready, _ = await self._owned.get("/ready")
            load = await self._load()
            started = started_of((await self._owned.get("/server_info", FACTS_TIMEOUT_S))[1]) if ask_started else ""
        except ConnectionRefusedError:
            return Look(began, Reach.REFUSED)
        except TimeoutError:
            return Look(began, Reach.SILENT)
        version = str(model.get("weight_version", self.state.version))
        return Look(began, Reach.ANSWERED, ready == 200, version, load, started, self._moved)

    async def _router_seen(self, began: float) -> Look:
        status, model = await self._owned.get("/get_model_info")
        version = str(model.get("weight_version", self.state.version))
        return Look(began, Reach.ANSWERED, status == 200, version, None, "", self._moved)

    async def _load(self) -> int | None:
        """How many requests of others it has."""
        _, told = await self._owned.get("/v1/loads?include=core")
        ranks: Any = told.get("loads")
        if not isinstance(ranks, list):
            return None
        self.loads = [_of_rank(rank) for rank in cast("list[JSON]", ranks)]
        there = sum(rank["running"] + rank["waiting"] for rank in self.loads)
        return max(0, there - len(self._driver.calls))

    def _follow_calls(self, now: float) -> None:
        """Whether a call that is older than any abort of these seconds goes on."""
        before = self.state.since - self._config.spread_s
        lengths = {key: len(g.ids) for key, (g, sent) in self._driver.calls.items() if sent < before}
        if any(length > self._lengths.get(key, length) for key, length in lengths.items()):
            self._moved = now
        self._lengths = lengths

    # -- what is heard --------------------------------------------------------------------------------------------

    def aborted(self, version: str) -> None:
        """A call ended by an abort that was not ours."""
        self._become(observer.aborted(self.state, monotonic(), version or self.state.version))
        self._wake.set()

    def suspected(self, by: str) -> None:
        """An owner's abort was seen at the engine `by`: what was sent here after it came in its way, and is taken back."""
        now = monotonic()
        self._become(observer.suspected(self.state, now, by))
        self._wake.set()
        if self.state.held is Held.SUSPECTED and self.state.since == now:
            for generation in [g for g, sent in self._driver.calls.values() if sent > now - self._config.spread_s]:
                self._driver.abort(generation)

    def cleared(self, why: str) -> None:
        self._become(observer.cleared(self.state, why))

    def told(self) -> None:
        """Somebody who knows says that it is open."""
        self._become(observer.told(self.state))
        self._wake.set()

    def _become(self, state: Observed) -> None:
        self.state = state
        gate = self._driver.gate
        (gate.open if state.open else gate.close)(Closed.OWNER)
        if state.ended and not self._ended.done():
            self._ended.set_result(state.ended)
        report = Report(state.open, state.held or ("paused" if state.paused else ""), state.version, state.spared, state.why)
        if self._told is None or replace(report, why=self._told.why) != self._told:
            self._told = report
            self._tell(report)

    # -- the unit -------------------------------------------------------------------------------------------------

    def describe(self) -> JSON:
        """What there is to say of it: `report` as when it changed last."""
        assert self._told is not None
        return {**asdict(self._told), "ranks": self.facts.ranks, "loads": self.loads, "warnings": list(self.warnings)}

    def pid(self) -> int | None:
        return None

    async def wait(self) -> str:
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        """It is not ours: it is only looked at no more."""
        if self._watching is not None:
            self._watching.cancel()

    async def aclose(self) -> None:
        self.kill()
        await self._owned.aclose()


def _of_rank(told: JSON) -> JSON:
    return {
        "dp_rank": int(told.get("dp_rank") or 0), "running": int(told.get("num_running_reqs") or 0),
        "waiting": int(told.get("num_waiting_reqs") or 0),
    }  # fmt: skip


async def _facts(owned: Owned) -> Facts:
    """Raises TimeoutError where it is not there yet."""
    status, model = await owned.get("/model_info", FACTS_TIMEOUT_S)
    if status == 404:
        status, model = await owned.get("/get_model_info", FACTS_TIMEOUT_S)
        if (await owned.get("/workers"))[0] == 200 or (await owned.get("/list_workers"))[0] == 200:
            if status != 200:
                raise TimeoutError("a router without workers")
            return router_facts(model)
    if status != 200:
        raise TimeoutError(f"/model_info: HTTP {status}")
    status, server = await owned.get("/server_info", FACTS_TIMEOUT_S)
    if status != 200:
        raise TimeoutError(f"/server_info: HTTP {status}")
    return facts_of(server, model, (await owned.get("/v1/models"))[1])


async def _tokens(owned: Owned, facts: Facts, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]] | None:
    """The probe's tokens, theirs and ours; None where the engine does not tell."""
    if facts.router:
        return None
    with contextlib.suppress(TimeoutError, ConnectionRefusedError):
        status, told = await owned.post("/tokenize", {"prompt": PROBE, "add_special_tokens": False})
        if status == 200 and isinstance(told.get("tokens"), list):
            return told["tokens"], encode(PROBE)
    return None


def _wanted(config: Config) -> Wanted:
    directory = Path(model_dir(config))
    made: Any = {}
    with contextlib.suppress(OSError, orjson.JSONDecodeError):
        made = orjson.loads((directory / "config.json").read_bytes())
    model_type, architectures = wanted_model(made)
    return Wanted(
        config.model.context_tokens, model_type, architectures, str(directory), config.samples.routed_experts,
        config.session.max_output_tokens, config.engine.stream_interval_tokens,
    )  # fmt: skip
