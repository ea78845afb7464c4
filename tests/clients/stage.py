"""Clients in processes of their own, a run for them to talk to, and what is true of every conversation afterwards.

Owns which driver is whose, and the judge. The judge reads the history that was recorded (the network's tries, what the
client got, the session's records and trajectory, the engine's count of tokens) and knows nothing of how the gateway
decides.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from foreign import Driver
from network import Network, Plan, Try
from ray_run import Stage, staged

from rollout_ft.session.drift import load_renderer
from rollout_ft.session.hermes import tool_calls
from rollout_ft.session.parse import Parsed, assistant_message, sampled_text
from rollout_ft.session.render import ChatTemplate
from rollout_ft.testing.faults import Fault
from rollout_ft.trial.client import Session

HERE = Path(__file__).parent
DRIVERS = {"openai": "chat_openai", "anthropic": "chat_anthropic", "litellm": "chat_litellm", "mini-swe-agent": "chat_mini_swe_agent"}
CLIENTS = sorted(path.stem for path in (HERE / "requirements").glob("*.txt"))
TASK = {
    "prompt": "Explain tides.", "turns": 4, "max_tokens": 96, "stream": False, "tools": True, "timeout_s": 3.0, "retries": None,
    "repeats": 0, "history": "exclude_none", "idempotency": False,
}  # fmt: skip
SEED = 7
"""Of all sessions: the same conversation gets the same tokens, whatever befalls it."""


@dataclass
class Conversation:
    """Everything that is known of one conversation."""

    client: str
    session: Session
    got: list[dict[str, Any]]
    tries: list[Try]
    trajectory: dict[str, Any]
    records: list[dict[str, Any]]
    tokens_sampled: int

    @property
    def error(self) -> dict[str, Any]:
        return self.got[-1]["error"]

    def counts(self, turn: int) -> list[int]:
        """The retry counts of a turn's tries, in their order."""
        return [t.retry_count for t in self.tries if t.turn == turn]


@dataclass
class Clients:
    """A run with one engine, whose tokens are counted, and the drivers started so far."""

    stage: Stage
    count_file: Path
    drivers: dict[str, Driver] = field(default_factory=dict[str, Driver])
    numbers: Any = field(default_factory=itertools.count)
    renderer: ChatTemplate = field(init=False)

    def __post_init__(self) -> None:
        self.renderer = load_renderer(self.stage.run.config)

    async def open(self, *faults: Fault, **fields: Any) -> Session:
        """A session whose gateway and engine meet these faults: they are asked for when it is opened."""
        await self.stage.arm(*faults)
        return await self.stage.run.open_session(**{"trial_id": f"c{next(self.numbers)}", "seed": SEED, **fields})

    async def driver(self, client: str) -> Driver:
        if client not in self.drivers:
            script = HERE / "drivers" / f"{DRIVERS[client.rpartition('-')[0]]}.py"
            self.drivers[client] = await Driver.start(client, script)
        return self.drivers[client]

    async def talk(
        self, client: str, losses: Plan | None = None, *, session: Session | None = None, network: dict[str, Any] | None = None,
        **task: Any,
    ) -> Conversation:  # fmt: skip
        """One conversation, behind a network that loses what it is told to."""
        driver, session = await self.driver(client), session or await self.open()
        before = self.tokens_sampled()
        async with Network(self.stage.run.gateway_url, losses or {}, **network or {}) as net:
            base_url = f"{net.url}/sessions/{session.session_id}/v1"
            asked = {**TASK, "base_url": base_url, "api_key": session.api_key, **task}
            got = [said async for said in driver.converse(asked)]
        records = (await session.records())["records"]
        sampled = self.tokens_sampled() - before
        return Conversation(client, session, got, net.tries, await session.trajectory(), records, sampled)

    def tokens_sampled(self) -> int:
        return int(np.fromfile(self.count_file, dtype="<u8")[0])

    def judge(self, made: Conversation) -> None:
        """What holds for every conversation that came to its end. Raises AssertionError."""
        assert not any("error" in got for got in made.got), made.got[-1]
        assert {t.status for t in made.tries} <= {0, 200, 503}, "a retry, or what looks like one, was refused"
        turns = range(1, len(made.got) + 1)
        tries = {turn: [t for t in made.tries if t.turn == turn] for turn in turns}
        assert sum(map(len, tries.values())) == len(made.tries), "the client asked for something that nobody knows of"
        last = {turn: made.got[turn - 1]["id"][-32:] for turn in turns}
        for turn in turns:
            agree(tries[turn], last[turn])
        meta = made.trajectory["metadata"]
        assert meta["turns_committed"] == sum(samples(tries[turn]) for turn in turns)
        assert meta["generations"] == meta["turns_committed"], "something was generated more than once"
        assert meta["unanswered"] == 0, "the attempt is tainted"
        assert made.tokens_sampled == meta["tokens_generated"], f"no turn accounts for what the engine sampled\n{self.stage.events[-9:]}"
        kept = [turn for turn in turns if not made.got[turn - 1].get("rejected") or turn == turns[-1]]
        assert len(made.trajectory["paths"]) == 1
        self._path_is_what_was_got(made, made.trajectory["paths"][0], [(last[turn], made.got[turn - 1]) for turn in kept])

    def _path_is_what_was_got(self, made: Conversation, path: dict[str, Any], kept: list[tuple[str, dict[str, Any]]]) -> None:
        assert [turn["turn"] for turn in path["turns"]] == [key for key, _ in kept]
        assert [turn["evidence"] for turn in path["turns"][:-1]] == ["acknowledged"] * (len(kept) - 1)
        sampled = np.zeros(len(path["token_ids"]), dtype=np.int8)
        for turn, record, (key, got) in zip(path["turns"], made.records, kept, strict=True):
            sampled[turn["start"] : turn["end"]] = 1
            ids = path["token_ids"][turn["start"] : turn["end"]]
            content, calls = tool_calls(sampled_text(ids, self.renderer, stop=[]))
            message = assistant_message(Parsed(content, calls=tuple(calls)), key)
            assert essence(message) == essence(record["response"]["message"]) == essence_of_said(got)
        assert path["loss_mask"] == sampled.tolist()


