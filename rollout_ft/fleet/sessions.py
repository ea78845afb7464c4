"""Where each session is, and how it gets to another engine.

Owns the owner epochs and the attempts. Knows nothing of engines' health or of what a session contains. A session moves
only when somebody asks for it: the next owner fences the one before it in the store, then reads, then serves; nothing
is done for sessions that nobody asks for.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import orjson

from rollout_ft.checkpoint.log import Head
from rollout_ft.clock import wall
from rollout_ft.errors import BadRequest, Fenced, SessionClosed, SessionMoved, StoreUnavailable
from rollout_ft.fleet.engines import Engine, Engines
from rollout_ft.fleet.member import Gone
from rollout_ft.fleet.placement import place
from rollout_ft.fleet.register import Register
from rollout_ft.fleet.stores import Stores
from rollout_ft.telemetry.account import end_of
from rollout_ft.telemetry.events import Events
from rollout_ft.telemetry.losses import Loss
from rollout_ft.telemetry.moments import Moment
from rollout_ft.types import JSON, UNSAID, Ended, Outcome, SessionSpec, Why, session_id, split_session_id

ADOPT_TIMEOUT_S = 15.0
HOLDS_TIMEOUT_S = 1.0
TRIES = 4
MAX_ENDED = 1024
"""Summaries of trials that have just ended: a trial is released soon, and need not be read again for it."""
MAX_READ = 16
"""Trials whose moments are kept for who looks again."""
MAX_NOTE_BYTES = 4096
"""Of the summary that is left of a trial; its parts are small unless its `cause` is long."""


@dataclass(slots=True)
class Place:
    engine_id: str
    incarnation: int


class Sessions:
    def __init__(self, engines: Engines, stores: Stores, events: Events):
        self._engines, self._stores, self._events = engines, stores, events
        self._places: dict[str, Place] = {}
        self._ended: dict[str, JSON] = {}
        self.register = Register()
        self._read: dict[str, tuple[int, Sequence[Moment]]] = {}
        self._coming: Counter[str] = Counter()
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def restore(self, held: dict[str, dict[str, int]]) -> None:
        """What the engines that live say they hold; of two that claim a session, the one with the higher epoch does."""
        epochs: dict[str, int] = {}
        for engine_id, claimed in held.items():
            incarnation = self._engines.by_id[engine_id].health.incarnation
            for sid, epoch in claimed.items():
                if epoch > epochs.get(sid, 0):
                    epochs[sid], self._places[sid] = epoch, Place(engine_id, incarnation)

    def count(self) -> int:
        return len(self._places)

    def held(self) -> Counter[str]:
        """How many sessions each engine has; those of an engine that is lost are there until somebody asks for them."""
        return Counter(at.engine_id for at in self._places.values())

    def places(self) -> dict[str, str]:
        """Session id → engine; that of an engine that is lost as well, until somebody asks for it."""
        return {sid: at.engine_id for sid, at in self._places.items()}

    async def locate(self, sid: str, failed: tuple[str, int] | None = None) -> JSON:
        """`{state: owned, url, engine_id, incarnation}`, `{state: closed, message}` or `{state: unavailable, message}`."""
        async with self._lock(sid):
            at = self._places.get(sid)
            if at is not None:
                engine = self._serving(at)
                sure = engine is not None and failed != (at.engine_id, at.incarnation) and not engine.draining
                if engine is not None and (sure or (await self._holds(engine, sid) and self._serving(at))):
                    return _owned(engine)
            return await self._move(sid, at)

    async def open(self, spec: SessionSpec, resume: bool) -> JSON:
        """The first attempt of a trial, or its present one when the same request came before. Raises BadRequest."""
        async with self._lock(spec.trial_id):
            head = await self._head(spec.trial_id)
            if head is not None and (head.length or head.damaged):
                return await self._known_trial(spec, resume, head.attempt)
            opened = await self._start_attempt(spec.trial_id, 1, spec, UNSAID, resume=False, prefer="")
            self.register.opened(spec)
            self._events.emit(
                "trial.opened", trial=spec.trial_id, task=spec.task_id, group=spec.group_id, mode=spec.mode, pool=spec.pool,
                engine=self._places[opened["session_id"]].engine_id,
            )  # fmt: skip
            return opened

    async def _known_trial(self, spec: SessionSpec, resume: bool, attempt: int) -> JSON:
        trial = await self.read(spec.trial_id)
        if trial["state"] != "running":
            raise BadRequest(f"trial {spec.trial_id} has ended ({trial['outcome']}); use another trial_id", 409, "trial_ended")
        if resume:
            return await self._next_attempt(spec.trial_id, attempt, True, Why("resumed", "opened with resume: true"))
        if spec.idempotency_key and trial["idempotency_key"] == spec.idempotency_key:
            return _opened(trial)
        raise BadRequest(f"trial {spec.trial_id} exists; pass resume: true to go on from its checkpoint", 409, "trial_exists", "trial_id")

    async def restart(self, trial_id: str, from_attempt: int, resume: bool, why: Why) -> JSON:
        """The attempt after `from_attempt`; asked twice, the same one. Raises BadRequest."""
        async with self._lock(trial_id):
            head = await self._known(trial_id)
            if head.released:
                raise BadRequest(f"trial {trial_id} has ended and was released; use another trial_id", 409, "trial_ended")
            if head.attempt == from_attempt + 1:
                trial = await self.read(trial_id)
                if trial["attempt"] == head.attempt:
                    return _opened(trial)
            elif head.attempt != from_attempt:
                raise BadRequest(
                    f"trial {trial_id} is at attempt {head.attempt}, not {from_attempt}: somebody else restarted it", 409, "stale_attempt"
                )
            return await self._next_attempt(trial_id, from_attempt, resume, why)

    async def _next_attempt(self, trial_id: str, attempt: int, resume: bool, why: Why) -> JSON:
        old = session_id(trial_id, attempt)
        at = self._places.pop(old, None)
        engine = self._serving(at) if at else None
        if engine is not None and engine.member is not None:
            try:
                await engine.member.ask("retire", old, timeout_s=ADOPT_TIMEOUT_S)
            except Gone:
                engine = None
        opened = await self._start_attempt(trial_id, attempt + 1, None, why, resume, engine.engine_id if engine else "")
        self.register.restarted(trial_id, attempt + 1)
        self._events.emit(
            "trial.restarted", trial=trial_id, attempt=attempt + 1, checkpoint=resume, turns=opened["turns"],
            engine=self._places[opened["session_id"]].engine_id, reason=why.reason, cause=why.cause,
        )  # fmt: skip
        return opened

    async def end(self, trial_id: str, attempt: int | None, outcome: Outcome, reward: float | None, cause: str) -> JSON:
        """Records how a trial ended. The same end again is a success, another is a 409."""
        head = await self._known(trial_id)
        if attempt is not None and head.attempt != attempt:
            raise BadRequest(f"attempt {attempt} of trial {trial_id} was replaced by {head.attempt}", 409, "stale_attempt")
        sid = session_id(trial_id, head.attempt)
        ended = Ended(outcome, reward, cause, int(wall()))
        for _ in range(TRIES):
            place = await self.locate(sid)
            if place["state"] == "closed":
                self._places.pop(sid, None)
                break
            if place["state"] == "unavailable":
                raise BadRequest(place["message"], 503, "unavailable")
            member = self._engines.by_id[place["engine_id"]].member
            try:
                assert member is not None
                result = await member.ask("end", sid, ended, timeout_s=ADOPT_TIMEOUT_S)
            except (Gone, SessionMoved):
                await self.locate(sid, (place["engine_id"], place["incarnation"]))
                continue
            except SessionClosed:
                break
            self._places.pop(sid, None)
            self._over(result)
            return result
        trial = await self.read(trial_id)
        if trial["state"] != "running" and trial["outcome"] == outcome.value and trial["reward"] == reward:
            if trial["state"] == "ended":  # who recorded it may have ended before it could say so
                self._over(trial)
            return trial
        raise BadRequest(f"trial {trial_id} is {trial['state']} ({trial['outcome']})", 409, "trial_ended")

    def _over(self, trial: JSON) -> None:
        """The store has a trial's end. Told once, whoever asks again."""
        trial_id, known = trial["trial_id"], trial["trial_id"] in self._ended
        self._ended[trial_id] = trial
        self.register.ended(trial)
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]
        if not known:
            self._events.emit("trial.ended", **end_of(trial))

    async def read(self, trial_id: str) -> JSON:
        """A trial's summary: from its owner when it has one, else from the store. Raises BadRequest (404, 409, 503)."""
        head = await self._known(trial_id)
        if head.released:
            return await self._released(trial_id, head)
        sid = session_id(trial_id, head.attempt)
        at = self._places.get(sid)
        engine = self._serving(at) if at else None
        if engine is not None and engine.member is not None:
            try:
                return await engine.member.ask("summary", sid, timeout_s=ADOPT_TIMEOUT_S)
            except (Gone, SessionMoved):
                pass
        return await self._any_engine("read", trial_id)

    async def moments(self, trial_id: str) -> Sequence[Moment]:
        """What a trial's checkpoint has of it; of one that was released nothing is left. Read again only when its log has grown."""
        head = await self._known(trial_id)
        length, made = self._read.pop(trial_id, (0, ()))
        if head.length != length and not head.released:
            try:
                length, made = head.length, await self._any_engine("moments", trial_id)
            except SessionClosed:
                length, made = 0, ()
        self._read[trial_id] = length, made
        if len(self._read) > MAX_READ:
            del self._read[next(iter(self._read))]
        return made

    async def read_session(self, sid: str, what: str) -> bytes:
        trial_id, _ = split_session_id(sid) or ("", 0)
        try:
            return await self._any_engine("read_session", trial_id, what)
        except SessionClosed as e:
            head = await self._head(trial_id)
            if head is not None and head.released:
                raise BadRequest(f"trial {trial_id} was collected and released", 404, "released") from e
            raise BadRequest(str(e), 404, "unknown_session") from e

    async def release(self, trial_id: str) -> JSON:
        """The stores forget a trial that has ended, but for its summary; whoever asks has what it wants of it. Idempotent."""
        trial = self._ended.pop(trial_id, None) or await self.read(trial_id)
        if trial["state"] == "running":
            raise BadRequest(f"trial {trial_id} is running: give it an outcome, or delete its session, first", 409, "trial_running")
        if trial["state"] == "ended":
            trial = {**trial, "state": "released"}
            note = orjson.dumps(trial)
            try:
                await self._stores.release(trial_id, note if len(note) <= MAX_NOTE_BYTES else b"")
            except StoreUnavailable as e:
                raise BadRequest(str(e), 503, "unavailable") from e
            self.register.released(trial_id)
            self._events.emit("trial.released", trial=trial_id)
        return trial

    async def _released(self, trial_id: str, head: Head) -> JSON:
        try:
            note = await self._stores.note(trial_id)
        except (StoreUnavailable, TimeoutError) as e:
            raise BadRequest(f"the checkpoint store does not answer: {e}", 503, "store_unavailable") from e
        bare = {"trial_id": trial_id, "session_id": session_id(trial_id, head.attempt), "attempt": head.attempt, "turns": 0}
        return orjson.loads(note) if note else {**bare, "state": "released", "outcome": None, "reward": None, "cause": "", "metadata": {}}

    async def _known(self, trial_id: str) -> Head:
        """Raises BadRequest for a trial that nobody knows (404), or of which entries are lost (409)."""
        head = await self._head(trial_id)
        if head is None or not (head.length or head.damaged):
            raise BadRequest(f"trial {trial_id} is not known", 404, "unknown_trial")
        if head.damaged:
            raise BadRequest(await self._stores.damage(trial_id), 409, "trial_damaged")
        return head

    # -- moving ---------------------------------------------------------------------------------------------------

    async def _move(self, sid: str, at: Place | None) -> JSON:
        trial_id, attempt = split_session_id(sid) or ("", 0)
        head = await self._head(trial_id)
        if head is None or not head.length:
            return {"state": "closed", "message": f"session {sid} is not known"}
        if head.attempt != attempt:
            return {"state": "closed", "message": f"attempt {attempt} of trial {trial_id} was replaced by {head.attempt}"}
        if head.released:
            return {"state": "closed", "message": f"trial {trial_id} has ended and was released"}
        if head.damaged:
            return {"state": "closed", "message": await self._stores.damage(trial_id)}
        epoch, exclude = head.owner_epoch, set[str]()
        loss = self._engines.loss(at.engine_id, at.incarnation) if at else Loss()
        message = "no engine can serve just now"
        for _ in range(TRIES):
            epoch += 1
            engine = self._choose(prefer=at.engine_id if at else "", exclude=exclude)
            if engine is None or engine.member is None:
                break
            there = Place(engine.engine_id, engine.health.incarnation)
            self._coming[engine.engine_id] += 1
            try:
                await engine.member.ask("adopt", sid, epoch, loss, timeout_s=ADOPT_TIMEOUT_S)
            except SessionClosed as e:
                return {"state": "closed", "message": str(e)}
            except Fenced as e:
                epoch = max(epoch, e.current)
                continue
            except (Gone, StoreUnavailable) as e:
                exclude.add(engine.engine_id)
                message = str(e)
                continue
            finally:
                self._coming[engine.engine_id] -= 1
            if self._serving(there) is None:  # it was lost while it adopted, and has no address any more
                exclude.add(engine.engine_id)
                continue
            self._places[sid] = there
            self._events.emit("session.moved", session=sid, engine=engine.engine_id, epoch=epoch, source_engine=at.engine_id if at else "")
            return _owned(engine)
        return {"state": "unavailable", "message": message}

    async def _start_attempt(
        self, trial_id: str, attempt: int, spec: SessionSpec | None, why: Why, resume: bool, prefer: str
    ) -> JSON:  # fmt: skip
        """Opens an attempt, also one that was fenced for and whose opening failed half-way."""
        head, exclude = await self._head(trial_id), set[str]()
        epoch = head.owner_epoch if head is not None and head.attempt == attempt else 0
        for _ in range(TRIES):
            epoch += 1
            engine = self._choose(prefer, exclude)
            if engine is None or engine.member is None:
                break
            there = Place(engine.engine_id, engine.health.incarnation)
            self._coming[engine.engine_id] += 1
            try:
                opened = await engine.member.ask("open", trial_id, attempt, epoch, spec, resume, why, timeout_s=ADOPT_TIMEOUT_S)
            except SessionClosed as e:
                raise BadRequest(str(e), 409, "trial_ended") from e
            except (Gone, StoreUnavailable, SessionMoved, Fenced):
                exclude.add(engine.engine_id)
                continue
            finally:
                self._coming[engine.engine_id] -= 1
            self._places[opened["session_id"]] = there
            return _opened(opened)
        raise BadRequest("no engine can take the session just now; ask again", 503, "unavailable")

    # -- helpers --------------------------------------------------------------------------------------------------

    def _choose(self, prefer: str, exclude: set[str]) -> Engine | None:
        load = Counter(p.engine_id for p in self._places.values()) + self._coming
        found = [replace(e.candidate(load[e.engine_id], self._engines.warmup_s), serves=self._fit(e)) for e in self._engines.by_id.values()]
        chosen = place(found, prefer=prefer, exclude=exclude)
        return self._engines.by_id[chosen] if chosen else None

    def _serving(self, at: Place) -> Engine | None:
        engine = self._engines.by_id[at.engine_id]
        same = engine.health.incarnation == at.incarnation
        return engine if same and self._fit(engine) and engine.member is not None else None

    def _fit(self, engine: Engine) -> bool:
        """Whether it serves; while none does, whether it can hold sessions until it serves again."""
        if any(e.health.serves for e in self._engines.by_id.values()):
            return engine.health.serves
        return engine.health.lives

    async def _holds(self, engine: Engine, sid: str) -> bool:
        """A gateway could not reach the owner: does the owner answer, and is it still the owner?"""
        assert engine.member is not None
        if await self._engines.suspect(engine.engine_id, engine.health.incarnation, "does not answer"):
            return False
        try:
            return await engine.member.ask("holds", sid, timeout_s=HOLDS_TIMEOUT_S)
        except Gone:
            return False

    async def _head(self, trial_id: str) -> Head | None:
        try:
            return await self._stores.lookup(trial_id)
        except (StoreUnavailable, TimeoutError):
            await self._stores.check()
            try:
                return await self._stores.lookup(trial_id)
            except (StoreUnavailable, TimeoutError) as e:
                raise BadRequest(f"the checkpoint store does not answer: {e}", 503, "store_unavailable") from e

    async def _any_engine(self, method: str, *args: object):
        exclude = set[str]()
        for _ in range(TRIES):
            engine = self._choose("", exclude)
            if engine is None or engine.member is None:
                break
            try:
                return await engine.member.ask(method, *args, timeout_s=ADOPT_TIMEOUT_S)
            except (Gone, StoreUnavailable):
                exclude.add(engine.engine_id)
        raise BadRequest("no engine can read the trial just now; ask again", 503, "unavailable")

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())


def _owned(engine: Engine) -> JSON:
    return {"state": "owned", "url": engine.url, "engine_id": engine.engine_id, "incarnation": engine.health.incarnation}


def _opened(trial: JSON) -> JSON:
    keys = ("session_id", "trial_id", "attempt", "turns")
    return {**{k: trial[k] for k in keys}, "turns": trial["metadata"]["turns_committed"]}
