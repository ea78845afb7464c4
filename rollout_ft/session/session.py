"""One attempt of one trial: which turn a request is, and what it gets.

Owns the decisions of DESIGN section 5. Pure: it starts nothing and waits for nothing; the engine actor does what it
decides, commits, and tells it. A turn enters the tree only when the store has it, so that whatever is served from
here is committed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec
import orjson

from rollout_ft.config import SessionConfig
from rollout_ft.errors import BadRequest, SessionClosed, TrialFault
from rollout_ft.session.classify import Choice, Sample, choose
from rollout_ft.session.evidence import Evidence
from rollout_ft.session.render import Renderer
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.special import refuse_special_tokens
from rollout_ft.session.tree import Node, Tree, base_key, digest_tokens, ids_bytes, path, turn_key
from rollout_ft.types import Answered, Ended, Opened, Partial, Recovery, SessionSpec, Turn, session_id


@dataclass(slots=True, eq=False)
class Flight:
    """A turn that is being generated. `callers` are the requests that wait for it now."""

    key: str
    base: str
    number: int
    parent: Node | None
    request: TurnRequest
    new_from: int
    prompt_ids: bytes
    prompt_json: bytes
    prompt_tokens: int
    max_new_tokens: int
    seed: int
    partial: Partial | None = None
    callers: set[str] = field(default_factory=set[str])
    joined: list[TurnRequest] = field(default_factory=list[TurnRequest])

    @property
    def prompt_digest(self) -> str:
        return digest_tokens(self.parent.token_digest if self.parent else b"", self.prompt_ids).hex()

    def input_json(self) -> bytes:
        """All ids before the output, as JSON without brackets: joined, never encoded again."""
        return b",".join([*reversed([n.ids_json for n in path(self.parent)]), self.prompt_json])


@dataclass(frozen=True, slots=True)
class Begin:
    flight: Flight


@dataclass(frozen=True, slots=True)
class Attach:
    flight: Flight


@dataclass(frozen=True, slots=True)
class Replay:
    node: Node
    first: bool
    """Not asked for in this attempt before: that has to be recorded before the reply leaves."""


Decision = Begin | Attach | Replay


class Session:
    def __init__(
        self,
        spec: SessionSpec,
        attempt: int,
        renderer: Renderer,
        config: SessionConfig,
        *,
        run_seed: int,
        context_tokens: int,
    ):
        self.spec, self.attempt, self.config = spec, attempt, config
        self.id = session_id(spec.trial_id, attempt)
        self.tree, self.evidence = Tree(), Evidence()
        self.flights: dict[str, Flight] = {}
        self.partials: dict[str, Partial] = {}
        self.counts: Counter[str] = Counter()
        self.ended: Ended | None = None
        self.fault = ""
        self.lineage = 1
        """The attempt that began from nothing last: turns of another lineage are other turns, whatever their keys."""
        self._renderer, self._context_tokens = renderer, context_tokens
        seed = f"{spec.seed}" if spec.seed is not None else f"{run_seed}|{spec.trial_id}"
        self._seed = blake2b(seed.encode(), digest_size=16).digest()
        self._requests: dict[str, str] = {}
        self._idempotent: dict[str, tuple[str, str]] = {}

    def restore(self, entries: list[Opened | Turn | Answered | Ended], partials: list[Partial]) -> None:
        """Rebuilds the state that the entries of a checkpoint made; the attempt is that of the last `Opened`."""
        for entry in entries:
            match entry:
                case Opened():
                    self.spec, self.attempt, self.evidence, self.fault = entry.spec, entry.attempt, Evidence(), ""
                    if not entry.resume:
                        self.tree, self.lineage = Tree(), entry.attempt
                        self._requests, self._idempotent = {}, {}
                case Turn():
                    self._remember(self.tree.add(entry))
                    self.evidence.restore(entry.acknowledged, entry.delivered)
                case Answered():
                    if entry.turn_key:
                        self.evidence.asked.setdefault(entry.turn_key)
                        self.evidence.unheard.discard(entry.turn_key)
                        self._requests[entry.request_id] = entry.turn_key
                    if entry.failed.startswith(FAULT):
                        self.fault = entry.failed.removeprefix(FAULT)
                    elif entry.failed:
                        self.evidence.failed[entry.failed] = True
                    self.evidence.restore(entry.acknowledged, entry.delivered)
                case Ended():
                    self.ended = entry
        self.id = session_id(self.spec.trial_id, self.attempt)
        found = {p.turn_key.removeprefix(f"{self.lineage}/"): p for p in partials}
        self.partials = {key: p for key, p in found.items() if "/" not in key and key not in self.tree.nodes}

    def decide(self, request: TurnRequest) -> Decision:
        """What this request gets. Marks what it acknowledges; registers a caller only in `join`.

        Raises BadRequest (4xx), SessionClosed, or TrialFault where the trial does not survive what happened.
        """
        if self.ended is not None:
            raise SessionClosed(f"trial {self.spec.trial_id} has ended ({self.ended.outcome}); open another session")
        if self.fault:
            raise TrialFault(self.spec.trial_id, self.fault)
        known = self._requests.get(request.request_id)
        if known is not None:
            return self._again(known)
        parent, new_from = self.tree.deepest(request.digests, self.evidence.rank)
        base = base_key(parent.turn.key if parent else "", request.digests[-1], _sampling(request))
        key = self._same_idempotency_key(request, base)
        if key is not None:
            return self._again(key)
        self.evidence.acknowledge(parent)
        choice = self._choose(base, request)
        if choice.action == "generate":
            return Begin(self._begin(request, parent, new_from, base, choice.number))
        return self._again(turn_key(base, choice.number))

    def entry_key(self, key: str) -> str:
        """What makes a turn's entry in the checkpoint idempotent."""
        return f"{self.lineage}/{key}"

    def join(self, flight: Flight, request: TurnRequest) -> None:
        """The request waits for this flight from now on."""
        flight.callers.add(request.request_id)
        flight.joined.append(request)
        self._requests[request.request_id] = flight.key
        if request.idempotency_key:
            self._idempotent[request.idempotency_key] = (flight.base, flight.key)

    def leave(self, flight: Flight, request: TurnRequest) -> bool:
        """The request does not wait any more; True when nobody does."""
        flight.callers.discard(request.request_id)
        return not flight.callers

    def take_off(self, flight: Flight) -> None:
        self.flights[flight.key] = flight

    def drop(self, flight: Flight) -> None:
        """The flight ended without a turn; what it had stays as its partial."""
        self.flights.pop(flight.key, None)
        for request in flight.joined:
            self._requests.pop(request.request_id, None)
            self._idempotent.pop(request.idempotency_key, None)

    def committed(self, turn: Turn) -> Node:
        """The store has the turn: it is part of the tree from now on."""
        self.flights.pop(turn.key, None)
        self.partials.pop(turn.key, None)
        node = self.tree.add(turn)
        self._remember(node)
        return node

    def replayed(self, node: Node, request: TurnRequest) -> None:
        """The recorded reply goes to this request; the store knows when it is the first time."""
        self.evidence.asked.setdefault(node.turn.key)
        self.evidence.unheard.discard(node.turn.key)
        self.evidence.replays[node.turn.key] = self.evidence.replays.get(node.turn.key, 0) + 1
        self._requests[request.request_id] = node.turn.key
        self.counts["replayed"] += 1

    def delivered(self, request_id: str) -> None:
        key = self._requests.get(request_id)
        if key is not None and key in self.tree.nodes:
            self.evidence.deliver(key)

    def failed(self, request: TurnRequest) -> str:
        """A client was told 5xx: what it asked for, to be recorded."""
        parent, _ = self.tree.deepest(request.digests, self.evidence.rank)
        base = base_key(parent.turn.key if parent else "", request.digests[-1], _sampling(request))
        self.evidence.failed[base] = True
        return base

    def unanswered(self) -> list[str]:
        """Bodies that ended in our 5xx and were never answered later: they taint the attempt (P4)."""
        return [b for b in self.evidence.failed if not any(self.evidence.answered(n.turn.key) for n in self.tree.samples(b))]

    def lost(self, reason: str) -> TrialFault:
        """An infrastructure fault met a trial that does not survive it."""
        self.fault = self.fault or reason
        return TrialFault(self.spec.trial_id, self.fault)

    @property
    def survives(self) -> bool:
        return self.spec.recovery == Recovery.RESUME

    def _again(self, key: str) -> Decision:
        flight = self.flights.get(key)
        if flight is not None:
            return Attach(flight)
        first = key not in self.evidence.asked or key in self.evidence.unheard
        return Replay(self.tree.nodes[key], first)

    def _choose(self, base: str, request: TurnRequest) -> Choice:
        ev = self.evidence
        samples = [
            Sample(n.turn.sample, False, 0, n.turn.key in ev.asked, ev.answered(n.turn.key), ev.replays.get(n.turn.key, 0))
            for n in self.tree.samples(base)
        ]
        samples += [Sample(f.number, True, len(f.callers)) for f in self.flights.values() if f.base == base]
        choice = choose(
            sorted(samples, key=lambda s: s.number),
            retry=request.retry,
            new_idempotency_key=bool(request.idempotency_key),
            on_concurrent=self.config.on_concurrent,
            on_repeat=self.config.on_repeat,
        )
        if not self.survives and (choice.action != "generate" or request.resent):
            raise self.lost("lost_reply" if choice.action != "generate" else "engine_lost")
        return choice

    def _same_idempotency_key(self, request: TurnRequest, base: str) -> str | None:
        known = self._idempotent.get(request.idempotency_key) if request.idempotency_key else None
        if known is None:
            return None
        if known[0] != base:
            raise BadRequest(
                "this Idempotency-Key was used with another request; use a new key for a new request",
                status=422,
                code="idempotency_key_reused",
            )
        return known[1]

    def _begin(self, request: TurnRequest, parent: Node | None, new_from: int, base: str, number: int) -> Flight:
        if len(self.tree.nodes) >= self.config.max_turns:
            raise BadRequest(f"the session has {self.config.max_turns} turns (session.max_turns); open another", code="too_many_turns")
        if len(self.flights) >= self.config.max_in_flight:
            raise BadRequest("too many requests of this session in flight (session.max_in_flight)", status=429, code="too_many_in_flight")
        if self.tree.tokens >= self.config.max_tokens:
            raise BadRequest(f"the session has {self.tree.tokens} tokens (session.max_tokens); open another", code="too_many_tokens")
        new = request.messages[new_from:]
        if self.config.special_tokens_in_text == "refuse":
            refuse_special_tokens(new, self._renderer.special_texts)
        ids = self._renderer.after(parent.last_id, new, request.tool_list) if parent else self._renderer.root(new, request.tool_list)
        tokens = (parent.tokens if parent else 0) + len(ids)
        room = self._context_tokens - tokens
        if room <= 0:
            raise BadRequest(
                f"This model's maximum context length is {self._context_tokens} tokens, but the messages have {tokens} tokens.",
                code="context_length_exceeded",
                param="messages",
            )
        key = turn_key(base, number)
        partial = self.partials.get(key)
        flight = Flight(
            key=key,
            base=base,
            number=number,
            parent=parent,
            request=request,
            new_from=new_from,
            prompt_ids=ids_bytes(ids),
            prompt_json=orjson.dumps(ids)[1:-1],
            prompt_tokens=tokens,
            max_new_tokens=min(int(request.sampling["max_new_tokens"]), room),
            seed=int.from_bytes(blake2b(self._seed + key.encode(), digest_size=4).digest(), "little") & 0x7FFFFFFF,
        )
        if partial is not None and partial.prompt_digest == flight.prompt_digest:
            flight.partial = partial
        if self.tree.branches(parent, base):
            self.counts["branched"] += 1
        return flight

    def _remember(self, node: Node) -> None:
        if node.turn.unheard:
            self.evidence.unheard.add(node.turn.key)
        self.evidence.asked.setdefault(node.turn.key)
        self._requests[node.turn.request_id] = node.turn.key
        if node.turn.idempotency_key:
            self._idempotent[node.turn.idempotency_key] = (node.base, node.turn.key)


def _sampling(request: TurnRequest) -> bytes:
    return orjson.dumps(request.sampling, option=orjson.OPT_SORT_KEYS)


FAULT = "fault:"
"""Before the reason, in an `Answered.failed`: what failed is the attempt, not one request."""

_ENTRY_TYPES = {"open": Opened, "turn": Turn, "answer": Answered, "outcome": Ended}


def encode_entry(entry: Opened | Turn | Answered | Ended) -> tuple[str, bytes]:
    """`(kind, payload)` of a checkpoint entry."""
    kind = next(k for k, t in _ENTRY_TYPES.items() if type(entry) is t)
    return kind, msgspec.msgpack.encode(entry)


def decode_entry(kind: str, payload: bytes) -> Opened | Turn | Answered | Ended:
    return msgspec.msgpack.decode(payload, type=_ENTRY_TYPES[kind])
