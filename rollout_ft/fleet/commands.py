"""The trainer's commands, carried out by every engine.

Owns the fleet's weights as the trainer left them, and the order of the commands: one at a time, the same one twice is one.
Decides nothing about an engine: each says itself what became of a command. An engine that is dead or does not answer is
reported and holds nobody up; what it missed it is told when it joins again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, Protocol

from rollout_ft.clock import wall
from rollout_ft.config import FleetConfig
from rollout_ft.errors import BadRequest
from rollout_ft.fleet.health import Health
from rollout_ft.fleet.member import Gone, Member
from rollout_ft.fleet.weights import FIRST, Command, Op, Phase, Weights, after, for_engine, remedy
from rollout_ft.telemetry.events import Events
from rollout_ft.types import JSON

CATCH_UPS = 3
CATCH_UP_PAUSE_S = 2.0
MARGIN_S = 15.0
"""For an engine's actor to report that its engine did not answer in time."""


class Ordered(Protocol):
    """An engine, as far as its weights are concerned."""

    engine_id: str
    health: Health
    member: Member | None
    stale: str
    released: bool


class Commands:
    """`engines` are all there are, `told` hears what each says of itself, `hung` of one that did not answer an update, `settled`
    when all have said what there is to say."""

    def __init__(
        self, config: FleetConfig, events: Events, engines: Callable[[], Collection[Ordered]],
        told: Callable[[Any, Member, JSON], None], hung: Callable[[str, int, str], None], settled: Callable[[], None],
    ):  # fmt: skip
        self._config, self._events, self._engines, self._told, self._hung = config, events, engines, told, hung
        self._settled = settled
        self.weights = Weights()
        self._one = asyncio.Lock()
        self._doing: dict[str, asyncio.Task[JSON]] = {}
        self._catching_up: set[tuple[str, int]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ours = asyncio.Event()
        self._ours.set()
        self._watch: asyncio.Task[None] | None = None

    def restore(self, weights: Weights) -> None:
        """What the engines remember."""
        self._become(weights)

    async def memory_is_ours(self) -> None:
        """Returns when no trainer has the engines' memory: nothing can be started in it before."""
        await self._ours.wait()

    async def carry_out(self, command: Command) -> JSON:
        """`{ok, engines: {engine_id: {ok, error, …}}, weights}`. Raises BadRequest when no engine did it: 503 if none could be
        reached, else 409."""
        task = self._doing.get(command.key)
        if task is None:
            task = self._doing[command.key] = asyncio.create_task(self._in_turn(command))
            task.add_done_callback(lambda _: self._doing.pop(command.key, None))
        return await asyncio.shield(task)

    async def join(self, engine: Ordered, member: Member) -> None:
        """Tells an engine that came up where the fleet is, after whatever the others are being told. Raises Gone."""
        async with self._one:
            if not self.weights.versions:
                version = (await member.ask("describe", timeout_s=self._config.order_timeout_s))["weights"]["version"]
                self._become(replace(self.weights, versions=(version,), revision=self.weights.revision + 1))
            told = await self._ask(member, Command(Op.LEARN), self.weights, self._config.order_timeout_s)
        if not told["ok"]:
            raise Gone(f"{member.name}: {told['error']}")
        self._told(engine, member, told)
        self._settled()
        self._catch_up_all([engine])

    async def look_again(self, engine: Ordered, member: Member) -> None:
        """Somebody else gave an engine other weights: it says what it has, and is stale or not for it."""
        async with self._one:
            external = Command(Op.UPDATE, self.weights.version, "external", again=True)
            command = external if engine.stale else Command(Op.LEARN)
            await self._one_engine(engine, member, command, self.weights, self._config.order_timeout_s)
        self._settled()

    # -- one command ------------------------------------------------------------------------------------------------

    async def _in_turn(self, command: Command) -> JSON:
        async with self._one:
            then = after(self.weights, command, wall())
            if command.op in FIRST:
                self._become(then)
            there = [(e, e.member) for e in self._engines() if e.member is not None and e.health.lives]
            absent = {e.engine_id: {"ok": False, "error": f"{e.health.state}: {e.health.reason}"} for e in self._engines()}
            try:
                sent = [for_engine(command, i, len(there)) for i in range(len(there))]
            except ValueError as e:
                raise BadRequest(str(e), param="world_size") from None
            timeout_s = self._config.update_timeout_s if command.op in _LONG else self._config.order_timeout_s
            reports = await asyncio.gather(*(self._one_engine(*at, each, then, timeout_s) for at, each in zip(there, sent, strict=True)))
            engines = absent | dict(reports)
            if any(report["ok"] for report in engines.values()):
                self._become(then)
            self._events.emit("fleet.ordered", op=command.op.value, version=command.version, phase=self.weights.phase.value,
                              failed=sorted(i for i, report in engines.items() if not report["ok"]))  # fmt: skip
        self._settled()
        if command.op in _COMPLETE:
            self._catch_up_all(self._engines())
        return self._answer(command, engines)

    async def _one_engine(self, engine: Ordered, member: Member, command: Command, then: Weights, timeout_s: float) -> tuple[str, JSON]:
        try:
            report = await self._ask(member, command, then, timeout_s)
        except Exception as e:  # whatever it is, the other engines have done it
            return engine.engine_id, {"ok": False, "error": str(e)}
        if engine.member is member:
            self._told(engine, member, report)
            if report["hung"] and command.op in _LONG:
                self._hung(engine.engine_id, member.incarnation, report["error"])
        return engine.engine_id, {k: report[k] for k in ("ok", "error", "version", "stale", "released")}

    async def _ask(self, member: Member, command: Command, then: Weights, timeout_s: float) -> JSON:
        return await member.ask("carry_out", command, then, timeout_s, timeout_s=timeout_s + MARGIN_S)

    def _answer(self, command: Command, engines: JSON) -> JSON:
        if any(report["ok"] for report in engines.values()):
            return {"ok": True, "engines": engines, "weights": self.weights.describe(wall())}
        said = "; ".join(f"{i}: {report['error']}" for i, report in engines.items())
        reached = any("version" in report for report in engines.values())
        message = f"no engine did it ({command.op} {command.version or command.path}): {said}"
        raise BadRequest(message, 409 if reached else 503, "order_failed" if reached else "unavailable")

    # -- engines that missed something ----------------------------------------------------------------------------

    def _catch_up_all(self, engines: Collection[Ordered]) -> None:
        """Weights that came from a disk are loaded again by whoever missed them; for others there is nothing to send."""
        source = self.weights.source
        if source is None or source.how != "disk" or self.weights.begun or self.weights.released:
            return
        for engine in engines:
            which = (engine.engine_id, engine.health.incarnation)
            if engine.member is not None and engine.health.lives and engine.stale and which not in self._catching_up:
                self._catching_up.add(which)
                task = asyncio.create_task(self._catch_up(engine, engine.member))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                task.add_done_callback(lambda _, which=which: self._catching_up.discard(which))

    async def _catch_up(self, engine: Ordered, member: Member) -> None:
        for attempt in range(CATCH_UPS):
            weights, source = self.weights, self.weights.source
            if source is None or source.how != "disk" or engine.member is not member or not engine.stale:
                return
            await asyncio.sleep(attempt * CATCH_UP_PAUSE_S)
            command = replace(source, version=weights.version, again=True)
            _, report = await self._one_engine(engine, member, command, weights, self._config.update_timeout_s)
            if report["ok"]:
                return self._settled()
        self._events.emit("engine.stays_stale", engine=engine.engine_id, reason=engine.stale, remedy="repeat the update, or name another")

    # -- the state ------------------------------------------------------------------------------------------------

    def warnings(self) -> list[str]:
        stale = [
            f"{e.engine_id} is stale and serves nothing ({e.stale}): {remedy(self.weights, e.released)}" for e in self._engines() if e.stale
        ]
        since = self.weights.still_since
        if since is not None and wall() - since > self._config.max_pause_s:
            stale.append(_overdue(self.weights, wall() - since))
        return stale

    def _become(self, weights: Weights) -> None:
        self.weights = weights
        if weights.released:
            self._ours.clear()
        else:
            self._ours.set()
        if weights.phase is Phase.SERVING and self._watch is not None:
            self._watch.cancel()
            self._watch = None
        elif weights.phase is not Phase.SERVING and self._watch is None:
            self._watch = asyncio.create_task(self._watch_pause())

    async def _watch_pause(self) -> None:
        """Says so when a pause goes on for too long. It is not ended: somebody may believe that the engines stand still."""
        while self.weights.still_since is not None:
            length_s = wall() - self.weights.still_since
            if length_s >= self._config.max_pause_s:
                self._events.emit("fleet.pause_overdue", phase=self.weights.phase.value, message=_overdue(self.weights, length_s))
                length_s = 0
            await asyncio.sleep(self._config.max_pause_s - length_s)


_LONG = frozenset({Op.UPDATE, Op.LOAD})
_COMPLETE = frozenset({Op.UPDATE, Op.END, Op.RESUME})
"""After these whoever has no weights missed them; before, a trainer that gives memory back is about to send new ones."""


def _overdue(weights: Weights, length_s: float) -> str:
    end = "load weights" if weights.released else "POST /fleet/resume"
    return f"the fleet has been {weights.phase} for {length_s:.0f} s (fleet.max_pause_s): if the trainer is gone, {end} ends it"
