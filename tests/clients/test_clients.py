"""Real client libraries against a network that loses their requests and replies: one turn, one commit, one answer.

Every library runs in a process of its own environment, with its own timeouts, retries and message objects; README.md
says how to run one with one seed. The judge in stage.py says what must be true of every conversation. Where a proxy
swallows a reply that it was given whole and nothing marks the repeat, one more sample is what it costs (P2); those
places are the tests whose names say `costs`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from network import COUNT, Loss, Plan, plan
from stage import CLIENTS, TASK, Clients, Conversation, clients, samples

from rollout_ft.testing.faults import Fault, Kind

pytestmark = [pytest.mark.ray, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]

SEEDS = [int(seed) for seed in os.environ.get("CLIENT_SEEDS", "1,2").split(",")]
OPENAI = [c for c in CLIENTS if c.startswith("openai")]
ANTHROPIC = [c for c in CLIENTS if c.startswith("anthropic")]
LITELLM = [c for c in CLIENTS if c.startswith("litellm")]
MINI = [c for c in CLIENTS if c.startswith("mini-swe-agent")]
STREAMING = [c for c in CLIENTS if c not in MINI]
HEADER = "x-stainless-read-timeout"
each_client = pytest.mark.parametrize("client", CLIENTS)
each_stream = pytest.mark.parametrize(("client", "stream"), [(c, s) for c in CLIENTS for s in (False, True) if c in STREAMING or not s])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def made(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Clients]:
    async with clients(Path(tmp_path_factory.mktemp("engine")) / "tokens") as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def quiet(made: Clients) -> Any:
    """The conversation of a client without losses, made once: what every other must equal."""
    known: dict[str, Conversation] = {}

    async def of(client: str) -> Conversation:
        if client not in known:
            known[client] = await made.talk(client)
            made.judge(known[client])
        return known[client]

    return of


def data(made: Conversation) -> list[Any]:
    """What a trainer gets."""
    return [[path[key] for key in ("token_ids", "loss_mask", "logprobs")] for path in made.trajectory["paths"]]


def tries_of(made: Conversation, turn: int) -> list[Any]:
    return [t for t in made.tries if t.turn == turn]


# A network that loses nothing.


@each_client
async def test_a_quiet_network_needs_one_try_a_turn(quiet: Any, client: str):
    talk = await quiet(client)
    assert [(t.turn, t.outcome) for t in talk.tries] == [(turn, "fresh") for turn in range(1, TASK["turns"] + 1)]
    assert any(got["tool_calls"] for got in talk.got)


@pytest.mark.parametrize("client", [*OPENAI, *LITELLM])
async def test_every_client_of_a_route_gets_the_same_tokens(quiet: Any, client: str):
    assert data(await quiet(client)) == data(await quiet(OPENAI[0]))


@pytest.mark.parametrize(
    ("client", "history", "stream"),
    [
        (c, h, s)
        for c in CLIENTS
        for h, s in [("object", False), ("dump", False), ("object", True)]
        if c in STREAMING or (h, s) == ("object", False)
    ],
)
async def test_however_replies_are_kept_they_are_the_replies_that_were_sent(
    made: Clients, quiet: Any, client: str, stream: bool, history: str
):
    talk = await made.talk(client, history=history, stream=stream)
    made.judge(talk)
    assert data(talk) == data(await quiet(client))


# A network that loses what a seed says.


@pytest.mark.parametrize("seed", SEEDS)
@each_stream
async def test_whatever_is_lost_the_data_is_that_of_a_quiet_network(made: Clients, quiet: Any, client: str, stream: bool, seed: int):
    losses = plan(seed, TASK["turns"])
    print(f"{losses}\nreplay: make test-clients CLIENT_SEEDS={seed} ARGS=\"-k 'whatever_is_lost and {client}-{stream}'\"")
    # No library repeats a stream that has begun; a harness that does so marks it.
    talk = await made.talk(client, losses, stream=stream, repeats=2 * stream, idempotency=stream)
    made.judge(talk)
    assert {t.loss for t in talk.tries if t.loss} == {x for turn in losses.values() for x in turn} - {Loss.REFUSED}
    assert talk.trajectory["metadata"]["turns_committed"] == TASK["turns"]
    assert data(talk) == data(await quiet(client))


@pytest.mark.parametrize("loss", [x for x in Loss if x not in (Loss.REFUSED, Loss.IMPATIENT)])
@each_client
async def test_two_losses_of_a_kind_in_a_turn_are_survived_by_the_retries_of_the_library(
    made: Clients, quiet: Any, client: str, loss: Loss
):
    talk = await made.talk(client, {1: [loss, loss]}, turns=1, timeout_s=2.0)
    made.judge(talk)
    assert talk.counts(1) == [0, 1, 2]
    assert talk.got == (await quiet(client)).got[:1]


@pytest.mark.parametrize("kind", [Kind.CUT, Kind.GATEWAY_KILL])
@each_client
async def test_a_gateway_that_loses_a_reply_itself_is_asked_again(made: Clients, quiet: Any, client: str, kind: Kind):
    trial_id = f"{kind}-{client}"
    session = await made.open(Fault(kind, trial_id, 2), trial_id=trial_id)
    talk = await made.talk(client, session=session)
    made.judge(talk)
    assert len(tries_of(talk, 2)) > 1
    assert data(talk) == data(await quiet(client))


# Answers that take longer than the client waits.


async def slow(made: Clients, client: str, **options: Any) -> Conversation:
    """A second turn of three seconds, for a client that waits for two: its first retry comes before the answer is there."""
    trial_id = f"slow{next(made.numbers)}"
    session = await made.open(Fault(Kind.SLOW, trial_id, 2, 4, 18.0), trial_id=trial_id)
    talk = await made.talk(client, session=session, timeout_s=2.0, **options)
    made.judge(talk)
    return talk


@each_client
async def test_a_late_answer_is_announced_before_the_client_gives_up_and_its_retry_attaches(made: Clients, quiet: Any, client: str):
    talk = await slow(made, client)
    *early, last = tries_of(talk, 2)
    assert early
    assert {t.status for t in early} == {503}
    assert (last.status, last.outcome) == (200, "attached")
    assert data(talk) == data(await quiet(client))


@each_stream
async def test_a_client_whose_patience_is_not_known_gives_up_and_its_retry_attaches(made: Clients, quiet: Any, client: str, stream: bool):
    talk = await slow(made, client, stream=stream, network={"strip": frozenset({HEADER})})
    *early, last = tries_of(talk, 2)
    assert early
    assert {t.status for t in early} == {0}
    assert (last.status, last.outcome) == (200, "attached")
    assert data(talk) == data(await quiet(client))


@pytest.mark.parametrize("client", STREAMING)
async def test_a_stream_is_kept_alive_and_needs_no_second_try(made: Clients, quiet: Any, client: str):
    talk = await slow(made, client, stream=True)
    assert [t.status for t in tries_of(talk, 2)] == [200]
    assert data(talk) == data(await quiet(client))


# Where a repeat carries no mark: the network swallowed a reply that it had been given whole.


@pytest.mark.parametrize("client", STREAMING)
async def test_a_stream_cut_by_the_network_costs_one_more_sample_when_the_harness_asks_again(made: Clients, client: str):
    talk = await made.talk(client, {2: [Loss.CUT]}, stream=True, repeats=1)
    made.judge(talk)
    assert (talk.counts(2), samples(tries_of(talk, 2))) == ([0, 0], 2)


@pytest.mark.parametrize("client", STREAMING)
async def test_with_an_idempotency_key_it_costs_nothing(made: Clients, quiet: Any, client: str):
    talk = await made.talk(client, {2: [Loss.CUT]}, stream=True, repeats=1, idempotency=True)
    made.judge(talk)
    assert (talk.counts(2), samples(tries_of(talk, 2))) == ([0, 0], 1)
    assert data(talk) == data(await quiet(client))


@each_client
async def test_a_network_that_strips_the_mark_as_well_costs_one_more_sample_for_each_reply_it_swallows(made: Clients, client: str):
    losses: Plan = {1: [Loss.SWALLOWED, Loss.SWALLOWED], 3: [Loss.LATE]}
    talk = await made.talk(client, losses, network={"strip": frozenset({COUNT})}, timeout_s=2.0)
    made.judge(talk)
    assert [samples(tries_of(talk, turn)) for turn in (1, 2, 3, 4)] == [3, 1, 2, 1]
    assert talk.trajectory["metadata"]["turns_in_trajectory"] == TASK["turns"]


PHANTOM = [Loss.IMPATIENT, *[Loss.BAD_GATEWAY] * 3]
"""The first try is generated, and nobody is there to take the reply; the next that arrives is not marked."""


@pytest.mark.parametrize(("losses", "expected"), [(PHANTOM[:4], 1), ([Loss.SWALLOWED] * 4, 3)], ids=["phantom", "swallowed"])
@pytest.mark.parametrize("client", LITELLM)
async def test_litellms_own_retries_carry_no_mark_and_cost_a_sample_only_where_a_whole_reply_was_swallowed(
    made: Clients, client: str, losses: list[Loss], expected: int
):
    talk = await made.talk(client, {2: losses}, retries=2)
    made.judge(talk)
    assert talk.counts(2) == [0, 1, 2, 0, 0]
    assert samples(tries_of(talk, 2)) == expected


@pytest.mark.parametrize(("losses", "expected"), [(PHANTOM[:3], 1), ([Loss.SWALLOWED] * 5, 2)], ids=["phantom", "swallowed"])
@pytest.mark.parametrize("client", MINI)
async def test_mini_swe_agents_own_tries_cost_a_sample_only_where_a_whole_reply_was_swallowed(
    made: Clients, client: str, losses: list[Loss], expected: int
):
    talk = await made.talk(client, {2: losses}, turns=3)
    made.judge(talk)
    assert talk.counts(2) == [0, 1, 2, 0, 1, 2][: len(losses) + 1]
    assert samples(tries_of(talk, 2)) == expected


# What harnesses do of their own accord.


@pytest.mark.parametrize("client", MINI)
async def test_thirty_tries_of_one_turn_are_one_turn(made: Clients, client: str):
    talk = await made.talk(client, {1: [Loss.IMPATIENT] + [Loss.BAD_GATEWAY] * 28}, turns=2, network={"retry_after_ms": 1})
    made.judge(talk)
    assert talk.counts(1) == [0, 1, 2] * 10


@pytest.mark.parametrize("client", MINI)
async def test_replies_that_the_harness_drops_are_branches_and_not_in_the_trajectory(made: Clients, client: str):
    talk = await made.talk(client, {2: [Loss.SWALLOWED], 3: [Loss.CUT]}, max_tokens=12)
    made.judge(talk)
    assert [got.get("rejected") for got in talk.got] == [True] * 4
    meta = talk.trajectory["metadata"]
    assert (meta["turns_committed"], meta["turns_in_trajectory"]) == (4, 1)


# Errors that no retry cures.


@each_client
async def test_a_wrong_key_is_an_authentication_error_at_once(made: Clients, client: str):
    talk = await made.talk(client, api_key="wrong")
    assert (talk.error["class"], [t.status for t in talk.tries]) == ("AuthenticationError", [401])


@each_client
async def test_a_session_that_was_deleted_is_not_found_and_not_asked_again(made: Clients, client: str):
    session = await made.open()
    await made.stage.run.client.request("DELETE", f"/sessions/{session.session_id}", key=session.api_key)
    talk = await made.talk(client, session=session)
    assert (talk.error["class"], [t.status for t in talk.tries]) == ("NotFoundError", [404])


@each_client
async def test_a_conversation_that_is_too_long_is_the_error_that_the_library_has_for_it(made: Clients, client: str):
    talk = await made.talk(client, prompt="tides " * 4000)
    expected = "ContextWindowExceededError" if client in LITELLM + MINI else "BadRequestError"
    assert (talk.error["class"], [t.status for t in talk.tries]) == (expected, [400])
    assert "maximum context length is 4096 tokens" in talk.error["message"]


@each_client
async def test_a_500_that_no_retry_cures_is_not_asked_for_a_third_time_by_the_sdk(made: Clients, client: str):
    session = await made.open(recovery="abandon")
    talk = await made.talk(client, {1: [Loss.SWALLOWED]}, session=session)
    outer = [0] * 9 if client in MINI else []
    assert (talk.counts(1), talk.error["status"]) == ([0, 1, *outer], 500)
    assert talk.trajectory["metadata"]["turns_committed"] == 1
