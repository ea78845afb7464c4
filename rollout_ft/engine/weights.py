"""The weights that one engine has, and whether it may generate with them.

Owns what an order of the trainer means at this engine, one order after another, and the gate's reasons that follow from
it. Knows nothing of other engines. Orders are safe to repeat: one that is being carried out is joined, and what is there
already is not done again. An engine is stale until a whole update has succeeded, whatever its name for its weights.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rollout_ft.engine.control import Control
from rollout_ft.engine.gate import Closed, Gate
from rollout_ft.engine.port import Engine
from rollout_ft.errors import EngineLost, EngineRefused
from rollout_ft.fleet.weights import FIRST, MEMORY, Command, Op, Weights, remedy
from rollout_ft.types import JSON

FLUSH_PAUSE_S = 0.1
SETTLE_S = 10.0
LOADING = frozenset({Op.BEGIN, Op.LOAD, Op.END, Op.UPDATE, Op.NAME})
"""What leaves an engine with nobody knows which weights when it fails."""
_BRACKETED = {"tensor", "distributed"}
PATHS = {how: f"/update_weights_from_{how}" for how in ("disk", "tensor", "distributed", "ipc")}


@dataclass(slots=True)
class _Bracket:
    """An update in parts: which came, and what went wrong."""

    parts: set[str] = field(default_factory=set[str])
    failed: str = ""


class EngineWeights:
    """`tell` is told what changed, as an event."""

    def __init__(self, engine: Engine, control: Control, gate: Gate, tell: Callable[..., None]):
        self._engine, self._control, self._gate, self._tell = engine, control, gate, tell
        self.fleet = Weights()
        self.version = ""
        self.stale = ""
        """Why it must not serve with the weights that it has."""
        self._released: frozenset[str] = frozenset()
        self._halted = ""
        """The mode in which the engine itself is paused; `?` while nobody knows."""
        self._bracket: _Bracket | None = None
        self._updated = self._loading = False
        self._goes_on: JSON = {}
        self._doing: dict[str, asyncio.Task[JSON]] = {}
        self._one = asyncio.Lock()

    async def start(self) -> None:
        """Raises EngineLost."""
        self.version = (await self._engine.info()).weight_version

    def describe(self) -> JSON:
        offloaded = bool(self._released or self.fleet.released)
        return {
            "version": self.version, "stale": self.stale, "offloaded": offloaded, "released": sorted(self._released), "fleet": self.fleet
        }  # fmt: skip

    async def carry_out(self, command: Command, fleet: Weights, timeout_s: float) -> JSON:
        """Does what the order says; `fleet` is what then holds. `{ok, error, hung, version, stale, offloaded, released}`.

        `hung`: the engine itself did not answer in time."""
        task = self._doing.get(command.key)
        if task is None:
            task = self._doing[command.key] = asyncio.create_task(self._in_turn(command, fleet, timeout_s))
            task.add_done_callback(lambda _: self._doing.pop(command.key, None))
        return await asyncio.shield(task)

    async def _in_turn(self, command: Command, fleet: Weights, timeout_s: float) -> JSON:
        error, hung, was = "", False, self.stale
        if command.op in FIRST:  # whoever is in front of it in the queue: nothing more begins
            self._adopt(fleet)
            self._shut()
        try:
            async with asyncio.timeout(timeout_s):
                async with self._one:
                    hung = True
                    await self._do(command)
                    hung = False
            self._adopt(fleet)
        except (EngineRefused, EngineLost) as e:
            error, hung = str(e), False
        except TimeoutError:
            error = f"no answer within {timeout_s:g} s" + ("" if hung else ": it is busy with an order before this one")
        if error and command.op in LOADING and not (command.op is Op.NAME and self.stale):
            self._missed(f"{command.op} {command.version or command.path}: {error}")
        self._compare()
        error = await self._settle() or error
        if self.stale and not was:
            self._tell("weights.missed", reason=self.stale, remedy=remedy(self.fleet, bool(self._released)))
        told = {"ok": not error, "error": error, "hung": hung, **self.describe()}
        del told["fleet"]
        return told

    async def _do(self, command: Command) -> None:
        match command.op:
            case Op.LEARN:
                await self._learn()
            case Op.PAUSE:
                await self._halt(command.mode)
            case Op.RESUME:
                self._goes_on = command.body
            case Op.UPDATE:
                await self._update(command)
            case Op.BEGIN:
                await self._begin(command.body)
            case Op.LOAD:
                await self._load(command)
            case Op.END:
                await self._end()
            case Op.NAME:
                await self._name(command)
            case Op.OFFLOAD:
                await self._release(command.tags)
            case Op.ONLOAD:
                await self._restore(command.tags)
            case Op.FORWARD:
                await self._control.send(command.path, command.body)

    # -- standing still -------------------------------------------------------------------------------------------

    async def _halt(self, mode: str) -> None:
        if not self._control.ours or self._halted == mode:
            return
        if self._halted == "in_place" and mode == "abort":
            await self._pause("retract")  # a frozen engine never ends what is to be aborted
        await self._pause(mode)

    async def _pause(self, mode: str) -> None:
        self._halted = "?"
        await self._control.send("/pause_generation", {"mode": mode})
        self._halted = mode

    async def _settle(self) -> str:
        """Opens the gate if nothing keeps it closed any more, and lets the engine go on before that. What went wrong.

        An engine that does not answer is let in on all the same: with its deadlines running it is found out."""
        error = ""
        try:
            async with asyncio.timeout(SETTLE_S):
                if self._halted and not self._reasons():
                    self._halted, goes_on = "", self._goes_on
                    await self._control.send("/continue_generation", goes_on)
                elif self._halted == "in_place" and not self.fleet.mode:
                    await self._halt("retract")  # it stays behind: what is frozen in it would keep its cache from being flushed
        except (EngineRefused, EngineLost, TimeoutError) as e:
            error = f"to go on: {str(e) or type(e).__name__}"
        self._shut()
        for why in (Closed.PAUSED, Closed.OFFLOADED, Closed.STALE, Closed.UPDATING):
            if why not in self._reasons():
                self._gate.open(why)
        return error

    def _shut(self) -> None:
        for why in self._reasons():
            self._gate.close(why)

    def _reasons(self) -> set[Closed]:
        reasons = {
            Closed.PAUSED: self.fleet.mode, Closed.OFFLOADED: self._released or self.fleet.released, Closed.STALE: self.stale,
            Closed.UPDATING: self._loading or self._bracket or self.fleet.begun,
        }  # fmt: skip
        return {why for why, holds in reasons.items() if holds}

    # -- weights --------------------------------------------------------------------------------------------------

    async def _learn(self) -> None:
        """Where the fleet is, for an engine that joins it or whose supervisor is new."""
        self.version = (await self._engine.info()).weight_version
        if self.fleet.begun and self._bracket is None:
            self._missed("it joined in the middle of an update")
        if self.fleet.released:
            await self._release(self.fleet.released)

    def _adopt(self, fleet: Weights) -> None:
        if fleet.revision >= self.fleet.revision:
            self.fleet = fleet

    def _compare(self) -> None:
        """What the fleet has come to without this engine."""
        if self.stale or (not self._control.ours and not self.fleet.version):
            return
        if self.fleet.version and self.version != self.fleet.version:
            self._missed(f"it has {self.version!r}, the fleet {self.fleet.version!r}")
        elif self._control.ours and self.fleet.source is not None and not self._updated:
            self._missed("it started with the weights of its command line, and the fleet was updated since")

    def _missed(self, reason: str) -> None:
        self.stale = reason

    async def _update(self, command: Command) -> None:
        if not command.again and command.version == self.version and not self.stale and not self._released:
            self._updated = True
            return
        self._loading = True
        self._shut()
        try:
            if command.how != "external":
                await self._memory_for(command)
                await self._push(command)
            await self._look(command.version)
            if command.how == "external":
                self._released = frozenset()
        finally:
            self._loading = False
        self._whole()

    async def _push(self, command: Command) -> None:
        body = command.body
        if command.whole:  # a cache cannot be flushed while it is in use
            body = {"flush_cache": self._halted != "in_place", **body}
        if command.how not in _BRACKETED:
            await self._control.send(command.path, body)
            return
        if self._bracket is not None:
            raise EngineRefused(409, "an update in parts has begun: /end_weight_update first")
        bracketed = await self._open({})
        try:
            await self._control.send(command.path, body)
        finally:
            if bracketed and not _cancelled():
                await self._control.send("/end_weight_update", {})

    async def _open(self, body: JSON) -> bool:
        """False for an engine that knows no brackets; one that was left open is closed first."""
        try:
            await self._control.send("/begin_weight_update", body)
        except EngineRefused as e:
            if e.status == 404:
                return False
            if "already open" not in e.message:
                raise
            await self._control.send("/end_weight_update", {})
            await self._control.send("/begin_weight_update", body)
        return True

    async def _begin(self, body: JSON) -> None:
        if self._bracket is None:
            await self._open(body)
            self._bracket = _Bracket()

    async def _load(self, command: Command) -> None:
        bracket = self._bracket
        if bracket is not None and command.key in bracket.parts:
            return
        try:
            await self._memory_for(command)
            await self._control.send(command.path, command.body)
            await self._look(command.version)
        except (EngineRefused, EngineLost) as e:
            if bracket is not None:
                bracket.failed = str(e)
            raise
        if bracket is None:
            self._whole()
        else:
            bracket.parts.add(command.key)

    async def _end(self) -> None:
        bracket, self._bracket = self._bracket, None
        if bracket is None:
            return
        try:
            await self._control.send("/end_weight_update", {})
        except EngineRefused as e:
            if e.status != 404:
                raise
        await self._look("")
        if bracket.failed:
            raise EngineRefused(409, f"a part of the update failed ({bracket.failed})")
        if bracket.parts:
            self._whole()

    async def _name(self, command: Command) -> None:
        if self.stale:
            raise EngineRefused(409, f"not named, for it is stale: {self.stale}")
        if command.version == self.version:
            return
        self._loading = True
        self._shut()
        try:
            await self._control.send("/update_weight_version", command.body)
            await self._look(command.version)
            self._updated = True
        finally:
            self._loading = False

    async def _look(self, version: str) -> None:
        """What the engine itself says it has."""
        self.version = (await self._engine.info()).weight_version
        if version and self.version != version:
            raise EngineRefused(409, f"/model_info says {self.version!r}, not {version!r}")

    def _whole(self) -> None:
        self.stale, self._updated = "", True
        self._tell("weights.loaded", version=self.version)

    # -- memory ---------------------------------------------------------------------------------------------------

    async def _memory_for(self, command: Command) -> None:
        if command.whole and self._released:
            await self._restore(())
        if "weights" in self._released:
            raise EngineRefused(409, "its memory was released: /resume_memory_occupation first")

    async def _release(self, tags: tuple[str, ...]) -> None:
        """SGLang dies of a release while it computes: it is paused, and seen to be idle, before."""
        wanted = {*(tags or MEMORY)} - self._released
        if not wanted or not self._control.ours:
            return
        if self._halted not in ("abort", "retract"):
            await self._halt("retract")
        await self._idle()
        await self._control.send("/release_memory_occupation", _tags(wanted))
        self._released |= wanted
        if "weights" in wanted:
            self._missed("its memory was released, and no weights were loaded since")

    async def _idle(self) -> None:
        while True:
            try:
                await self._control.send("/flush_cache", {})
                return
            except EngineRefused as e:
                if e.status == 404:
                    return
            await asyncio.sleep(FLUSH_PAUSE_S)

    async def _restore(self, tags: tuple[str, ...]) -> None:
        """Only what was released: SGLang dies of more."""
        back = self._released & {*(tags or MEMORY)}
        if back:
            await self._control.send("/resume_memory_occupation", _tags(back))
            self._released -= back


def _tags(tags: frozenset[str] | set[str]) -> JSON:
    """Without any SGLang takes all that it knows."""
    return {} if tags == {*MEMORY} else {"tags": sorted(tags)}


def _cancelled() -> bool:
    task: asyncio.Task[Any] | None = asyncio.current_task()
    return task is not None and task.cancelling() > 0