def samples(tries: Sequence[Try]) -> int:
    """How many samples of one turn there may be.

    One, and one more for each request that nothing marks as a repeat and that came after the newest sample's reply had
    left the gateway whole: nobody behind the network can tell it from an agent that wants another answer.
    """
    count, delivered = 1, False
    for each in (t for t in tries if t.loss != "bad_gateway"):
        if delivered and not each.marked:
            count, delivered = count + 1, False
        delivered = delivered or each.delivered
    return count


def agree(tries: Sequence[Try], got: str) -> None:
    """All replies to one turn are the answer that the client got in the end.

    But for the samples that `samples` allows; these come one after the other. A stream that was kept alive had to begin
    before its turn was known: the client alone can say which it was.
    """
    keys = [*(t.turn_key for t in tries if t.turn_key), got]
    runs = [key for key, _ in itertools.groupby(keys)]
    assert len(runs) == len(set(runs)) <= samples(tries), Counter(keys)


def essence(message: dict[str, Any]) -> tuple[str, list[Any]]:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return (message.get("content") or "", [(c["name"], json.loads(c["arguments"])) for c in calls])


def essence_of_said(said: dict[str, Any]) -> tuple[str, list[Any]]:
    return (said["content"], [(c["name"], json.loads(c["arguments"])) for c in said["tool_calls"]])


@contextlib.asynccontextmanager
async def clients(count_file: Path) -> AsyncGenerator[Clients]:
    """A run whose engine takes a few tenths of a second for a turn, so that a reply can be waited for too short."""
    overrides = [
        "engine.count=1",
        "engine.token_timeout_s=10",
        "gateway.ping_s=5",
        f"engine.args=[--tokens-per-s,'250',--model,transformer,--count-file,{count_file}]",
        *SHORT_CONTEXT,
    ]
    async with staged(*overrides) as stage:
        made = Clients(stage, count_file)
        try:
            yield made
        finally:
            for driver in made.drivers.values():
                await driver.aclose()


SHORT_CONTEXT = ["model.context_tokens=4102", "session.max_output_tokens=512"]  # 4096 that can be used
