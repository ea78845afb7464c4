"""Sessions against a reference that keeps everything and works every answer out anew.

The reference has the list of all requests and of what became of each, and no index: which turn a request extends, which
samples there are and who has them is found by looking through all of it. Owners change in the middle; the next one has
the entries of the log and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import orjson
from conftest import ask, ask_tokens, assistant, make_session, turn_of, user
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rollout_ft.config import SessionConfig
from rollout_ft.samples.trajectory import trajectory
from rollout_ft.session.entries import SessionEntry, decode_entry, encode_entry
from rollout_ft.session.flight import Flight
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.session import Attach, Begin, Replay, Session
from rollout_ft.session.tree import ids_of, path_ids
from rollout_ft.testing.plain import STOP
from rollout_ft.types import JSON, Answered, Opened

MAX_REPLAYS = 2
MAX_VAIN_REPLAYS = 3


@dataclass
class Sample:
    """One sample as the reference knows it: the whole request, the whole prompt in tokens, and what became of it."""

    request: TurnRequest
    parent: Sample | None
    number: int
    order: int
    key: str
    prompt: list[int]
    reply: str | None = None
    waiting: set[str] = field(default_factory=set)
    got: set[str] = field(default_factory=set)
    delivered: bool = False
    acknowledged: bool = False
    unheard: bool = False
    replays: int = 0

    @property
    def answered(self) -> bool:
        return self.delivered or self.acknowledged

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *(self.reply or "").encode(), STOP]

    @property
    def said(self) -> list[JSON]:
        """The conversation with its reply; none for a prompt in tokens."""
        return [*self.request.messages, assistant(self.reply or "")] if self.request.messages else []


def plain(messages: list[JSON]) -> list[tuple[str, str]]:
    """Messages, whatever their spelling."""
    found: list[tuple[str, str]] = []
    for m in messages:
        text = "".join(p["text"] for p in m["content"]) if isinstance(m["content"], list) else m["content"]
        found.append((m["role"], text.strip() if m["role"] == "assistant" else text))
    return found


class Reference:
    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def parent(self, request: TurnRequest) -> tuple[Sample | None, int]:
        """The turn that the request extends, and how long what it shares with it is."""
        best: tuple[tuple[int, int, int], Sample | None] = ((0, 0, -1), None)
        committed = [s for s in self.samples if s.reply is not None]
        committed.sort(key=lambda s: COMMITS.index(s.key))
        for at, sample in enumerate(committed):
            shared = self.shared(request, sample)
            rank = 2 * sample.answered + 1
            if shared:
                best = max(best, ((shared, rank, at), sample), key=lambda b: b[0])
        return best[1], best[0][0]

    def shared(self, request: TurnRequest, sample: Sample) -> int:
        if request.input_ids is None:
            return len(sample.said) if sample.said and plain(request.messages)[: len(sample.said)] == plain(sample.said) else 0
        ids, tokens = ids_of(request.input_ids), sample.tokens
        if ids[: len(tokens)] == tokens:
            return len(tokens)
        return len(tokens) - 1 if sample.reply and ids[: len(tokens) - 1] == tokens[:-1] else 0

    def same(self, request: TurnRequest) -> list[Sample]:
        """All samples of what this request asks for."""
        parent, _ = self.parent(request)
        found = [s for s in self.samples if s.parent is parent and self.body(s.request, parent) == self.body(request, parent)]
        return sorted(found, key=lambda s: s.number)

    def body(self, request: TurnRequest, parent: Sample | None) -> object:
        """What is new in it after that parent."""
        if request.input_ids is None:
            return plain(request.messages[len(parent.said) if parent else 0 :])
        ids, shared = ids_of(request.input_ids), self.shared(request, parent) if parent else 0
        return len(parent.tokens) - shared if parent else 0, ids[shared:]

    def answer(self, request: TurnRequest) -> tuple[str, Sample | int]:
        """DESIGN section 5, read aloud."""
        same = self.same(request)
        flying = [s for s in same if s.reply is None]
        recorded = [s for s in same if s.reply is not None]
        left = [s for s in flying if not s.waiting]
        if left:
            return "attach", left[-1]
        if flying and request.retry:
            return "attach", flying[-1]
        unknown = [s for s in recorded if not s.answered and s.replays < MAX_VAIN_REPLAYS]
        if unknown:
            return "replay", unknown[0]
        if recorded and request.retry and recorded[-1].replays < MAX_REPLAYS:
            return "replay", recorded[-1]
        return "generate", same[-1].number + 1 if same else 0

    def acknowledge(self, request: TurnRequest) -> None:
        sample, _ = self.parent(request)
        while sample is not None:
            sample.replays = sample.replays if sample.answered else 0
            sample.acknowledged = True
            sample = sample.parent

    def trained(self) -> set[str]:
        """What has to be in the trajectory: what arrived, but for what was asked for again, and the last in doubt."""
        committed = [s for s in self.samples if s.reply is not None]
        last = max((s for s in committed if s.answered or not s.unheard), key=lambda s: s.order, default=None)
        while last is not None and not last.answered and any(s.answered for s in self.siblings(last)):
            earlier = [s for s in committed if s.order < last.order and (s.answered or not s.unheard)]
            last = max(earlier, key=lambda s: s.order, default=None)
        kept = {s.key for s in committed if s.answered and (s is last or not self.thrown_away(s))}
        while last is not None:
            kept.add(last.key)
            last = last.parent
        return kept

    def siblings(self, sample: Sample) -> list[Sample]:
        """All committed samples of what it is a sample of, itself included."""
        mine = self.body(sample.request, sample.parent)
        same = [s for s in self.samples if s.parent is sample.parent and self.body(s.request, s.parent) == mine]
        return [s for s in same if s.reply is not None]

    def thrown_away(self, sample: Sample) -> bool:
        others = [s for s in self.siblings(sample) if s is not sample]
        return not sample.acknowledged and any(s.acknowledged or (s.delivered and s.order > sample.order) for s in others)


COMMITS: list[str] = []
"""Keys in the order in which they were committed."""


class Sessions(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.reference = Reference()
        COMMITS.clear()
        self.log: list[tuple[str, bytes]] = []
        self.write(Opened(make_session().spec, 1, False, 1))
        self.flights: dict[str, Flight] = {}
        self.order = 0
        self.owner()

    def write(self, entry: SessionEntry) -> None:
        self.log.append(encode_entry(entry))

    def owner(self) -> None:
        self.session: Session = make_session(
            SessionConfig(max_replays=MAX_REPLAYS, max_vain_replays=MAX_VAIN_REPLAYS, max_in_flight=10_000), context_tokens=10**6
        )
        self.session.restore([decode_entry(*e) for e in self.log], [])

    # -- requests: a conversation that somebody might send, spelled in one way or another

    @rule(data=st.data(), retry=st.booleans(), spelling=st.sampled_from(["as it is", "parts", "stripped"]))
    def messages(self, data: st.DataObject, retry: bool, spelling: str) -> None:
        known = [s for s in self.reference.samples if s.said and s.reply is not None]
        history = data.draw(st.sampled_from(known)).said if known and data.draw(st.integers(0, 4)) else []
        keep = data.draw(st.sampled_from([len(history), *range(0, len(history) + 1, 2)]))
        spoken = [{"role": role, "content": text} for role, text in plain(history[:keep])]
        history = [*spoken, user(data.draw(st.sampled_from(["a", "b"])))]
        if spelling == "parts":
            history = [{**m, "content": [{"type": "text", "text": m["content"]}]} if m["role"] == "user" else m for m in history]
        if spelling == "stripped":
            history = [{**m, "content": m["content"] + "\n"} if m["role"] == "assistant" else m for m in history]
        self.ask(ask(*history, retry=retry, digests=self.session.digests(b"", history)))

    @rule(data=st.data(), retry=st.booleans(), stop=st.booleans())
    def tokens(self, data: st.DataObject, retry: bool, stop: bool) -> None:
        known = [s for s in self.reference.samples if s.reply is not None]
        start = data.draw(st.sampled_from(known)).tokens if known and data.draw(st.integers(0, 2)) else []
        self.ask(ask_tokens([*(start if stop else start[:-1]), data.draw(st.sampled_from([1, 2]))], retry=retry))

    def ask(self, request: TurnRequest) -> None:
        what, expected = self.reference.answer(request)
        parent, shared = self.reference.parent(request)
        decision = self.session.decide(request)
        self.reference.acknowledge(request)
        match decision:
            case Begin(flight):
                assert (what, expected) == ("generate", flight.number)
                assert (flight.parent.turn.key if flight.parent else None) == (parent.key if parent else None)
                self.order += 1
                prompt = [int(i) for i in bytes(flight.input_json).split(b",")]
                if request.input_ids is not None:
                    assert prompt == ids_of(request.input_ids)
                else:
                    assert prompt[: len(parent.tokens) if parent else 0] == (parent.tokens if parent else [])
                sample = Sample(request, parent, flight.number, self.order, flight.key, prompt)
                sample.waiting.add(request.request_id)
                self.reference.samples.append(sample)
                self.session.take_off(flight)
                self.session.join(flight, request)
                self.flights[flight.key] = flight
            case Attach(flight):
                assert isinstance(expected, Sample)
                assert (what, expected.key) == ("attach", flight.key)
                expected.waiting.add(request.request_id)
                self.session.join(flight, request)
            case Replay(node, first):
                assert isinstance(expected, Sample)
                assert (what, expected.key) == ("replay", node.turn.key)
                assert orjson.loads(node.turn.reply)["content"] == expected.reply
                assert first == expected.unheard
                entry = self.session.answer(node, request) if first else None
                if entry is not None:
                    self.write(entry)
                    self.order += 1
                self.session.replayed(node, request, entry)
                self.order += entry is None
                expected.unheard = False
                expected.replays += 1
                expected.got.add(request.request_id)
        assert shared >= 0

    # -- what becomes of them

    @precondition(lambda self: self.flights)
    @rule(data=st.data(), text=st.sampled_from(["x", "y", " x ", "long"]))
    def a_turn_ends(self, data: st.DataObject, text: str) -> None:
        flight = self.flights.pop(data.draw(st.sampled_from(sorted(self.flights))))
        sample = self.by_key(flight.key)
        turn = replace(turn_of(flight, text, self.session), unheard=not flight.callers)
        self.write(turn)
        COMMITS.append(turn.key)
        node = self.session.committed(turn)
        sample.reply, sample.unheard, sample.got = text, not sample.waiting, sample.got | sample.waiting
        for request_id in flight.joined:
            self.session.leave(flight, request_id)
        assert ids_of(path_ids(node)) == sample.tokens

    @precondition(lambda self: any(s.got and not s.delivered for s in self.reference.samples))
    @rule(data=st.data())
    def a_reply_arrives(self, data: st.DataObject) -> None:
        sample = data.draw(st.sampled_from([s for s in self.reference.samples if s.got and not s.delivered]))
        self.session.delivered(data.draw(st.sampled_from(sorted(sample.got))))
        sample.replays = sample.replays if sample.answered else 0
        sample.delivered = True

    @precondition(lambda self: any(s.waiting and s.reply is None for s in self.reference.samples))
    @rule(data=st.data())
    def a_client_leaves(self, data: st.DataObject) -> None:
        sample = data.draw(st.sampled_from([s for s in self.reference.samples if s.waiting and s.reply is None]))
        who = data.draw(st.sampled_from(sorted(sample.waiting)))
        sample.waiting.discard(who)
        flight = self.flights[sample.key]
        self.session.leave(flight, who)

    @rule()
    def the_owner_is_replaced(self) -> None:
        """What is in flight is lost with its owner; evidence that rode no commit is saved, as at an end."""
        acks, deliveries = self.session.evidence.take_unsaved()
        self.write(Answered(acknowledged=acks, delivered=deliveries))
        self.reference.samples = [s for s in self.reference.samples if s.reply is not None]
        self.flights = {}
        for sample in self.reference.samples:
            sample.replays, sample.got = 0, set()
        orders = [decode_entry(*e) for e in self.log]
        self.order = max((e.order for e in orders if not isinstance(e, Opened) and hasattr(e, "order")), default=0)  # pyright: ignore
        self.owner()

    def by_key(self, key: str) -> Sample:
        return next(s for s in self.reference.samples if s.key == key)

    # -- what always holds

    @invariant()
    def the_trajectory_is_what_the_reference_says_and_trains_each_token_once(self) -> None:
        made = trajectory(self.session)
        assert {t["turn"] for p in made["paths"] for t in p["turns"]} == self.reference.trained()
        trained: dict[str, Any] = {}
        for path in made["paths"]:
            assert path["token_ids"].tolist() == self.by_key(path["turns"][-1]["turn"]).tokens
            for t in path["turns"]:
                trained[t["turn"]] = trained.get(t["turn"], 0) + int(path["loss_mask"][t["start"] : t["end"]].sum())
        for key, count in trained.items():
            said = len((self.by_key(key).reply or "").encode()) + 1
            assert count in (said, said - 1), "only a stop token that the next prompt leaves out is not trained"
        m = made["metadata"]
        assert m["turns_committed"] == m["turns_in_trajectory"] + m["phantoms"] + m["resampled"]
        assert m["turns_committed"] == m["turns_served"] == sum(s.reply is not None for s in self.reference.samples)


Sessions.TestCase.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)
TestSessions = Sessions.TestCase
