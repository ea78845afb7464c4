"""Session, store and attempts under anything that can happen, in any order: P1, P2, P3 and P6.

One agent talks to one trial. Owners come and go, replies are lost, results come late, attempts are restarted. The
agent's own record of what it received is the judge.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson
from conftest import ask, assistant, turn_of, user
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rollout_ft.checkpoint.log import Accepted, Append, Entry, Head
from rollout_ft.checkpoint.state import StoreState
from rollout_ft.checkpoint.view import View
from rollout_ft.config import SessionConfig
from rollout_ft.errors import BadRequest
from rollout_ft.samples.trajectory import trajectory
from rollout_ft.session.entries import decode_entry, encode_entry
from rollout_ft.session.flight import Flight
from rollout_ft.session.session import Attach, Begin, Replay, Session
from rollout_ft.session.tree import Node
from rollout_ft.testing.plain import PlainTemplate
from rollout_ft.types import Answered, Opened, SessionSpec, Turn

TRIAL = "t1"


class Replica:
    """A store's rules, with the bodies beside them."""

    def __init__(self, name: str):
        self.rules = StoreState(name)
        self.rules.install(View(1, ("a", "b"), 2))
        self.bodies: list[Entry] = []

    def append(self, append: Append) -> bool:
        outcome = self.rules.append(1, append)
        if isinstance(outcome, Accepted) and outcome.stored:
            self.bodies.append(append.entry)
        return isinstance(outcome, Accepted)


@dataclass
class Owner:
    """One owner of the session, possibly one of the past."""

    session: Session
    attempt: int
    epoch: int
    seq: int
    doubt: bool = False
    flights: list[Flight] = field(default_factory=list)


