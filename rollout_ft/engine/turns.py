"""A flight to what an engine is asked for, and what it sampled to the turn that is committed.

Owns the translation between sessions and generations. Starts nothing and waits for the parser alone. A message is made
of all ids of a turn at once, however many engine calls they came from.
"""

from __future__ import annotations

import logging

import orjson

from rollout_ft.clock import monotonic, wall
from rollout_ft.engine.capture import Capture, Shape
from rollout_ft.engine.generation import Generation, Order, logprob_bytes
from rollout_ft.engine.parsers import Parser
from rollout_ft.errors import EngineLost
from rollout_ft.session.flight import Flight
from rollout_ft.session.parse import Parsed, assistant_message, opened_thinking, sampled_text
from rollout_ft.session.render import Renderer
from rollout_ft.session.session import Session
from rollout_ft.session.tree import ids_bytes
from rollout_ft.types import JSON, RoutedExperts, Served, Turn

MAX_ALSO = 64
"""Callers with a key of their own that a turn is recorded with."""
_log = logging.getLogger("rollout_ft")


def begin(session: Session, flight: Flight, renderer: Renderer, shape: Shape | None = None) -> Generation:
    """The generation of a flight, with what another engine had sampled of it; `shape` is that of a row of routed experts,
    where they are wanted."""
    request = flight.request
    generation = Generation(
        Order(
            turn_key=session.entry_key(flight.key), request_id=request.request_id, prompt_digest=flight.prompt_digest,
            input_json=flight.input_json, sampling=request.engine_sampling, max_new_tokens=flight.max_new_tokens, seed=flight.seed,
            stop_ids=renderer.stop_ids.union(request.sampling.get("stop_token_ids") or ()), vocab_size=renderer.vocab_size,
            prompt_tokens=flight.prompt_tokens, one_version=session.config.version_policy != "mixed",
        )
    )  # fmt: skip
    if shape is not None:
        # The rows before these came with the turns before. A turn has none for its last token: what it made is new.
        start = max(0, flight.prompt_tokens - len(flight.prompt_ids) // 4 - 1)
        generation.capture = Capture(shape, start, flight.prompt_tokens - 1)
    if flight.partial is not None:
        generation.adopt(flight.partial)
    return generation


async def message_of(session: Session, flight: Flight, g: Generation, renderer: Renderer, parser: Parser) -> JSON:
    """The assistant's message. Raises EngineLost when an engine that parses is lost, MatcherFailed."""
    request = flight.request
    stop = [str(s) for s in request.sampling.get("stop") or ()]
    special = parser.keep_special(request.tool_list)
    text = sampled_text(g.ids, renderer, stop=stop, keep_special=special, closers=parser.closers)
    opened = opened_thinking(flight.prompt_ids, renderer)
    try:
        parsed = await parser.parse(text, request.tool_list, opened=opened, forced=request.forced_call)
    except EngineLost:
        raise
    except Exception:
        _log.exception("the parser failed: the text is delivered as text")
        parsed = Parsed(text, failed=True)
    session.counts["unparsed"] += parsed.failed
    message = assistant_message(parsed, flight.key)
    session.key(message, "reply")  # a matcher that cannot read it fails before the commit
    return message


def turn_of(
    session: Session, flight: Flight, g: Generation, message: JSON, routed: RoutedExperts | None = None, engine_id: str = ""
) -> Turn:  # fmt: skip
    """The turn, with the evidence that waits for a commit."""
    request = flight.request
    new = b"" if request.input_ids is not None else compact(orjson.dumps(request.messages[flight.new_from :]))
    acks, deliveries = session.evidence.take_unsaved()
    return Turn(
        key=flight.key, parent=flight.parent.turn.key if flight.parent else "", sample=flight.number,
        depth=depth_of(flight), request_id=request.request_id, messages=new,
        tools=b"" if flight.parent else request.tools, prompt_ids=flight.prompt_ids, output_ids=ids_bytes(g.ids),
        logprobs=logprob_bytes(g.logprobs), version_spans=g.spans,
        sampling=compact(orjson.dumps(request.sampling, option=orjson.OPT_SORT_KEYS)), finish_reason=g.finish,
        reply=compact(orjson.dumps(message)), created=wall(), generations=g.calls, tokens_wasted=g.wasted,
        tokens_reused=g.reused, idempotency_key=request.idempotency_key, acknowledged=acks, delivered=deliveries,
        unheard=not flight.callers, trim=flight.trim, order=flight.order, routed=routed,
        engine=engine_id, seconds=round(monotonic() - g.began, 3),
        also=tuple((rid, key) for rid, key in flight.joined.items() if key and rid != request.request_id)[:MAX_ALSO],
    )  # fmt: skip


def compact(data: bytes) -> bytes:
    """The same bytes without orjson's spare room, four times their length: turns are kept for as long as the trial."""
    return memoryview(data).tobytes()


def depth_of(flight: Flight) -> int:
    """1 for the first turn of a path."""
    return (flight.parent.turn.depth if flight.parent else 0) + 1


def how(g: Generation) -> Served:
    if g.reused:
        return Served.CONTINUED
    return Served.REGENERATED if g.regenerated or g.calls > 1 else Served.FRESH
