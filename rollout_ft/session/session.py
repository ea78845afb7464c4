"""One attempt of one trial: which turn a request is, and what it gets.

Owns the decisions of DESIGN section 5. Pure: it starts nothing and waits for nothing; the engine actor does what it
decides, commits, and tells it. A turn enters the tree only when the store has it, so that whatever is served from
here is committed. A request that is refused leaves everything as it was.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Literal

import orjson

from rollout_ft.config import SessionConfig
from rollout_ft.errors import BadRequest, SessionClosed, TrialFault
from rollout_ft.session import normalizers
from rollout_ft.session.classify import Choice, Sample, choose
from rollout_ft.session.divergence import nearest, words
from rollout_ft.session.entries import FAULT, SessionEntry
from rollout_ft.session.evidence import Evidence
from rollout_ft.session.flight import Flight
from rollout_ft.session.freshness import DIVERGED, SCRATCH
from rollout_ft.session.known import Known
from rollout_ft.session.leniency import leniencies
from rollout_ft.session.matcher import Seen, load
from rollout_ft.session.place import Place, locate
from rollout_ft.session.prompt import prompt
from rollout_ft.session.render import Renderer
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.special import refuse_special_tokens
from rollout_ft.session.spelling import Spelling
from rollout_ft.session.steps import Steps
from rollout_ft.session.tree import Node, Tree, ids_bytes, outside, said, turn_key
from rollout_ft.types import BY_FAULTS, JSON, Answered, Divergence, Ended, Opened, Partial, Recovery, SessionSpec, Step, Turn, session_id


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
    """Not asked for in this attempt before, or with an Idempotency-Key that is new: that has to be recorded before the
    reply leaves."""


@dataclass(frozen=True, slots=True)
class Diverged:
    """A replay leaves its record here: to be recorded (`Session.diverge`), then decided again."""

    divergence: Divergence


Decision = Begin | Attach | Replay | Diverged
MAX_PARTIALS = 64
"""Unfinished generations that are kept of a session; a store keeps as many."""


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
        resampled: Literal["drop", "export"] = "drop",
        on_divergence: Literal["branch", "fail", "serve"] = "branch",
    ):
        self.spec, self.attempt, self.config, self.resampled = spec, attempt, config, resampled
        self.id = session_id(spec.trial_id, attempt)
        self.key = load(config.matcher)
        self.tree, self.evidence, self.known = Tree(self.key), Evidence(), Known()
        self.steps = Steps(config.max_steps)
        self.checkpoint: Node | None = None
        """The turn that earlier attempts asked for last: where an agent that does not replay begins."""
        self.flights: dict[str, Flight] = {}
        self.partials: dict[str, Partial] = {}
        self.counts: Counter[str] = Counter()
        """`turns_served`, `branched` and `normalized` of this attempt; `replayed` and `attached` of this owner, and before it only
        the replays that were recorded."""
        self.leniencies: Counter[str] = Counter()
        """In how many messages of acknowledged turns each was needed; of this owner."""
        self.versions: frozenset[str] = frozenset()
        """Of the weights that sampled its tokens."""
        self.began = 0
        """When the first attempt was opened, on the clock that people read."""
        self.attempt_began = 0
        """When the last one was."""
        self.retries = 0
        """Generations beyond the first of each turn, over all attempts."""
        self.tokens_dropped = self.tokens_reused_dropped = self.version_restarts = self.fault_restarts = 0
        """Tokens of attempts that are not gone on with, and how many ended for their tokens' versions alone."""
        self.ended: Ended | None = None
        self.fault = ""
        self.lineage = 1
        """The attempt that began from nothing last: turns of another lineage are other turns, whatever their keys."""
        self.divergences: dict[str, Divergence] = {}
        """Of this attempt's replay, by what was asked for."""
        self.diverged = 0
        self.first_divergence: Divergence | None = None
        """Of all attempts."""
        self._on_divergence: Literal["branch", "fail", "serve"] = on_divergence
        self._normalize = normalizers.load(tuple(config.normalizers))
        self._renderer, self._context_tokens = renderer, context_tokens
        seed = f"{spec.seed}" if spec.seed is not None else f"{run_seed}|{spec.trial_id}"
        self._seed = blake2b(seed.encode(), digest_size=16).digest()
        self._seen, self._spelling = Seen(self.key), Spelling()
        self._order = 0
        self._foreign = False
        """The checkpoint has ids that are none of this model's."""

    def restore(self, entries: list[SessionEntry], partials: list[Partial]) -> None:
        """Rebuilds the state that the entries of a checkpoint made; the attempt is that of the last `Opened`."""
        for entry in entries:
            match entry:
                case Opened():
                    self.checkpoint = self._asked_last() or self.checkpoint
                    self.tokens_dropped += entry.tokens_dropped
                    self.tokens_reused_dropped += entry.tokens_reused_dropped
                    self.version_restarts += self.fault.startswith(SCRATCH)
                    self.fault_restarts += entry.why.reason in BY_FAULTS
                    self.spec, self.attempt, self.evidence, self.fault = entry.spec, entry.attempt, Evidence(), ""
                    self.began, self.attempt_began = self.began or entry.created, entry.created
                    self.known = Known()  # an agent that begins anew numbers its requests anew
                    self.counts.clear()
                    self.divergences, self._seen = {}, Seen(self.key)  # and spells what it says anew
                    if not entry.resume:
                        self.tree, self.lineage, self.versions = Tree(self.key), entry.attempt, frozenset()
                        self.steps, self.checkpoint = Steps(self.config.max_steps), None
                case Turn():
                    self._add(entry)
                    self._foreign |= outside(entry.prompt_ids + entry.output_ids, self._renderer.vocab_size)
                    self.evidence.restore(entry.acknowledged, entry.delivered)
                case Answered():
                    self._restore_answered(entry)
                case Ended():
                    self.ended = entry
                case Step():
                    self.steps.add(entry)
        self.id = session_id(self.spec.trial_id, self.attempt)
        found = {p.turn_key.removeprefix(f"{self.lineage}/"): p for p in partials}
        self.partials = {key: p for key, p in found.items() if "/" not in key and key not in self.tree.nodes}

    def _restore_answered(self, entry: Answered) -> None:
        self._order = max(self._order, entry.order)
        if entry.diverged:
            self.diverge(entry.diverged)
        if entry.spelled:
            self._seen.stand_for(entry.spelled, self.tree.asked(self.tree.nodes[entry.turn_key]))
        if entry.turn_key:
            self.evidence.asked.setdefault(entry.turn_key, entry.order)
            self.evidence.unheard.discard(entry.turn_key)
            self.known.remember(entry.turn_key, self.tree.nodes[entry.turn_key].base, entry.request_id, entry.idempotency_key)
            self._count_replay(entry.turn_key, entry)
        if entry.failed.startswith(FAULT):
            self.fault = entry.failed.removeprefix(FAULT)
        elif entry.failed:
            self.evidence.failed[entry.failed] = True
        self.evidence.restore(entry.acknowledged, entry.delivered)

    def _asked_last(self) -> Node | None:
        """Of this attempt's turns; one that nobody waited for is none of them."""
        ev = self.evidence
        heard = [key for key in ev.asked if key in self.tree.nodes and (key not in ev.unheard or ev.answered(key))]
        return self.tree.nodes[max(heard, key=lambda key: ev.asked[key])] if heard else None

    @property
    def tokens(self) -> int:
        """How many were sampled for its turns, those in vain among them."""
        return sum(len(node.turn.output_ids) // 4 + node.turn.tokens_wasted for node in self.tree.nodes.values())

    @property
    def tokens_reused(self) -> int:
        """How many of them were sampled by one engine and gone on from by another."""
        return sum(node.turn.tokens_reused for node in self.tree.nodes.values())

    @property
    def tokens_unfinished(self) -> int:
        """How many were sampled for turns that are none yet."""
        return sum(len(partial.output_ids) // 4 + partial.tokens_wasted for partial in self.partials.values())

    # -- what a request gets --------------------------------------------------------------------------------------

    def digests(self, tools: bytes, messages: list[JSON]) -> list[bytes]:
        """What a request carries in `digests`. Raises BadRequest naming the message that is none."""
        return self._seen.digests(tools, messages)

    def decide(self, request: TurnRequest) -> Decision:
        """What this request gets. Marks what it acknowledges; registers a caller only in `join`.

        Raises BadRequest (4xx), SessionClosed, or TrialFault where the trial does not survive what happened.
        """
        if self.ended is not None:
            raise SessionClosed(f"trial {self.spec.trial_id} has ended ({self.ended.outcome}); open another session")
        if self.fault:
            raise TrialFault(self.spec.trial_id, self.fault)
        known = self.known.turn(request.request_id)
        if known is not None:
            return self._again(known)
        place = self._place(request)
        key = self.known.same(request.idempotency_key, place.base)
        if key is not None:
            return self._again(key)
        choice = self._choose(place.base, request)
        if choice.action == "generate" and self.attempt > self.lineage:
            met = self._off_record(request, place, choice.number)
            if isinstance(met, Divergence):
                return Diverged(met)
            if met is not None:
                self._seen.stand_for(request.digests[-1], self.tree.asked(met))
                place = replace(place, base=met.base)
                choice = self._choose(place.base, request)
        if choice.action == "generate":
            decision = Begin(self._begin(request, place, choice.number))
        else:
            decision = self._again(turn_key(place.base, choice.number), new_key=bool(request.idempotency_key))
        self._acknowledge(place, request)
        return decision

    def _place(self, request: TurnRequest) -> Place:
        if self._seen.respelled and request.digests:
            request = replace(request, digests=[*request.digests[:-1], self._seen.recorded(request.digests[-1])])
        return locate(self.tree, request, self.evidence.rank, self._asked, self._renderer.stop_ids)

    def _asked(self, base: str) -> bool:
        return base in self.evidence.failed or self._made(base)

    def _made(self, base: str) -> bool:
        return bool(self.tree.samples(base)) or any(f.base == base for f in self.flights.values())

    def _off_record(self, request: TurnRequest, place: Place, number: int) -> Node | Divergence | None:
        """Of a request that is not recorded, in a replay: the recorded turn that it gets all the same, or where it leaves the
        record; None for one that goes on from the end of it, or on its own way."""
        noted = self.divergences.get(place.base)
        if noted is not None and self._on_divergence == "fail":
            raise self.lost(DIVERGED + words(noted))
        if noted is not None:
            return self.tree.nodes[noted.turn_key] if noted.served else None
        if self._made(place.base) or turn_key(place.base, number) in self.partials:
            return None
        expected = self._expected(place)
        if not expected:
            return None
        found = nearest(expected, request, place, self.key, self._normalize, lambda n: bool(self.tree.children(n)))
        if found is None:
            return None
        alone = not self.tree.asked_before(place.parent, request.digests[-1]) if request.digests else False
        if found.divergence is None:
            return found.node if alone else None
        return replace(found.divergence, served=self._on_divergence == "serve" and found.servable and alone)

    def _expected(self, place: Place) -> list[Node]:
        """The turns recorded at a place that this attempt has not asked for, in the order in which they were asked for. A replay
        leaves each at most once; and what nobody received is given up where the record itself went past it."""
        asked, left = self.evidence.asked, {d.turn_key for d in self.divergences.values()}
        children = self.tree.children(place.parent)
        past = max((n.turn.order for n in children if n.turn.key in asked), default=0)
        there = [
            n
            for n in children
            if n.turn.key not in asked and n.turn.key not in left
            and not (n.turn.unheard and n.turn.order < past and not self.tree.children(n))
        ]  # fmt: skip
        return sorted(there, key=lambda n: n.turn.order)

    def diverge(self, divergence: Divergence) -> None:
        """The store knows of it."""
        if divergence.base not in self.divergences:
            self.divergences[divergence.base] = divergence
            self.diverged += 1
            self.first_divergence = self.first_divergence or divergence

    def _again(self, key: str, *, new_key: bool = False) -> Decision:
        flight = self.flights.get(key)
        if flight is not None:
            return Attach(flight)
        first = key not in self.evidence.asked or key in self.evidence.unheard or (new_key and self.known.has_room)
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
            max_replays=self.config.max_replays,
            max_vain_replays=self.config.max_vain_replays,
        )
        if not self.survives and (choice.action != "generate" or request.resent):
            raise self.lost("lost_reply" if choice.action != "generate" else "engine_lost")
        return choice

    def _begin(self, request: TurnRequest, place: Place, number: int) -> Flight:
        if len(self.tree.nodes) >= self.config.max_turns:
            raise BadRequest(f"the session has {self.config.max_turns} turns (session.max_turns); open another", code="too_many_turns")
        if len(self.flights) >= self.config.max_in_flight:
            raise BadRequest("too many requests of this session in flight (session.max_in_flight)", status=429, code="too_many_in_flight")
        if self.tree.tokens >= self.config.max_tokens:
            raise BadRequest(f"the session has {self.tree.tokens} tokens (session.max_tokens); open another", code="too_many_tokens")
        if self.config.special_tokens_in_text == "refuse":
            refuse_special_tokens(request.messages[place.new_from :], self._renderer.special_texts)
        if self._foreign:
            message = "the checkpoint of this trial has token ids that the model does not have: it was made with another model"
            raise BadRequest(message, code="foreign_tokens")
        request = self._as_recorded(request, place)
        parent, new = place.parent, prompt(self._renderer, request, place)
        tokens = (parent.tokens if parent else 0) - new.trim + len(new.ids)
        room = self._context_tokens - tokens
        if room <= 0:
            raise BadRequest(
                f"This model's maximum context length is {self._context_tokens} tokens, but the messages have {tokens} tokens.",
                code="context_length_exceeded",
                param="messages",
            )
        key = turn_key(place.base, number)
        flight = Flight(
            key=key,
            base=place.base,
            number=number,
            order=self._next(),
            parent=parent,
            request=request,
            new_from=place.new_from,
            trim=new.trim,
            prompt_ids=ids_bytes(new.ids),
            input_json=self._spelling.prompt(parent, new.trim, new.ids),
            prompt_tokens=tokens,
            max_new_tokens=min(int(request.sampling["max_new_tokens"]), room),
            seed=int.from_bytes(blake2b(self._seed + key.encode(), digest_size=4).digest(), "little") & 0x7FFFFFFF,
        )
        partial = self.partials.get(key)
        known = partial is not None and not outside(partial.output_ids, self._renderer.vocab_size)
        if partial is not None and known and partial.prompt_digest == flight.prompt_digest:
            flight.partial = partial
        return flight

    def prompt_tokens(self, request: TurnRequest) -> int:
        """How many tokens this request's prompt has. Marks nothing. Raises BadRequest."""
        place = self._place(request)
        new = prompt(self._renderer, self._as_recorded(request, place), place)
        return (place.parent.tokens if place.parent else 0) - new.trim + len(new.ids)

    def _as_recorded(self, request: TurnRequest, place: Place) -> TurnRequest:
        """What stands for a recorded conversation is asked for, and rendered, as that is recorded."""
        if not self._seen.respelled or request.input_ids is not None:
            return request
        before, new = request.messages[: place.new_from], request.messages[place.new_from :]
        if not self._renderer.splices:
            pairs = zip(before, said(place.parent), strict=True)
            before = [stored if stored["role"] in ("tool", "user") else sent for sent, stored in pairs]
        same = self.tree.samples(place.base)
        return replace(request, messages=[*before, *(orjson.loads(same[0].turn.messages) if same else new)])

    def _next(self) -> int:
        self._order += 1
        return self._order

    def _acknowledge(self, place: Place, request: TurnRequest) -> None:
        """The client has the turns of this path; what it took to recognise those that are news is counted."""
        at = place.new_from
        for node in self.evidence.acknowledge(place.parent):
            if request.input_ids is not None:
                continue
            stored: list[JSON] = [*orjson.loads(node.turn.messages), orjson.loads(node.turn.reply)]
            at -= len(stored)
            served = self._served_anyway(node.turn.key)
            for one, other in zip(stored, request.messages[at : at + len(stored)], strict=True):
                found = leniencies(one, other, self._normalize)
                self.leniencies.update(found - {"other"} | {"served"} if served and "other" in found else found)

    # -- what became of it ----------------------------------------------------------------------------------------

    def entry_key(self, key: str) -> str:
        """What makes a turn's entry in the checkpoint idempotent."""
        return f"{self.lineage}/{key}"

    def join(self, flight: Flight, request: TurnRequest) -> None:
        """The request waits for this flight from now on."""
        flight.callers.add(request.request_id)
        flight.joined[request.request_id] = request.idempotency_key
        self.known.remember(flight.key, flight.base, request.request_id, request.idempotency_key)

    def leave(self, flight: Flight, request_id: str) -> bool:
        """The request does not wait any more; True when nobody does."""
        flight.callers.discard(request_id)
        return not flight.callers

    def take_off(self, flight: Flight) -> None:
        self.flights[flight.key] = flight

    def drop(self, flight: Flight) -> None:
        """The flight ended without a turn; what it had stays as its partial."""
        if self.flights.get(flight.key) is flight:
            del self.flights[flight.key]
        for request_id, idempotency_key in flight.joined.items():
            self.known.forget(request_id, idempotency_key)

    def give_up(self, flight: Flight, partial: Partial) -> None:
        """Nobody waits for it any more; a later request for the same goes on from here."""
        self.drop(flight)
        self.keep_partial(flight, partial)

    def keep_partial(self, flight: Flight, partial: Partial) -> None:
        """What a flight had, and what it cost, for whoever asks for the same again."""
        self.partials[flight.key] = partial
        if len(self.partials) > MAX_PARTIALS:
            del self.partials[next(iter(self.partials))]

    def committed(self, turn: Turn) -> Node:
        """The store has the turn: it is part of the tree from now on."""
        self.flights.pop(turn.key, None)
        self.partials.pop(turn.key, None)
        return self._add(turn)

    def _add(self, turn: Turn) -> Node:
        if turn.key in self.tree.nodes:
            return self.tree.nodes[turn.key]
        node = self.tree.add(turn)
        if not self.versions.issuperset(s.version for s in turn.version_spans):
            self.versions |= {s.version for s in turn.version_spans}
        self.retries += max(0, turn.generations - 1)
        self.counts["turns_served"] += 1
        self.counts["branched"] += self.tree.branches(node.parent, node.base)
        self._order = max(self._order, turn.order)
        self.steps.turn(turn.key)
        if turn.unheard:
            self.evidence.unheard.add(turn.key)
        self.evidence.asked.setdefault(turn.key, turn.order)
        for request_id, idempotency_key in ((turn.request_id, turn.idempotency_key), *turn.also):
            self.known.remember(turn.key, node.base, request_id, idempotency_key)
        return node

    def answer(self, node: Node, request: TurnRequest) -> Answered:
        """What the store has to have before a recorded reply goes out in this attempt for the first time."""
        acks, deliveries = self.evidence.take_unsaved()
        sent = request.digests[-1] if request.digests else b""
        return Answered(
            node.turn.key, request.request_id, acks, deliveries, order=self._next(), idempotency_key=request.idempotency_key,
            spelled=sent if sent != self._seen.recorded(sent) else b"",
        )  # fmt: skip

    def replayed(self, node: Node, request: TurnRequest, entry: Answered | None = None) -> None:
        """The recorded reply goes to this request; `entry` told the store so, where it had to be told."""
        self.evidence.replay(node.turn.key, entry.order if entry else self._next())
        self.known.remember(node.turn.key, node.base, request.request_id, request.idempotency_key)
        self._count_replay(node.turn.key, entry)

    def _count_replay(self, key: str, entry: Answered | None) -> None:
        self.counts["replayed"] += 1
        if entry is not None and entry.spelled and not self._served_anyway(key):
            self.counts["normalized"] += 1

    def _served_anyway(self, key: str) -> bool:
        """Whether a request got this turn that is another."""
        return any(d.served and d.turn_key == key for d in self.divergences.values())

    def delivered(self, request_id: str) -> None:
        key = self.known.turn(request_id)
        if key is not None and key in self.tree.nodes:
            self.evidence.deliver(key)

    def failed(self, request: TurnRequest) -> str:
        """A client was told 5xx: what it asked for, to be recorded."""
        base = self._place(request).base
        self.evidence.failed.setdefault(base, False)
        return base

    def unanswered(self) -> list[str]:
        """Bodies that ended in our 5xx and were never answered later: they taint the attempt (P4)."""
        return [b for b in self.evidence.failed if not any(self.evidence.answered(n.turn.key) for n in self.tree.samples(b))]

    def retokenized(self, node: Node) -> bool:
        """Whether its prompt dropped sampled tokens of its parent's, other than the one that stopped it."""
        stopped = node.parent is not None and node.parent.last_id in self._renderer.stop_ids
        return node.turn.trim > stopped

    def lost(self, reason: str) -> TrialFault:
        """An infrastructure fault met a trial that does not survive it."""
        self.fault = self.fault or reason
        return TrialFault(self.spec.trial_id, self.fault)

    @property
    def survives(self) -> bool:
        return self.spec.recovery == Recovery.RESUME