class Promises(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.replicas = [Replica("a"), Replica("b")]
        self.owners: list[Owner] = []
        self.history: list[dict[str, Any]] = [user("start")]
        self.received: dict[str, bytes] = {}
        self.waiting: list[tuple[Owner, Any, Flight]] = []
        self.lost = False
        self.said = 0
        self.fenced_writes = 0
        self.take_over(new_attempt=True)

    @property
    def owner(self) -> Owner:
        return self.owners[-1]

    def take_over(self, new_attempt: bool, resume: bool = True) -> None:
        attempt = (self.owner.attempt if self.owners else 0) + new_attempt
        epoch = 1 if new_attempt else self.owner.epoch + 1
        for replica in self.replicas:
            assert isinstance(replica.rules.fence(1, TRIAL, attempt, epoch), Head)
        longest = max((r.bodies for r in self.replicas), key=len)
        for replica in self.replicas:  # what one replica has is committed
            for seq in range(len(replica.bodies), len(longest)):
                assert replica.append(Append(TRIAL, attempt, epoch, seq, longest[seq]))
        spec = SessionSpec(TRIAL)
        session = Session(spec, attempt, PlainTemplate(), SessionConfig(), run_seed=0, context_tokens=100_000)
        session.restore([decode_entry(e.kind, e.payload) for e in longest], [])
        owner = Owner(session, attempt, epoch, len(longest))
        self.owners.append(owner)
        if new_attempt:
            opened = Opened(spec, attempt, resume, 1)
            assert self.commit(owner, f"open/{attempt}", opened)
            session.restore([opened], [])
            self.history = [user("start")]
            self.received = {}
            self.lost = False
        self.waiting = []

    def commit(self, owner: Owner, key: str, entry: Opened | Turn | Answered, reach: int = 2) -> bool:
        """True when every replica has it. `reach` below 2: the owner is lost in the middle, and stays in doubt."""
        if owner.doubt:
            return False
        kind, payload = encode_entry(entry)
        append = Append(TRIAL, owner.attempt, owner.epoch, owner.seq, Entry(kind, key, payload))
        accepted = [r.append(append) for r in self.replicas[:reach]]
        if owner is not self.owner:
            self.fenced_writes += any(accepted)
        if reach < 2 or not all(accepted):
            owner.doubt = True
            return False
        owner.seq += 1
        return True

    def receive(self, owner: Owner, request: Any, node: Node, *, delivered: bool) -> None:
        """The reply arrives at the agent, or does not."""
        self.lost = not delivered
        if not delivered:
            return
        reply = orjson.loads(node.turn.reply)
        key = node.turn.key
        assert self.received.get(key, node.turn.output_ids) == node.turn.output_ids
        self.received[key] = node.turn.output_ids
        owner.session.delivered(request.request_id)
        self.said += 1
        self.history = [*request.messages, assistant(reply["content"]), user(f"and {self.said}")]

    @rule(retry=st.booleans())
    def request(self, retry: bool) -> None:
        """The agent asks for its next turn; a repeat after a lost reply may carry the SDK's mark or not."""
        owner = self.owner
        request = ask(*self.history, retry=retry and self.lost)
        try:
            decision = owner.session.decide(request)
        except BadRequest:  # too many in flight
            return
        match decision:
            case Begin(flight):
                owner.session.take_off(flight)
                owner.session.join(flight, request)
                owner.flights.append(flight)
                self.waiting.append((owner, request, flight))
            case Attach(flight):
                owner.session.join(flight, request)
                self.waiting.append((owner, request, flight))
            case Replay(node, first):
                assert node.turn.key in owner.session.tree.nodes
                if first:
                    entry = Answered(node.turn.key, request.request_id)
                    if not self.commit(owner, f"answer/{request.request_id}", entry):
                        return
                owner.session.replayed(node, request)
                self.receive(owner, request, node, delivered=True)

    @precondition(lambda self: any(o.flights for o in self.owners))
    @rule(data=st.data(), reach=st.sampled_from([0, 1, 2, 2, 2]), delivered=st.booleans())
    def finish(self, data: st.DataObject, reach: int, delivered: bool) -> None:
        """Any flight of any owner, present or past, ends; its commit may reach only some replicas, its reply may be lost."""
        owner = data.draw(st.sampled_from([o for o in self.owners if o.flights]))
        flight = owner.flights.pop(data.draw(st.integers(0, len(owner.flights) - 1)))
        turn = turn_of(flight, f"says {flight.key[:6]}", owner.session)
        callers = [w for w in self.waiting if w[0] is owner and w[2] is flight]
        self.waiting = [w for w in self.waiting if w not in callers]
        for _, request, _ in callers:
            owner.session.leave(flight, request.request_id)
        if not self.commit(owner, owner.session.entry_key(turn.key), turn, reach):
            owner.session.drop(flight)
            self.lost = True
            if owner is self.owner:
                self.take_over(new_attempt=False)
            return
        node = owner.session.committed(turn)
        if owner is not self.owner:
            return
        for _, request, _ in callers[-1:]:
            self.receive(owner, request, node, delivered=delivered)

    @rule()
    def the_client_gives_up_waiting(self) -> None:
        for owner, request, flight in self.waiting:
            owner.session.leave(flight, request.request_id)
        self.lost = self.lost or bool(self.waiting)
        self.waiting = []

    @rule()
    def the_owner_dies(self) -> None:
        """It may still be alive somewhere, and finish what it began."""
        self.lost = self.lost or bool(self.waiting)
        self.take_over(new_attempt=False)

    @rule(resume=st.booleans())
    def the_trial_is_restarted(self, resume: bool) -> None:
        self.take_over(new_attempt=True, resume=resume)

    @invariant()
    def what_the_agent_received_is_on_every_replica_exactly_once(self) -> None:
        for replica in self.replicas:
            turns = [decode_entry(e.kind, e.payload) for e in replica.bodies if e.kind == "turn"]
            keys = [t.key for t in turns if isinstance(t, Turn)]
            for key, output in self.received.items():
                found = [t for t in turns if isinstance(t, Turn) and t.key == key]
                assert [t.output_ids for t in found][-1:] == [output]
            since = max((i for i, e in enumerate(replica.bodies) if e.kind == "open"), default=0)
            fresh = [e.key for e in replica.bodies[since:] if e.kind == "turn"]
            assert len(fresh) == len(set(fresh)) <= len(keys)

    @invariant()
    def the_past_never_writes(self) -> None:
        assert self.fenced_writes == 0

    @invariant()
    def the_trajectory_has_what_the_agent_built_on_and_no_phantom(self) -> None:
        made = trajectory(self.owner.session)
        last = self.owner.session.evidence
        for path in made["paths"]:
            for turn in path["turns"]:
                assert turn["turn"] in self.received or turn["evidence"] == "uncertain"
        contained = {t["turn"] for p in made["paths"] for t in p["turns"]}
        built_on = {k for k in last.acknowledged if k in self.owner.session.tree.nodes}
        assert built_on <= contained

    @invariant()
    def each_sampled_token_is_trained_once(self) -> None:
        made = trajectory(self.owner.session)
        turns = {t["turn"]: t["end"] - t["start"] for p in made["paths"] for t in p["turns"]}
        assert sum(int(p["loss_mask"].sum()) for p in made["paths"]) == sum(turns.values())


Promises.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestPromises = Promises.TestCase
