"""The store replicas of the run, and the view that counts.

Owns which store actors exist and when the view changes. How it changes safely is `checkpoint.view`'s. One change runs
at a time; a replica leaves the view before anything else is done about it, and its replacement joins as a learner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from rollout_ft.checkpoint.journal import journal_names
from rollout_ft.checkpoint.log import Head
from rollout_ft.checkpoint.offline import last_view
from rollout_ft.checkpoint.ports import RayStore, StorePort, resolve
from rollout_ft.checkpoint.records import JournalDamaged
from rollout_ft.checkpoint.view import View, reconfigure, recover_view
from rollout_ft.config import journalled
from rollout_ft.errors import DataLost, Fenced, RolloutFTError, StoreUnavailable
from rollout_ft.fleet.crew import Crew, Gone, Member
from rollout_ft.telemetry.events import Events

PING_S = 1.0
RETRY_PAUSE_S = 0.2
REFILL_PAUSE_S = 5.0
LEARNER_START_S = 60.0
LOAD_TIMEOUT_S = 900.0


class Stores:
    def __init__(self, crew: Crew, namespace: str, events: Events, opened: Callable[[View], Awaitable[None]]):
        self._crew, self._namespace, self._events, self._opened = crew, namespace, events, opened
        self._config = crew.setup.config.store
        self._members: dict[str, Member] = {}
        self._incarnation: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        self.view = View(0, (), self._config.min_replicas)

    async def start(self, existing: list[Member], at_least: int, floor: Mapping[str, int]) -> None:
        """Recovers the view from stores that live, or founds the first one. Raises DataLost."""
        self._incarnation = {role: number for role, number in floor.items() if role.startswith("store-")}
        roles = [f"store-{i}" for i in range(self._config.replicas)]
        for member in existing:
            if member.role in roles:
                self._members[member.name] = member
        if self._members or await self._load_journals(at_least):
            await self._recover(at_least)
        elif at_least:
            raise DataLost(f"view {at_least} was open, and none of its stores and no journal is left")
        else:
            self.view = View(1, tuple(self._crew.name(role, floor.get(role, 0) + 1) for role in roles), self._config.min_replicas)
            for role in roles:
                self._add(role, self.view)
            await asyncio.gather(*(port.ping() for port in self.ports().values()))
        await self._serve()

    async def _recover(self, at_least: int) -> None:
        self.view = await recover_view(self.ports(), at_least=at_least, min_replicas=self._config.min_replicas)
        for name in set(self._members) - set(self.view.members):
            self._members.pop(name).kill()

    async def _serve(self) -> None:
        for name, member in self._members.items():
            self._spawn(self._watch(name, member))
        await self._open(self.view)
        self._spawn(self._refill())

    async def _load_journals(self, at_least: int) -> bool:
        """Starts the replicas of an earlier cluster under their old names; False when there are no journals. Raises
        StoreUnavailable when one cannot be read: it may be the one that knows the last view."""
        try:
            for name in self._journals():
                _, role, incarnation = name.rsplit("/", 2)
                self._members[name] = self._crew.store(role, int(incarnation), None)
            asked = [member.ask("standing", timeout_s=LOAD_TIMEOUT_S) for member in self._members.values()]
            standings = await asyncio.gather(*asked)
        except (Gone, JournalDamaged, ValueError) as e:  # ValueError: an actor of that name is there and does not answer
            self._forget()
            raise StoreUnavailable(f"a journal of the run cannot be loaded: {e}") from e
        if self._members and not at_least and all(standing.blank for standing in standings):
            founded = View(1, tuple(self._members), self._config.min_replicas)  # the run ended before it could begin
            await asyncio.gather(*(port.install(founded) for port in self.ports().values()))
        return bool(self._members)

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

    def ports(self) -> dict[str, StorePort]:
        return {name: resolve(name, self._namespace) for name in self._members}

    def port(self) -> RayStore:
        """Any member of the view: every one has all that was acknowledged."""
        if not self.view.members:
            raise StoreUnavailable("no store replica is left")
        return resolve(self.view.members[0], self._namespace)

    async def lookup(self, trial_id: str) -> Head | None:
        """Where a trial's log ends. Raises StoreUnavailable or TimeoutError."""
        async with asyncio.timeout(self._config.call_timeout_s):
            return await self.port().lookup(trial_id)

    async def release(self, trial_id: str, note: bytes) -> None:
        """Every replica forgets a trial but for `note`. Raises StoreUnavailable: then it may be asked again."""
        try:
            async with asyncio.timeout(self._config.call_timeout_s):
                await asyncio.gather(*(resolve(name, self._namespace).release(trial_id, note) for name in self.view.members))
        except TimeoutError:
            raise StoreUnavailable(f"trial {trial_id} is not released on every replica yet") from None

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

    def _add(self, role: str, view: View | None) -> Member:
        incarnation = self._incarnation[role] = self._incarnation.get(role, 0) + 1
        member = self._crew.store(role, incarnation, view)
        self._members[member.name] = member
        return member

    async def _watch(self, name: str, member: Member) -> None:
        reason = await member.death()
        await self._drop(name, f"actor died: {reason}")

    async def check(self) -> View:
        """The current view, once every member of it has shown that it lives; one that hangs is dropped."""
        silent = [name for name in self.view.members if not await self._answers(name)]
        for name in silent:
            await self._drop(name, "does not answer")
        return self.view

    async def _answers(self, name: str) -> bool:
        for _ in range(2):
            try:
                async with asyncio.timeout(PING_S):
                    await resolve(name, self._namespace).ping()
                return True
            except (TimeoutError, StoreUnavailable):
                continue
        return False

    async def _drop(self, name: str, reason: str) -> None:
        member = self._members.pop(name, None)
        if member is None:
            return
        self._events.emit("store.lost", store=name, reason=reason)
        member.kill()
        async with self._changing:
            while name in self.view.members:
                try:
                    await self._open(await reconfigure(self.view, self.ports(), min_replicas=self._config.min_replicas))
                except StoreUnavailable:
                    await asyncio.sleep(RETRY_PAUSE_S)  # every step is idempotent; commits wait meanwhile
                except (DataLost, Fenced) as e:
                    self._events.emit("store.data_lost", view=self.view.number, reason=str(e))
                    return await self._reload()
        self._spawn(self._refill())

    async def _reload(self) -> None:
        """No replica is left: what is on disk is all there is. Commits wait meanwhile."""
        at_least = self.view.number
        while not self._members and journalled(self._crew.setup.config):
            try:
                await self._load_journals(at_least)
                await self._recover(at_least)
                return await self._serve()
            except (DataLost, StoreUnavailable) as e:
                self._forget()
                self._events.emit("store.reload_failed", reason=str(e))
                await asyncio.sleep(REFILL_PAUSE_S)

    def _forget(self) -> None:
        for member in self._members.values():
            member.kill()
        self._members.clear()

    async def _refill(self) -> None:
        """Brings the view back to its number of replicas, one learner at a time."""
        async with self._changing:
            for i in range(self._config.replicas):
                role = f"store-{i}"
                if any(member.role == role for member in self._members.values()):
                    continue
                member = self._add(role, None)
                try:
                    await member.ask("ping", timeout_s=LEARNER_START_S)
                    view = await reconfigure(self.view, self.ports(), learner=member.name, min_replicas=self._config.min_replicas)
                except (RolloutFTError, ValueError) as e:
                    self._members.pop(member.name, None)
                    member.kill()
                    self._events.emit("store.join_failed", store=member.name, reason=str(e))
                    continue
                await self._open(view)
                if member.name not in view.members:  # it could not be brought up to date
                    self._members.pop(member.name, None)
                    member.kill()
                    self._events.emit("store.join_failed", store=member.name, reason="left out of the view")
                    continue
                self._spawn(self._watch(member.name, member))
        if len({member.role for member in self._members.values()}) < self._config.replicas:
            await asyncio.sleep(REFILL_PAUSE_S)  # a run with one copy less must not stay so
            self._spawn(self._refill())

    async def _open(self, view: View) -> None:
        self.view = view
        self._events.emit("view.opened", number=view.number, members=list(view.members))
        await self._opened(view)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
