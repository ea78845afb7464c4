"""The store replicas of the run, and the view that counts.

Owns which store actors exist and when the view changes. How it changes safely is `checkpoint.view`'s. One change runs
at a time; a replica leaves the view before anything else is done about it, and its replacement joins as a learner. What
brings replicas in never keeps one from leaving: it is broken off, which leaves members frozen until the next view.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from rollout_ft.checkpoint.journal import journal_names
from rollout_ft.checkpoint.log import Head
from rollout_ft.checkpoint.offline import last_view
from rollout_ft.checkpoint.ports import RayStore, StorePort
from rollout_ft.checkpoint.records import JournalDamaged
from rollout_ft.checkpoint.view import View, reconfigure, recover_view
from rollout_ft.config import journalled
from rollout_ft.errors import ConfigError, DataLost, Fenced, RolloutFTError, StoreUnavailable
from rollout_ft.fleet.crew import Crew
from rollout_ft.fleet.member import Gone, Member
from rollout_ft.fleet.pulse import Pulse
from rollout_ft.fleet.spread import Placement, exposed, to_move
from rollout_ft.telemetry.events import Events
from rollout_ft.telemetry.metrics import STORE_EXPOSED, STORE_REPLICAS, Series

RETRY_PAUSE_S = 0.2
REFILL_PAUSE_S = 5.0
MOVE_PAUSE_S = 15.0
START_S = 60.0
LOAD_TIMEOUT_S = 900.0
T = TypeVar("T")


class Stores:
    def __init__(self, crew: Crew, pulse: Pulse, events: Events, opened: Callable[[View], Awaitable[None]]):
        self._crew, self._pulse, self._events, self._opened = crew, pulse, events, opened
        self._config = crew.setup.config.store
        self._members: dict[str, Member] = {}
        self._ports: dict[str, RayStore] = {}
        self._doors: dict[str, str] = {}
        self._incarnation: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._filling: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self.view = View(0, (), self._config.min_replicas)
        self.warning = ""
        """What the placement of the replicas risks; empty while it risks nothing."""

    async def start(self, existing: list[Member], at_least: int, floor: Mapping[str, int]) -> None:
        """Recovers the view from stores that live, or founds the first one. Raises DataLost, ConfigError."""
        self._incarnation = {role: number for role, number in floor.items() if role.startswith("store-")}
        roles = self._roles()
        for member in existing:
            if member.role in roles:
                self._knows(member)
        if self._members or await self._load_journals(at_least):
            await self._recover(at_least)
        elif at_least:
            raise DataLost(f"view {at_least} was open, and none of its stores and no journal is left")
        else:
            await self._found(roles, floor)
        await self._serve()

    async def _recover(self, at_least: int) -> None:
        self.view = await recover_view(self.ports(), at_least=at_least, min_replicas=self._config.min_replicas)
        for name in set(self._members) - set(self.view.members):
            self._forget(name)

    async def _serve(self) -> None:
        await asyncio.gather(*(self._greet(member) for member in self._members.values()))
        for name, member in self._members.items():
            self._spawn(self._watch(name, member))
        await self._open(self.view)
        self._refill()

    async def _found(self, roles: Sequence[str], floor: Mapping[str, int]) -> None:
        if self._config.placement is Placement.DISTINCT:
            nodes = len(await self._crew.nodes.now())
            if nodes < self._config.min_replicas:
                raise ConfigError(
                    f"store.placement distinct: the cluster has {nodes} nodes, and store.min_replicas is {self._config.min_replicas}; "
                    "lower it, or add nodes"
                )
            roles = roles[:nodes]
        self.view = View(1, tuple(self._crew.name(role, floor.get(role, 0) + 1) for role in roles), self._config.min_replicas)
        for role in roles:
            if await self._add(role, self.view) is None:
                raise StoreUnavailable(f"there is no node for {role} any more; start again")

    async def _load_journals(self, at_least: int) -> bool:
        """Starts the replicas of an earlier cluster under their old names; False when there are no journals. Raises
        StoreUnavailable when one cannot be read: it may be the one that knows the last view."""
        loading: list[Member] = []
        try:
            for name in self._journals():
                _, role, incarnation = name.rsplit("/", 2)
                member = await self._crew.store(role, int(incarnation), None)
                if member is None:
                    raise StoreUnavailable(f"there is no node of its own for {name} (store.placement distinct)")
                loading.append(member)
            # Known to the patrol only afterwards: a store that reads its journal does not answer.
            standings = await asyncio.gather(*(member.ask("standing", timeout_s=LOAD_TIMEOUT_S) for member in loading))
        except (Gone, JournalDamaged, StoreUnavailable, ValueError) as e:
            # ValueError: an actor of that name is there and does not answer
            for member in loading:
                self._crew.gone(member)
            raise StoreUnavailable(f"a journal of the run cannot be loaded: {e}") from e
        for member in loading:
            self._knows(member)
        if loading and not at_least and all(standing.blank for standing in standings):
            founded = View(1, tuple(member.name for member in loading), self._config.min_replicas)
            await asyncio.gather(*(port.install(founded) for port in self.ports().values()))  # it ended before it could begin
        return bool(loading)

    def _journals(self) -> list[str]:
        """The members of the last view that have a journal; where none ever was opened, every store that has one. Raises
        JournalDamaged: what cannot be read may be what knows the last view."""
        config = self._crew.setup.config
        where = config.store.journal_dir
        names = [name for name in journal_names(where) if name.startswith(f"{config.run}/store-")] if journalled(config) else []
        for name in names:
            _, role, incarnation = name.rsplit("/", 2)
            self._incarnation[role] = max(self._incarnation.get(role, 0), int(incarnation))
        views = [view for name in names if (view := last_view(where, name))]
        last = max(views, key=lambda view: view.number, default=None)
        return [name for name in names if last is None or name in last.members]

    def members(self) -> list[Member]:
        return list(self._members.values())

    def gauges(self) -> dict[Series, int]:
        view, wanted = self.view, self._config.replicas
        counts = {"in_view": len(view.members), "wanted": wanted, "minimum": view.min_replicas}
        return {**{(STORE_REPLICAS, name): n for name, n in counts.items()}, (STORE_EXPOSED,): int(bool(self.warning))}

    def counted(self) -> list[Member]:
        """The members of the view: those whose silence stops commits."""
        return [member for name, member in self._members.items() if name in self.view.members]

    def ports(self) -> dict[str, StorePort]:
        return dict(self._ports)

    def port(self) -> StorePort:
        """Any member of the view: every one has all that was acknowledged."""
        for name in self.view.members:
            if name in self._ports:
                return self._ports[name]
        raise StoreUnavailable("no store replica is left")

    async def lookup(self, trial_id: str) -> Head | None:
        """Where a trial's log ends, from whichever member of the view says so first. Raises StoreUnavailable or TimeoutError."""
        ports = [self._ports[name] for name in self.view.members if name in self._ports]
        async with asyncio.timeout(self._config.call_timeout_s):
            return await _first([port.lookup(trial_id) for port in ports])

    async def release(self, trial_id: str, note: bytes) -> None:
        """Every replica forgets a trial but for `note`. Raises StoreUnavailable: then it may be asked again."""
        not_yet = StoreUnavailable(f"trial {trial_id} is not released on every replica yet")
        if not self._ports.keys() >= set(self.view.members):
            raise not_yet
        try:
            async with asyncio.timeout(self._config.call_timeout_s):
                await asyncio.gather(*(self._ports[name].release(trial_id, note) for name in self.view.members))
        except TimeoutError:
            raise not_yet from None

    async def note(self, trial_id: str) -> bytes | None:
        """What was said of a trial when it was released. Raises StoreUnavailable or TimeoutError."""
        async with asyncio.timeout(self._config.call_timeout_s):
            return await self.port().note(trial_id)

    async def damage(self, trial_id: str) -> str:
        """Why a trial cannot be read, from whoever cannot."""
        try:
            async with asyncio.timeout(self._config.call_timeout_s):
                await self.port().read(trial_id)
        except (RolloutFTError, TimeoutError) as e:
            return str(e)
        return f"entries of trial {trial_id} are lost"

    # -- who lives ------------------------------------------------------------------------------------------------

    async def check(self) -> View:
        """The current view, once every member of it has shown that it lives; one that does not answer is dropped."""
        await asyncio.gather(*(self.look(member) for member in self.counted()))
        return self.view

    async def look(self, member: Member) -> None:
        if not await self._pulse.beats(member, self._doors.get(member.name, "")):
            await self._drop(member.name, "does not answer", silent=True)

    async def _watch(self, name: str, member: Member) -> None:
        reason = await member.death()
        await self._drop(name, f"actor died: {reason}")

    async def _drop(self, name: str, reason: str, *, silent: bool = False) -> None:
        if name not in self._members:
            return
        self._events.emit("store.lost", store=name, reason=reason)
        self._forget(name, silent=silent)
        broken_off = await self._stop_filling()
        async with self._changing:
            while broken_off or name in self.view.members:
                try:
                    timeout_s = self._config.call_timeout_s
                    view = await reconfigure(self.view, self.ports(), min_replicas=self._config.min_replicas, call_timeout_s=timeout_s)
                    await self._open(view)
                    broken_off = False
                except StoreUnavailable:
                    await asyncio.sleep(RETRY_PAUSE_S)  # every step is idempotent; commits wait meanwhile
                except (DataLost, Fenced) as e:
                    self._events.emit("store.data_lost", view=self.view.number, reason=str(e))
                    return await self._reload()
        self._refill()

    async def _reload(self) -> None:
        """No replica is left: what is on disk is all there is. Commits wait meanwhile."""
        at_least = self.view.number
        while not self._members and journalled(self._crew.setup.config):
            try:
                await self._load_journals(at_least)
                await self._recover(at_least)
                return await self._serve()
            except (DataLost, StoreUnavailable, Gone) as e:
                self._forget_all()
                self._events.emit("store.reload_failed", reason=str(e))
                await asyncio.sleep(REFILL_PAUSE_S)

    # -- filling up -----------------------------------------------------------------------------------------------

    def _refill(self) -> None:
        if self._filling is None or self._filling.done():
            self._filling = asyncio.create_task(self._fill())

    async def _stop_filling(self) -> bool:
        """Whether a change of the view may have been broken off."""
        task = self._filling
        if task is None or task.done() or task is asyncio.current_task():
            return False
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.shield(asyncio.wait({task}))
        return True

    async def _fill(self) -> None:
        """Brings the view to its number of replicas, one learner at a time, and each replica to a node of its own."""
        while True:
            for role in self._missing():
                await self._join(role)
            if self._missing():
                await asyncio.sleep(REFILL_PAUSE_S)  # a run with one copy less must not stay so
            elif not await self._move():
                return

    def _missing(self) -> list[str]:
        return [role for role in self._roles() if all(member.role != role for member in self._members.values())]

    async def _join(self, role: str) -> bool:
        try:
            member = await self._add(role, None)
        except ValueError as e:
            self._events.emit("store.join_failed", store=role, reason=str(e))
            return False
        if member is None:
            return False  # no node that `store.placement` allows
        try:
            await self._greet(member)
            async with self._changing:
                view = await reconfigure(self.view, self.ports(), learner=member.name, min_replicas=self._config.min_replicas)
                await self._open(view)
            if member.name not in view.members:
                raise StoreUnavailable("it could not be brought up to date")
        except (RolloutFTError, ValueError) as e:
            self._forget(member.name, silent=True)
            self._events.emit("store.join_failed", store=member.name, reason=str(e))
            return False
        except asyncio.CancelledError:
            self._forget(member.name)
            raise
        self._spawn(self._watch(member.name, member))
        return True

    async def _move(self) -> bool:
        """Whether replicas share a node where they need not: one is replaced by a learner on a node of its own."""
        stands = self._stands()
        if self._config.placement is not Placement.SPREAD or len(set(stands.values())) == len(stands):
            return False
        name = to_move(stands, await self._crew.nodes.now())
        if name is None:
            await asyncio.sleep(MOVE_PAUSE_S)  # a node may join
        elif await self._join(self._members[name].role):
            self._spawn(self._drop(name, "it moves to a node of its own"))
            return False
        else:
            await asyncio.sleep(REFILL_PAUSE_S)
        return True

    # -- helpers --------------------------------------------------------------------------------------------------

    def _roles(self) -> list[str]:
        return [f"store-{i}" for i in range(self._config.replicas)]

    def _stands(self) -> dict[str, str]:
        return {member.name: self._crew.node_of(member) for member in self.counted()}

    async def _add(self, role: str, view: View | None) -> Member | None:
        self._incarnation[role] = self._incarnation.get(role, 0) + 1
        member = await self._crew.store(role, self._incarnation[role], view)
        if member is None:
            self._incarnation[role] -= 1
        else:
            self._knows(member)
        return member

    async def _greet(self, member: Member) -> None:
        """Waits until it is up, and asks where it is. Raises Gone, or what its start raised."""
        described = await member.ask("describe", timeout_s=START_S)
        self._crew.seen(member, described["node_id"])
        await member.ask("live", self._crew.setup.config.orphan_s, timeout_s=START_S)
        door = await member.ask("door", timeout_s=START_S)
        self._doors[member.name] = f"{door.host}:{door.port}"

    def _knows(self, member: Member) -> None:
        self._members[member.name] = member
        self._ports[member.name] = RayStore(member.name, lambda: member.handle)

    def _forget(self, name: str, *, silent: bool = False) -> None:
        self._ports.pop(name, None)
        self._doors.pop(name, None)
        member = self._members.pop(name, None)
        if member is not None:
            self._crew.gone(member, silent=silent)

    def _forget_all(self) -> None:
        for name in list(self._members):
            self._forget(name)

    async def _open(self, view: View) -> None:
        self.view = view
        stands = self._stands()
        self._events.emit("view.opened", number=view.number, members=list(view.members), nodes=list(stands.values()))
        warning = exposed(stands, journal=journalled(self._crew.setup.config))
        if warning and warning != self.warning:
            self._events.emit("store.exposed", view=view.number, warning=warning)
        self.warning = warning
        await self._opened(view)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _first(calls: Sequence[Coroutine[Any, Any, T]]) -> T:
    """The first answer that is no failure. Raises StoreUnavailable when all fail."""
    if not calls:
        raise StoreUnavailable("no store replica is left")
    tasks = {asyncio.create_task(call) for call in calls}
    open_, failure = set(tasks), StoreUnavailable("no store replica answers")
    try:
        while open_:
            done, open_ = await asyncio.wait(open_, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                error = task.exception()
                if error is None:
                    return task.result()
                if not isinstance(error, StoreUnavailable):
                    raise error
                failure = error
        raise failure
    finally:
        for task in tasks:
            task.cancel()
            task.add_done_callback(lambda t: t.cancelled() or t.exception())
