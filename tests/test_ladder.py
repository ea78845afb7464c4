"""What a refused engine call costs, how long the next one waits, and how many retries a fleet bears."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.config import RetryConfig
from rollout_ft.engine.budgets import RetryBudget, Terms
from rollout_ft.engine.ladder import Again, GiveUp, after_refusal, backoff_s
from rollout_ft.errors import EngineRefused

CONFIG = RetryConfig()
ANY_STATUS = st.sampled_from((None, 429, 500, 502, 503, 504))


def after(status: int | None, **given: object) -> Again | GiveUp:
    told = {"excused": False, "spent": 1, "max_spent": 6, "refusals": 1, "config": CONFIG, "luck": 0.5, **given}
    return after_refusal(EngineRefused(status, "no", float(told.pop("retry_after_s", 0.0))), **told)  # type: ignore[arg-type]


@given(ANY_STATUS, st.integers(1, 1000), st.integers(0, 1000), st.floats(0, 1))
def test_what_a_pause_caused_costs_nothing_and_is_done_again_at_once(status: int | None, spent: int, refusals: int, luck: float):
    assert after(status, excused=True, spent=spent, refusals=refusals, luck=luck) == Again(0, costs=False, retry=False)


@pytest.mark.parametrize("excused", [True, False])
def test_a_wrong_request_is_the_answer(excused: bool):
    assert isinstance(after(400, excused=excused), GiveUp)


@pytest.mark.parametrize("status", [429, 503, None])
def test_an_engine_without_room_and_an_abort_by_its_owner_cost_no_generation(status: int | None):
    then = after(status, spent=6)
    assert isinstance(then, Again)
    assert not then.costs


@given(ANY_STATUS, st.integers(1, 100), st.integers(1, 100))
def test_no_turn_is_tried_for_ever(status: int | None, spent: int, refusals: int):
    then = after(status, spent=spent, refusals=refusals)
    free = status in (None, 429, 503)
    over = refusals >= CONFIG.max_refusals_per_turn if free else spent >= 6
    assert isinstance(then, GiveUp) == over
    if isinstance(then, GiveUp):
        assert then.error.status == 500


@given(st.integers(1, 10_000), st.floats(0, 1))
def test_the_pause_is_anything_up_to_a_bound_that_doubles_and_ends(times: int, luck: float):
    bound = min(CONFIG.max_backoff_s, CONFIG.backoff_s * 2 ** min(times - 1, 60))
    assert backoff_s(times, CONFIG, luck) == pytest.approx(luck * bound)


@pytest.mark.parametrize(("told", "waits"), [(0, 0.1), (3, 3), (600, 60)])
def test_what_the_engine_asks_for_is_waited_within_reason(told: float, waits: float):
    then = after(503, retry_after_s=told)
    assert isinstance(then, Again)
    assert then.pause_s == pytest.approx(waits)


# -- the budget of retries --------------------------------------------------------------------------------------------

TERMS = Terms(share=0.2, floor_per_s=1.0, burst=10.0)


def test_a_burst_is_free_and_what_follows_waits_for_its_turn():
    budget = RetryBudget(TERMS, 0.0)
    assert [budget.retry(0.0) for _ in range(13)] == [0.0] * 10 + [1.0, 2.0, 3.0]
    assert budget.spent


def test_every_call_brings_a_fifth_of_a_retry():
    budget = RetryBudget(TERMS, 0.0)
    for _ in range(20):
        budget.retry(0.0)
    for _ in range(55):
        budget.called()
    assert budget.retry(0.0) == pytest.approx(0.0)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=400))
def test_retries_are_never_more_than_their_share_and_each_has_its_turn(story: list[tuple[bool, float]]):
    budget, now, calls, retries = RetryBudget(TERMS, 0.0), 0.0, 0, list[float]()
    for retry, pause_s in story:
        now += pause_s
        if retry:
            wait_s = budget.retry(now)
            assert 0 <= wait_s <= (len(retries) + 1) / TERMS.floor_per_s
            retries.append(now + wait_s)
        else:
            calls += 1
            budget.called()
    end = max([now, *retries])
    assert len(retries) <= TERMS.burst + TERMS.share * calls + TERMS.floor_per_s * end + 1e-6
