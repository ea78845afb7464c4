"""A real run that sends its spans over OTLP to a collector on this machine, while its engines and agents are killed."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio
from ray_run import Stage, staged
from spans import Spans, collector, until

from rollout_ft.telemetry import conventions as c
from rollout_ft.testing.faults import Fault, Kind
from rollout_ft.trial.agents import ProcessAgent

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="rollout-ft[tracing] is not installed")
pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

TASK = {"task_id": "q", "prompt": "Explain tides.", "turns": 3, "seed": 11, "max_tokens": 48}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def traced() -> AsyncGenerator[tuple[Stage, Spans]]:
    with pytest.MonkeyPatch.context() as patch:
        async with collector() as (url, received):
            patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
            patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
            async with staged() as stage:
                yield stage, received


async def spans_of(received: Spans, trial_id: str, turns: int, generations: int) -> Spans:
    """All of a trial's, once they are there: each process sends its own."""

    def there() -> bool:
        spans = received.of_trial(trial_id)
        return bool(spans.trials) and len(spans.turns) >= turns and len(spans.generations) >= generations

    await until(there)
    return received.of_trial(trial_id)


def check_turns(spans: Spans, turns: int) -> None:
    """Each was finished by one generation, whoever waited for it, and no request for one failed."""
    finished = [s.of(c.TURN) for s in spans.generations if s.of(c.OUTCOME) == "finished"]
    assert len(set(finished)) == len(finished) == turns
    assert {s.of(c.TURN) for s in spans.turns if not s.of(c.CLIENT_LEFT)} == set(finished)
    assert not [s for s in spans.turns if s.failed is not None]


async def test_of_an_engine_killed_in_mid_stream_the_tree_is_whole(traced: tuple[Stage, Spans]) -> None:
    stage, received = traced
    result, _ = await stage.play("killed", TASK, Fault(Kind.ENGINE_KILL, "killed-q", 2, 16))
    assert result.outcome == "completed"
    spans = await spans_of(received, "killed-q", turns=3, generations=4)
    spans.check_whole()
    check_turns(spans, 3)
    (attempt,) = spans.attempts
    assert [t.parent for t in spans.turns] == [attempt.id] * 3
    first, hit, last = spans.turns
    assert [t.of(c.OUTCOME) for t in (first, hit, last)] == ["fresh", "continued", "fresh"]
    assert hit.events.keys() == {c.ENGINE_LOST, c.SESSION_MOVED}
    lost, went_on = spans.below(hit)
    assert (lost.of(c.OUTCOME), went_on.of(c.OUTCOME)) == ("lost", "finished")
    assert (lost.of(c.GENERATION), went_on.of(c.GENERATION)) == (1, 2)
    assert lost.failed
    assert lost.of(c.ENGINE) == hit.events[c.ENGINE_LOST][c.ENGINE]
    assert went_on.of(c.ENGINE) == hit.events[c.SESSION_MOVED][c.ENGINE] == hit.of(c.ENGINE)
    assert went_on.events == {c.SESSION_RESUMED: {c.REUSED: went_on.of(c.REUSED)}}
    assert 16 <= hit.of(c.REUSED) == went_on.of(c.REUSED) <= lost.of(c.SAMPLED)
    assert hit.of(c.OUTPUT_TOKENS) == went_on.of(c.REUSED) + went_on.of(c.SAMPLED)
    assert [len(spans.below(t)) for t in (first, last)] == [1, 1]
    assert len({s.process for s in spans}) >= 3


async def test_of_an_agent_that_traces_itself_and_is_killed_everything_is_one_tree(
    traced: tuple[Stage, Spans], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, received = traced
    agent = ProcessAgent("traced_agent:run")
    monkeypatch.setattr(stage, "agent", agent)
    await stage.arm(Fault(Kind.AGENT_KILL, "itself-q", 2, 16))
    (result,) = await stage.run.run_trials([TASK], agent, prefix="itself-")
    assert (result.outcome, result.attempts) == ("completed", 2)
    spans = await spans_of(received, "itself-q", turns=5, generations=3)
    one, two = spans.attempts
    assert (one.of(c.REASON), two.failed) == ("infra", None)
    assert "the agent's process" in (one.failed or "")
    steps = spans.named("step")
    assert [s.name for s in spans.below(one)] == ["step 1"]  # the second was killed with its agent
    assert [s.name for s in spans.below(two)] == ["step 1", "step 2", "step 3"]
    assert all(len(spans.below(step)) == 1 for step in steps)
    assert {t.parent for t in spans.turns} - {s.id for s in steps} == {t.parent for t in spans.turns if t.of(c.CLIENT_LEFT)}
    (left,) = [t for t in spans.turns if t.of(c.CLIENT_LEFT)]
    assert left.of(c.ATTEMPT) == 1
    check_turns(spans, 3)
