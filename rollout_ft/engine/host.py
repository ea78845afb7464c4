"""The sessions that one engine holds, and everything that happens to them there.

Owns which sessions are held, and the loss of the engine; a turn's flight is `pilot`'s, and what is recorded beside turns
`records`'. Knows nothing of Ray or HTTP: the store, the engine and the supervisor are ports. A reply leaves only for a turn
that the mirror has committed, and a session whose commit is in doubt is let go of: its next owner reads from the store what
became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from rollout_ft.checkpoint.mirror import Mirror
from rollout_ft.clock import monotonic, wall
from rollout_ft.config import Config
from rollout_ft.engine import records
from rollout_ft.engine.capture import Shape
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.flights import in_flight
from rollout_ft.engine.held import Held
from rollout_ft.engine.parsers import Parser
from rollout_ft.engine.pilot import Pilot
from rollout_ft.engine.routing import Routing
from rollout_ft.engine.turns import how
from rollout_ft.errors import Fenced, SessionClosed, SessionMoved, StoreUnavailable
from rollout_ft.faultpoints import FaultPoints
from rollout_ft.fleet.weights import Weights
from rollout_ft.samples.checkpoint import checkpoint_of
from rollout_ft.samples.summary import summary
from rollout_ft.samples.trajectory import Assembly, metadata, records_of, routed_of, trajectory_of
from rollout_ft.session.entries import FAULT, SessionEntry, decode_entry
from rollout_ft.session.render import Renderer
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.session import Attach, Begin, Diverged, Replay, Session
from rollout_ft.session.tree import Node
from rollout_ft.telemetry.events import Events
from rollout_ft.telemetry.losses import Loss
from rollout_ft.telemetry.metrics import TOKENS_GENERATED, TURNS_SERVED, whose
from rollout_ft.telemetry.tracing import Tracing
from rollout_ft.types import JSON, UNSAID, Ended, Opened, Partial, Served, SessionSpec, Step, Why, split_session_id

DELIVERED_S = 0.2
"""How long after a turn its reply is on its way, in all likelihood."""
UNHURT = Loss()
_log = logging.getLogger("rollout_ft")
AbortEngine = Callable[[str], Awaitable[None]]
"""Told once, with the reason, when the engine is lost: kills what is left of it and tells the supervisor."""


@dataclass(frozen=True, slots=True)
class Reply:
    node: Node
    served: Served


class SessionHost:
    def __init__(
        self, engine_id: str, config: Config, renderer: Renderer, driver: Driver, parser: Parser, mirror: Mirror,
        lose_engine: AbortEngine, events: Events, faults: FaultPoints, shape: Shape | None = None,
    ):  # fmt: skip
        self._engine_id, self._config, self._renderer = engine_id, config, renderer
        self._mirror, self._lose_engine = mirror, lose_engine
        self._driver, self._events, self._faults = driver, events, faults
        self._counts = driver.counts
        self._routing = Routing(shape, mirror.payloads, events) if shape else None
        self.fleet: Callable[[], Weights] = Weights
        """Where the trainer is."""
        self._held: dict[str, Held] = {}
        self._losing: asyncio.Task[None] | None = None
        self._pilot = Pilot(engine_id, config, renderer, driver, parser, self._routing, events, faults, self)
        self._flusher = asyncio.create_task(self._flush_partials())

    # -- lifecycle of a session -----------------------------------------------------------------------------------

    async def open(self, trial_id: str, attempt: int, epoch: int, spec: SessionSpec | None, resume: bool, why: Why = UNSAID) -> Session:
        """Fences whoever had the trial, adopts its checkpoint, and records that this attempt began. Idempotent.

        Raises Fenced when a newer attempt or owner exists, SessionClosed when the trial is over or unknown.
        """
        adopted = await self._mirror.takeover(trial_id, attempt, epoch)
        entries = [decode_entry(e.kind, e.payload) for e in adopted.entries]
        first = next((e for e in entries if isinstance(e, Opened)), None)
        if first is not None:
            spec = first.spec
        if spec is None:
            raise SessionClosed(f"trial {trial_id} is not known")
        session = self._new_session(spec, attempt)
        session.restore(entries, adopted.partials)
        held = Held(session, epoch, len(entries), self._mirror, self._left, self._counts)
        if session.ended is not None:
            raise SessionClosed(f"trial {trial_id} has ended ({session.ended.outcome})")
        if session.attempt != attempt or first is None:
            dropped = (0, 0) if resume else (session.tokens + session.tokens_unfinished, session.tokens_reused)
            opened = Opened(spec, attempt, resume, int(wall()), *dropped, why)
            await held.commit(f"open/{attempt}", opened)
            if first is not None:
                self.tracing.attempt_ended(session, why)
            if not resume:  # what is in no turn was counted nowhere
                self._counts.add(TOKENS_GENERATED, *whose(spec), by=session.tokens_unfinished)
            # A turn that failed ends its attempt; the next may try as often again.
            partials = [replace(partial, generations=0) for partial in adopted.partials]
            session.restore([opened], partials if resume else [])
        await self._faults.opened(spec)
        old = self._held.get(session.id)
        if old is not None:
            old.let_go()
        self._held[session.id] = held
        return session

    async def adopt(self, sid: str, epoch: int, loss: Loss = UNHURT) -> Session:
        """Becomes the owner of a session that exists, at the given epoch; `loss` is why its last one is not."""
        parts = split_session_id(sid)
        if parts is None:
            raise SessionClosed(f"{sid} is no session id")
        trial_id, attempt = parts
        self._refuse_if_losing()
        old = self._held.get(sid)
        if old is not None and old.epoch == epoch:
            return old.session  # the call that made it so was repeated
        if old is not None and old.epoch < epoch:
            await self.retire(sid)  # before the fence, so that what it has so far counts
        adopted = await self._mirror.takeover(trial_id, attempt, epoch)
        entries = [decode_entry(e.kind, e.payload) for e in adopted.entries]
        session = self._restored(entries, adopted.partials)
        if session is None or session.attempt != attempt:
            raise SessionClosed(f"session {sid} is not known")
        if session.ended is not None:
            raise SessionClosed(f"trial {trial_id} has ended ({session.ended.outcome})")
        await self._faults.opened(session.spec)
        self._refuse_if_losing()
        now = self._held.get(sid)
        if now is not None and now.epoch > epoch:
            raise Fenced("stale_owner", trial_id, now.epoch)
        if now is not None and now.epoch == epoch:
            return now.session  # asked twice, for the answer was lost: the first stands
        self._held[sid] = Held(session, epoch, len(entries), self._mirror, self._left, self._counts, loss=loss)
        return session

    def _refuse_if_losing(self) -> None:
        if self._losing is not None:
            raise StoreUnavailable(f"{self._engine_id} is being replaced")

    async def retire(self, sid: str) -> None:
        """Lets go of a session: what is in flight is aborted at the engine, and kept as partials."""
        held = self._held.pop(sid, None)
        if held is None:
            return
        partials = held.partials()
        held.let_go()
        await self._mirror.put_partials(partials)

    async def release(self) -> None:
        """Lets go of every session that has nothing at the engine just now; what waits for the engine goes on elsewhere."""
        await self._release([h for h in self._held.values() if not any(g.calling for g in h.generations.values())])

    async def drain(self, timeout_s: float) -> None:
        """Lets go of every session: at once where nothing runs, else when that has ended, or after `timeout_s`."""
        until = monotonic() + timeout_s
        while self._held and monotonic() < until:
            for held in [h for h in self._held.values() if not h.tasks]:
                with contextlib.suppress(SessionMoved, SessionClosed):
                    await held.save_evidence()
            await self._release([h for h in self._held.values() if not h.tasks])
            running = [t for h in self._held.values() for t in h.tasks.values()]
            if running:
                await asyncio.wait(running, timeout=until - monotonic(), return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(DELIVERED_S)
        await self.let_go_of_all()

    async def end(self, sid: str, ended: Ended) -> Session:
        """Records how the trial ended; after that nothing of it changes. The same end again is a success."""
        held = self._get(sid)
        if held.session.ended is None:
            held.ending = True  # nothing begins any more; what is being committed arrives before the end
            committing = [t for k, t in held.tasks.items() if k in held.generations and held.generations[k].finish]
            held.stop_flights(*committing)
            await asyncio.gather(*committing, return_exceptions=True)
            await held.save_evidence()
            await held.commit("end", ended)
            held.session.ended = ended
            self.tracing.attempt_ended(held.session)
            self.tracing.trial_ended(held.session, metadata(held.session))
        held.let_go()
        return held.session

    async def read(self, trial_id: str) -> Session | None:
        """A trial as the store has it, for reading only: nobody is fenced."""
        return self._restored(await self.entries(trial_id), [])

    async def entries(self, trial_id: str) -> list[SessionEntry]:
        """A trial's log, as the store has it."""
        return [decode_entry(e.kind, e.payload) for e in await self._mirror.read(trial_id)]

    async def assembly(self, session: Session, what: str) -> Assembly:
        """What makes a session's trajectory (`linear`: of one path), records or checkpoint: all that takes long, for the caller
        to do aside."""
        if what == "checkpoint":
            return checkpoint_of(session)
        if what not in ("trajectory", "linear"):
            return records_of(session)
        assemble = trajectory_of(session, linear=what == "linear")
        if self._routing is None:
            return assemble
        wanted = routed_of(session)  # in the same moment: what is committed from now on is in neither
        rows = await self._routing.fetch(session, wanted)
        return lambda: assemble(rows)

    def session(self, sid: str) -> Session:
        return self._get(sid).session

    def summary(self, sid: str) -> JSON:
        """What a trial is at, here and now."""
        held = self._get(sid)
        return {**summary(held.session), "activity": held.activity()}

    def sessions(self) -> dict[str, int]:
        """Session id → owner epoch of everything held here."""
        return {sid: held.epoch for sid, held in self._held.items()}

    def in_flight(self, limit: int) -> JSON:
        """The turns that are being generated here: see `engine.flights`."""
        driver = self._driver
        return in_flight(self._held.values(), driver.gate.closed, driver.admission.waiting > 0, monotonic(), limit)

    @property
    def tracing(self) -> Tracing:
        return self._driver.tracing

    def still_s(self) -> float:
        """How long nothing has been generated here, on purpose."""
        return self._driver.gate.closed_s()

    # -- turns ----------------------------------------------------------------------------------------------------

    async def serve(self, sid: str, request: TurnRequest) -> Reply:
        """The reply to one request, once its turn is committed. Cancelled when its caller is gone.

        Raises BadRequest, SessionClosed, SessionMoved, TrialFault, or EngineRefused when the turn's budget is spent.
        """
        held = self._get(sid)
        if held.ending:
            raise SessionMoved(sid)
        held.waiting, held.changed = held.waiting + 1, monotonic()
        try:
            reply = await self._serve(held, sid, request)
            self._counts.add(TURNS_SERVED, reply.served.value, *whose(held.session.spec))
            return reply
        finally:
            held.waiting, held.changed = held.waiting - 1, monotonic()

    async def _serve(self, held: Held, sid: str, request: TurnRequest) -> Reply:
        decision = held.session.decide(request)
        while isinstance(decision, Diverged):
            await records.diverged(held, decision.divergence, self._events)
            if held.gone or held.ending:
                raise SessionMoved(sid)
            decision = held.session.decide(request)
        if isinstance(decision, Begin):
            self._pilot.check_versions(held.session, held.session.versions, more=True)
        match decision:
            case Replay(node, first):
                await records.replayed(held, node, request, first)
                return self._reply(sid, node, Served.REPLAYED, tell=not first)
            case Begin(flight):
                generation = self._pilot.take_off(held, flight)
                node = await records.heard(held, await self._pilot.wait(held, flight, request), request)
                served = how(generation)
                return self._reply(sid, node, served, tell=served is not Served.FRESH)
            case Attach(flight):
                held.session.counts["attached"] += 1
                node = await records.heard(held, await self._pilot.wait(held, flight, request), request)
                return self._reply(sid, node, Served.ATTACHED, tell=True)

    def _reply(self, sid: str, node: Node, served: Served, *, tell: bool) -> Reply:
        """What a trial survived is told; a restarted agent's replay is as many turns as it has, and told as its restart."""
        if tell:
            turn = node.turn
            self._events.emit(
                f"turn.{served}", session=sid, turn=turn.depth, engine=self._engine_id, tokens=len(turn.output_ids) // 4,
                tokens_reused=turn.tokens_reused, tokens_wasted=turn.tokens_wasted, generations=turn.generations,
            )  # fmt: skip
        return Reply(node, served)

    def report(self, sid: str, delivered: str) -> None:
        """What the gateway saw: the reply to this request was written whole to a socket that was still open."""
        held = self._held.get(sid)
        if held is not None:
            held.session.delivered(delivered)

    async def record_step(self, sid: str, step: Step) -> Step:
        """What is recorded as this step of the attempt: this, unless another was before it."""
        return await records.step(self._get(sid), step)

    async def begin(self, sid: str) -> Assembly:
        """The agent has the checkpoint's messages, and goes on behind them: what they contain is acknowledged."""
        held = self._get(sid)
        held.session.evidence.acknowledge(held.session.checkpoint)
        await records.whole(held.save_evidence())
        return checkpoint_of(held.session)

    async def fault(self, sid: str, reason: str) -> None:
        """The attempt met a fault that it does not survive: recorded, so that no later owner forgets it."""
        held = self._get(sid)
        await records.failure(held, FAULT + reason)

    async def failed(self, sid: str, request: TurnRequest) -> None:
        """This request was, or is about to be, answered with a 5xx."""
        held = self._get(sid)
        await records.failure(held, held.session.failed(request))

    async def unreadable(self, sid: str) -> None:
        """A request ended in a 5xx before anybody knew what it asked for: nothing that comes later can answer it."""
        await records.failure(self._get(sid), "unreadable")

    # -- letting go of all ----------------------------------------------------------------------------------------

    async def engine_lost(self, reason: str) -> None:
        """The engine is gone: keep what was sampled, tell the supervisor, let go of every session. Once."""
        if self._losing is None:
            self._driver.lost = True
            self._losing = asyncio.create_task(self._let_go_of_all(reason))
        await asyncio.shield(self._losing)

    async def _let_go_of_all(self, reason: str) -> None:
        held = list(self._held.values())
        try:
            await self._mirror.put_partials([p for h in held for p in h.partials()])
            await self._lose_engine(reason)
        except Exception:
            _log.exception("engine %s is lost and nobody could be told", self._engine_id)
            os._exit(1)  # the actor's own death is news that cannot be missed
        for each in held:
            each.let_go()

    async def let_go_of_all(self) -> None:
        """Every session goes to another engine when somebody asks for it. Nobody failed, and it costs no turn anything."""
        await self._release(list(self._held.values()))

    async def _release(self, held: list[Held]) -> None:
        if not held:
            return
        for generation in (g for each in held for g in each.generations.values() if g.calling):
            generation.excuse()
        await self._mirror.put_partials([p for h in held for p in h.partials()])
        for each in held:
            each.excused = True
            each.let_go()

    async def _flush_partials(self) -> None:
        """About once a second, what every flight has so far, in one call for all of them."""
        flushed: dict[tuple[str, str], int] = {}
        while True:
            await asyncio.sleep(self._config.engine.partial_flush_s)
            items: list[tuple[str, int, int, Partial]] = []
            now: dict[tuple[str, str], int] = {}
            for held in list(self._held.values()):
                for trial_id, attempt, epoch, partial in held.partials():
                    which = (trial_id, partial.turn_key)
                    now[which] = size = len(partial.output_ids)
                    if flushed.get(which) != size:
                        items.append((trial_id, attempt, epoch, partial))
            flushed = now
            if items:
                await self._mirror.put_partials(items)

    def _left(self, held: Held) -> None:
        if self._held.get(held.session.id) is held:
            del self._held[held.session.id]

    # -- helpers --------------------------------------------------------------------------------------------------

    def _get(self, sid: str) -> Held:
        held = self._held.get(sid)
        if held is None or self._losing is not None:
            raise SessionMoved(sid)
        return held

    def _new_session(self, spec: SessionSpec, attempt: int) -> Session:
        config = self._config
        return Session(
            spec, attempt, self._renderer, config.session, run_seed=config.seed, context_tokens=config.model.usable_tokens,
            resampled=config.samples.resampled, on_divergence=config.trial.on_divergence,
        )  # fmt: skip

    def _restored(self, entries: list[SessionEntry], partials: list[Partial]) -> Session | None:
        first = next((e for e in entries if isinstance(e, Opened)), None)
        if first is None:
            return None
        session = self._new_session(first.spec, first.attempt)
        session.restore(entries, partials)
        return session

    async def aclose(self) -> None:
        self._flusher.cancel()
        self._driver.aclose()
        for held in list(self._held.values()):
            held.let_go()
