"""One flight, from what is asked of the engine to the turn in the tree.

Owns the task of a flight, its generations, and who waits for it. Does not know which sessions are here: who holds them is told when
the engine is lost, and asked where the trainer is. A turn is in the tree once it is committed, and a flight that ends otherwise
leaves what was sampled to whoever asks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from rollout_ft.clock import monotonic
from rollout_ft.config import Config
from rollout_ft.engine.driver import FAILED, Driver
from rollout_ft.engine.generation import Generation
from rollout_ft.engine.held import Held
from rollout_ft.engine.ladder import spent_error
from rollout_ft.engine.parsers import Parser
from rollout_ft.engine.routing import Routing
from rollout_ft.engine.turns import begin, depth_of, message_of, turn_of
from rollout_ft.errors import EngineLost, EngineRefused, SessionClosed, SessionMoved, TrialFault
from rollout_ft.faultpoints import FaultPoints
from rollout_ft.fleet.weights import Weights
from rollout_ft.session.flight import Flight
from rollout_ft.session.freshness import verdict, versions_of
from rollout_ft.session.render import Renderer
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.session import Session
from rollout_ft.session.tree import Node
from rollout_ft.telemetry.events import Events
from rollout_ft.telemetry.metrics import FIRST_TOKEN_SECONDS, whose
from rollout_ft.types import JSON, RoutedExperts


class Ground(Protocol):
    """Who holds the sessions."""

    fleet: Callable[[], Weights]

    async def engine_lost(self, reason: str) -> None: ...

    async def retire(self, sid: str) -> None: ...


class Pilot:
    def __init__(
        self, engine_id: str, config: Config, renderer: Renderer, driver: Driver, parser: Parser, routing: Routing | None,
        events: Events, faults: FaultPoints, ground: Ground,
    ):  # fmt: skip
        self._engine_id, self._config, self._renderer, self._parser = engine_id, config, renderer, parser
        self._driver, self._routing, self._events, self._faults = driver, routing, events, faults
        self._counts, self._ground = driver.counts, ground

    def take_off(self, held: Held, flight: Flight) -> Generation:
        """Begins a turn, which goes on whoever waits for it."""
        session = held.session
        generation = begin(session, flight, self._renderer, self._routing.shape if self._routing else None)
        generation.rank = self._driver.rank_of(session.id)
        session.take_off(flight)
        held.generations[flight.key] = generation
        task = asyncio.create_task(self._fly(held, flight, generation), name=f"turn:{session.id}:{flight.key}")
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
        held.tasks[flight.key] = task
        return generation

    async def wait(self, held: Held, flight: Flight, request: TurnRequest) -> Node:
        task = held.tasks[flight.key]
        held.session.join(flight, request)
        grace = held.graces.pop(flight.key, None)
        if grace is not None:
            grace.cancel()
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise SessionMoved(held.session.id, in_flight=not held.excused) from None
            raise
        finally:
            if held.session.leave(flight, request.request_id) and not task.done():
                after_s = self._config.session.grace_s
                held.graces[flight.key] = asyncio.get_running_loop().call_later(after_s, self._give_up, held, flight)

    def _give_up(self, held: Held, flight: Flight) -> None:
        """Nobody came back for it: the engine stops, what it has is kept for a later retry to continue."""
        generation = held.generations.get(flight.key)
        if generation is None or generation.finish or flight.callers:
            return
        held.session.give_up(flight, generation.partial())
        del held.generations[flight.key]
        held.tasks.pop(flight.key).cancel()

    async def _fly(self, held: Held, flight: Flight, generation: Generation) -> Node:
        """Generates, commits, and puts the turn into the tree; ends in SessionMoved when another owner has to go on."""
        try:
            retries, most = held.session.retries + generation.calls, self._config.engine.retry.max_retries_per_trial
            if retries >= most:
                raise EngineRefused(500, f"the trial's budget of {most} retries is spent (engine.retry.max_retries_per_trial)")
            message = await self._generate(held, flight, generation)
            routed = await self._keep_routed(held, flight, generation)
            turn = turn_of(held.session, flight, generation, message, routed, self._engine_id)
            self.check_versions(held.session, held.session.versions | versions_of(generation.spans), more=False)
            try:
                await held.commit(held.session.entry_key(turn.key), turn)
            except (SessionMoved, SessionClosed):
                held.session.evidence.give_back(turn.acknowledged, turn.delivered)
                raise
            node = held.session.committed(turn)
            await self._faults.committed(held.session.spec, turn.depth)
            return node
        except BaseException as e:
            held.session.drop(flight)
            # Who asks again does not begin with a new budget; what a trial that starts from scratch had is counted.
            if isinstance(e, TrialFault) or (isinstance(e, EngineRefused) and e.status != 400):
                held.session.keep_partial(flight, generation.partial())
            self._driver.abort(generation)
            raise
        finally:
            # A retry may have begun the same turn again while this one was being aborted: that is not ours to remove.
            if held.generations.get(flight.key) is generation:
                del held.generations[flight.key]
            if held.tasks.get(flight.key) is asyncio.current_task():
                del held.tasks[flight.key]
                grace = held.graces.pop(flight.key, None)
                if grace is not None:
                    grace.cancel()

    async def _keep_routed(self, held: Held, flight: Flight, generation: Generation) -> RoutedExperts | None:
        capture, generation.capture = generation.capture, None
        if self._routing is None or capture is None:
            return None
        return await self._routing.keep(held.session, held.epoch, flight.key, capture)

    async def _generate(self, held: Held, flight: Flight, generation: Generation) -> JSON:
        """Generates until the turn is finished, and returns its message."""
        engine = self._config.engine
        depth, had, begun, fleet = depth_of(flight), len(generation.ids), False, self._ground.fleet()

        def moved(g: Generation) -> None:
            """Being asked is no progress: a frozen engine is asked all the time."""
            nonlocal begun
            if not begun and len(g.ids) > had:
                begun = True
                self._counts.observe(FIRST_TOKEN_SECONDS, monotonic() - g.began, *whose(held.session.spec))
                self._resumed(held, g, in_flight=flight.request.resent)

        async def progress(g: Generation) -> dict[str, object] | None:
            nonlocal fleet
            if fleet is not self._ground.fleet():
                fleet = self._ground.fleet()
                self.check_versions(held.session, held.session.versions, more=True)
            moved(g)
            return await self._faults.generating(held.session.spec, depth, len(g.ids))

        for _ in range(engine.max_generations_per_turn):  # also of a message that cannot be made
            try:
                await self._driver.run(generation, progress, held.session.began)
                moved(generation)  # progress is not told of the last chunk
                return await message_of(held.session, flight, generation, self._renderer, self._parser)
            except EngineLost as e:
                if await self._driver.is_lost(e):
                    await self._ground.engine_lost(e.reason)
                    raise SessionMoved(held.session.id, in_flight=True) from e
                self._driver.abort(generation)
                if e.reason.startswith(FAILED):  # elsewhere it may succeed; what is placed next avoids this engine
                    await self._ground.retire(held.session.id)
                    raise SessionMoved(held.session.id, in_flight=True) from e
        raise spent_error(engine.max_generations_per_turn)

    def _resumed(self, held: Held, g: Generation, *, in_flight: bool) -> None:
        """A turn that was in flight waits since its engine was lost; another since somebody asked for it, and not for its tools."""
        if held.loss is None:
            return
        loss, held.loss = held.loss, None
        since = held.taken - loss.ago_s - loss.unseen_s if in_flight else max(held.taken, g.began)
        self._events.emit(
            "session.resumed", session=held.session.id, engine=self._engine_id, epoch=held.epoch, reason=loss.why,
            seconds=round(monotonic() - since, 3), detect_s=round(loss.unseen_s, 3),
        )  # fmt: skip

    def check_versions(self, session: Session, used: frozenset[str], *, more: bool) -> None:
        """Raises TrialFault when the config does not allow the versions that the trial's tokens have, or would have."""
        fleet = self._ground.fleet()
        reason = verdict(self._config.session, used, fleet.version, fleet.behind, more=more)
        if reason:
            raise session.lost(reason)
