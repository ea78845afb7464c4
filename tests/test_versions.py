"""What an update of the weights means to turns and trials: `session.version_policy`, `session.max_staleness`, and what it costs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from conftest import ask, user
from hypothesis import given
from hypothesis import strategies as st
from test_checkpoint_fakes import Cluster

from rollout_ft.config import Config, SessionConfig, TrialConfig
from rollout_ft.engine.driver import Driver
from rollout_ft.engine.gate import Closed
from rollout_ft.engine.host import Reply, SessionHost
from rollout_ft.engine.parsers import Own, TextParser
from rollout_ft.engine.port import Chunk, EngineInfo
from rollout_ft.errors import SessionMoved, TrialFault
from rollout_ft.faultpoints import Inert
from rollout_ft.fleet.weights import Weights
from rollout_ft.gateway.gateway import _come_again
from rollout_ft.samples.summary import summary
from rollout_ft.session.freshness import REFUSED, SCRATCH, advice, code_of, verdict
from rollout_ft.telemetry.events import Events
from rollout_ft.testing.plain import STOP, PlainTemplate
from rollout_ft.trial.policy import AttemptEnd, Blame, End, Finish, Restart, Spent, decide
from rollout_ft.types import JSON, Outcome, Recovery, SessionSpec, VersionSpan

TEXT = "abcdefgh"


@dataclass
class Engine:
    """Says `TEXT` two tokens at a time, each with the version of the moment; stops before a token when told to."""

    version: str = "v1"
    calls: list[int] = field(default_factory=list[int])
    aborted: int = 0
    hold_at: int = -1
    held: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    abort_now: bool = False

    async def generate(self, rid: str, input_json: bytes, sampling: JSON, routed_from: int | None = None) -> AsyncIterator[Chunk]:
        kept = len(TEXT) + 1 - sampling["max_new_tokens"]
        self.calls.append(kept)
        spans: list[VersionSpan] = []
        ids = [*TEXT.encode(), STOP]
        for at in range(kept, len(ids)):
            if at == self.hold_at:
                self.hold_at = -1
                self.held.set()
                await self.go.wait()
                if self.abort_now:
                    self.abort_now = False
                    yield Chunk([], [], tuple(spans), "abort")
                    return
            spans.append(VersionSpan(self.version, at - kept, at - kept + 1))
            yield Chunk([ids[at]], [-1.0], tuple(spans), "stop" if at == len(TEXT) else "")

    async def abort(self, rid: str) -> None:
        self.aborted += 1

    async def alive(self) -> bool:
        return True

    async def info(self) -> EngineInfo:
        return EngineInfo(self.version, "")

    async def aclose(self) -> None: ...


@dataclass
class Stage:
    host: SessionHost
    engine: Engine
    driver: Driver
    weights: Weights
    said: list[dict[str, Any]] = field(default_factory=list[Any])

    def update(self, version: str) -> None:
        """The trainer loads weights on the engine and says so."""
        self.engine.version = version
        self.weights = Weights(self.weights.revision + 1, (*self.weights.versions, version))

    async def turn(self, sid: str = "t~1") -> Reply:
        """The next turn of the conversation."""
        reply = await self.host.serve(sid, ask(*self.said, user("go on"), sampling={"max_new_tokens": len(TEXT) + 1}))
        self.said += [user("go on"), orjson.loads(reply.node.turn.reply)]
        return reply


@contextlib.asynccontextmanager
async def stage(recovery: Recovery = Recovery.RESUME, **session: Any) -> AsyncIterator[Stage]:
    config = Config.model_validate({"session": session})
    engine = Engine()
    driver = Driver(engine, config.engine)  # pyright: ignore[reportArgumentType]

    async def lose(reason: str) -> None:
        raise AssertionError(reason)

    mirror = Cluster("a", "b").mirror()
    parser = TextParser(config.model, Own(), None)
    host = SessionHost("e0", config, PlainTemplate(), driver, parser, mirror, lose, Events("test"), Inert())
    s = Stage(host, engine, driver, Weights(1, ("v1",)))
    host.fleet = lambda: s.weights
    await host.open("t", 1, 1, SessionSpec("t", recovery=recovery), False)
    try:
        yield s
    finally:
        engine.go.set()
        await host.aclose()


async def updated_in_mid_turn(s: Stage, at: int = 4) -> asyncio.Task[Reply]:
    """A turn that has sampled so many tokens when the weights are changed in place, and then goes on."""
    s.engine.hold_at = at
    turn = asyncio.create_task(s.turn())
    await s.engine.held.wait()
    s.driver.gate.close(Closed.PAUSED)
    s.update("v2")
    s.driver.gate.open(Closed.PAUSED)
    s.engine.go.set()
    return turn


@pytest.mark.asyncio
async def test_mixed_keeps_what_was_sampled_and_the_spans_tell():
    async with stage() as s:
        turn = (await (await updated_in_mid_turn(s))).node.turn
        assert turn.version_spans == (VersionSpan("v1", 0, 4), VersionSpan("v2", 4, 9))
        assert (turn.generations, turn.tokens_wasted) == (1, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("at", [0, 1, 4, 8])
async def test_turn_generates_a_turn_again_whose_tokens_would_be_of_two_versions(at: int):
    async with stage(version_policy="turn") as s:
        turn = (await (await updated_in_mid_turn(s, at))).node.turn
        assert turn.version_spans == (VersionSpan("v2", 0, 9),)
        assert turn.generations == 1
        assert turn.tokens_wasted == (at + 1 if at else 0)
        assert s.engine.calls == ([0, 0] if at else [0])


@pytest.mark.asyncio
async def test_turn_lets_the_turns_of_a_trial_be_of_different_versions():
    async with stage(version_policy="turn") as s:
        await s.turn()
        s.update("v2")
        assert (await s.turn()).node.turn.version_spans == (VersionSpan("v2", 0, 9),)


@pytest.mark.asyncio
async def test_trial_ends_an_attempt_before_it_samples_a_token_of_another_version():
    async with stage(version_policy="trial") as s:
        await s.turn()
        s.update("v2")
        calls = len(s.engine.calls)
        with pytest.raises(TrialFault, match="'v1' and the fleet is at 'v2'") as fault:
            await s.turn()
        assert len(s.engine.calls) == calls
        assert (fault.value.reason.startswith(SCRATCH), summary(s.host.session("t~1"))["tainted"]) == (True, True)


@pytest.mark.asyncio
async def test_trial_ends_an_attempt_whose_turn_is_updated_under_it():
    async with stage(version_policy="trial") as s:
        await s.turn()
        with pytest.raises(TrialFault, match="from scratch"):
            await (await updated_in_mid_turn(s))


@pytest.mark.asyncio
async def test_trial_begins_its_first_turn_anew_and_goes_on():
    async with stage(version_policy="trial") as s:
        assert (await (await updated_in_mid_turn(s))).node.turn.version_spans == (VersionSpan("v2", 0, 9),)
        assert (await s.turn()).node.turn.version_spans == (VersionSpan("v2", 0, 9),)


@pytest.mark.asyncio
async def test_a_trial_that_starts_from_scratch_has_none_of_its_old_tokens():
    async with stage(version_policy="trial") as s:
        await s.turn()
        s.update("v2")
        with pytest.raises(TrialFault):
            await s.turn()
        await s.host.retire("t~1")
        await s.host.open("t", 2, 1, None, False)
        s.said.clear()
        assert (await s.turn("t~2")).node.turn.version_spans == (VersionSpan("v2", 0, 9),)
        assert s.host.session("t~2").versions == {"v2"}


@pytest.mark.asyncio
async def test_what_a_trial_sampled_before_it_started_from_scratch_is_counted_as_wasted():
    async with stage(version_policy="trial") as s:
        await s.turn()
        with pytest.raises(TrialFault) as fault:
            await (await updated_in_mid_turn(s, 4))
        await s.host.fault("t~1", fault.value.reason)
        await s.host.retire("t~1")
        await s.host.open("t", 2, 1, None, False)
        s.said.clear()
        await s.turn("t~2")
        told = summary(s.host.session("t~2"))["metadata"]
        assert (told["tokens_generated"], told["tokens_wasted"], told["version_restarts"]) == (9 + 5 + 9, 9 + 5, 1)
        assert summary(await s.host.adopt("t~2", 2))["metadata"] == told


@pytest.mark.asyncio
@pytest.mark.parametrize(("on_stale", "prefix", "code"), [("refuse", REFUSED, "too_stale"), ("restart", SCRATCH, "restart_from_scratch")])
async def test_a_trial_that_is_too_old_is_told_so_and_both_versions(on_stale: str, prefix: str, code: str):
    async with stage(max_staleness=1, on_stale=on_stale) as s:
        await s.turn()
        s.update("v2")
        await s.turn()
        s.update("v3")
        with pytest.raises(TrialFault, match=r"'v1' and the trainer is at 'v3', 2 updates later \(session.max_staleness 1\)") as fault:
            await s.turn()
        assert fault.value.reason.startswith(prefix)
        assert code_of(fault.value.reason) == code
        assert 'POST /trials/t/restart {"from_attempt": 1, "checkpoint": false}' in advice(fault.value.reason, "t", 1)


@pytest.mark.asyncio
async def test_an_abort_by_a_pause_costs_a_turn_nothing_however_often():
    """More pauses than `engine.max_generations_per_turn` allows generations."""
    async with stage() as s:
        turn: asyncio.Task[Reply] | None = None
        for at in range(1, 9):
            s.engine.hold_at, s.engine.abort_now = at, True
            s.engine.held.clear()
            s.engine.go.clear()
            turn = turn or asyncio.create_task(s.turn())
            if at > 1:
                s.driver.gate.open(Closed.PAUSED)
            await s.engine.held.wait()
            s.driver.gate.close(Closed.PAUSED)
            s.engine.go.set()
            await asyncio.sleep(0)
        s.driver.gate.open(Closed.PAUSED)
        assert turn is not None
        reply = await turn
        assert (reply.node.turn.generations, reply.node.turn.tokens_wasted, reply.served.value) == (1, 0, "continued")
        assert s.engine.calls == list(range(9))


@pytest.mark.asyncio
async def test_a_session_that_leaves_a_stale_engine_takes_its_partial_along_at_no_cost():
    async with stage() as s:
        s.engine.hold_at = 4
        turn = asyncio.create_task(s.turn())
        await s.engine.held.wait()
        await s.host.let_go_of_all()
        with pytest.raises(SessionMoved) as moved:
            await turn
        assert not moved.value.in_flight  # it is not sent for the second time
        await s.host.adopt("t~1", 2)
        reply = await s.turn()
        assert (reply.served.value, reply.node.turn.generations, reply.node.turn.tokens_reused) == ("continued", 1, 4)


# -- the rules ----------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["v1", "v2", "v3", "v4"])


@given(
    policy=st.sampled_from(["mixed", "turn", "trial"]), limit=st.none() | st.integers(0, 4),
    on_stale=st.sampled_from(["refuse", "restart"]), used=st.frozensets(NAMES),
    updates=st.lists(NAMES, min_size=1, unique=True), more=st.booleans(),
)  # fmt: skip
def test_a_trial_goes_on_exactly_while_its_tokens_are_allowed(
    policy: Any, limit: int | None, on_stale: Any, used: frozenset[str], updates: list[str], more: bool
):
    config = SessionConfig(version_policy=policy, max_staleness=limit, on_stale=on_stale)
    fleet = Weights(1, tuple(updates))
    reason = verdict(config, used, fleet.version, fleet.behind, more=more)
    of_two = policy == "trial" and bool(used) and len(used | {fleet.version} if more else used) > 1
    too_old = limit is not None and any(fleet.behind(v) > limit for v in used)
    assert bool(reason) == (of_two or too_old)
    if reason:
        assert reason.startswith(SCRATCH if of_two or on_stale == "restart" else REFUSED)


@given(restarts=st.integers(0, 9), anew=st.integers(0, 9), recovery=st.sampled_from(Recovery), end=st.sampled_from(End))
def test_a_restart_for_a_version_is_from_scratch_and_costs_no_budget(restarts: int, anew: int, recovery: Recovery, end: End):
    ended = AttemptEnd(end, 1.0, blame=Blame.INFRA, tainted=True, fault=f"{SCRATCH}two versions")
    config = TrialConfig(recovery=recovery, max_restarts=0, max_version_restarts=5)
    decision = decide(ended, Spent(infra=restarts, versions=anew), config)
    if anew < 5:
        assert decision == Restart(False, ended.fault, "versions")
    else:
        assert isinstance(decision, Finish)
        assert (decision.outcome, decision.reward) == (Outcome.INFRA_EXHAUSTED, None)
        assert "trial.max_version_restarts" in decision.cause


def test_a_trial_that_is_refused_for_its_age_ends_without_a_reward():
    ended = AttemptEnd(End.RAISED, 1.0, blame=Blame.INFRA, tainted=True, fault=f"{REFUSED}old")
    assert decide(ended, Spent(), TrialConfig()) == Finish(Outcome.TRUNCATED, None, ended.fault)


@given(st.floats(0, 10_000))
def test_a_client_whose_engine_is_paused_comes_again_later_the_longer_it_lasts(still_s: float):
    headers = dict(_come_again(still_s))
    wait_ms = int(headers[b"retry-after-ms"])
    assert headers[b"x-should-retry"] == b"true"
    assert wait_ms == 1 if not still_s else 1000 <= wait_ms <= 30_000
    assert not still_s or int(headers[b"retry-after"]) * 1000 >= wait_ms
    assert wait_ms <= max(1000, still_s * 1000)
