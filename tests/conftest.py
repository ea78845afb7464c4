"""What all tests share: a session without an engine, and requests for it."""

from __future__ import annotations

import uuid
from typing import Any

import hypothesis
import pytest
from engine_kinds import engine, kind, narrow, server, shared_narrow, shared_server, start
from model_server import sglang_python, sglang_server, start_sglang, tiny_model

from rollout_ft.config import SessionConfig
from rollout_ft.session.canonical import running_digests
from rollout_ft.session.flight import Flight
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.session import Begin, Session
from rollout_ft.session.tree import Node, ids_bytes
from rollout_ft.testing.plain import STOP, PlainTemplate
from rollout_ft.types import Opened, SessionSpec, Turn, VersionSpan

__all__ = [  # fixtures; there is no other conftest.py beside the tests that import this one by its name
    "engine", "kind", "narrow", "server", "sglang_python", "sglang_server", "shared_narrow", "shared_server", "start", "start_sglang",
    "tiny_model",
]  # fmt: skip

hypothesis.settings.register_profile("untimed", deadline=None)  # how busy the machine is says nothing of what is tested
hypothesis.settings.load_profile("untimed")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def ask(*messages: dict[str, Any], **fields: Any) -> TurnRequest:
    """A request with these messages; every call is another request unless `request_id` says otherwise."""
    defaults: dict[str, Any] = {"request_id": uuid.uuid4().hex, "tools": b"", "tool_list": None, "sampling": {"max_new_tokens": 8}}
    if "digests" not in fields:
        fields["digests"] = running_digests(b"", list(messages))
    return TurnRequest(messages=list(messages), **{**defaults, **fields})


def ask_tokens(ids: list[int], **fields: Any) -> TurnRequest:
    """A request in tokens."""
    return ask(input_ids=ids_bytes(ids), digests=[], **fields)


def make_session(config: SessionConfig | None = None, *, context_tokens: int = 4096, resampled: Any = "drop", **spec: Any) -> Session:
    config = config or SessionConfig()
    return Session(SessionSpec("t1", **spec), 1, PlainTemplate(), config, run_seed=0, context_tokens=context_tokens, resampled=resampled)


def owner_after(session: Session, *entries: Any) -> Session:
    """The same session for its next owner: what these entries of its log say, from the first attempt on."""
    again = make_session(session.config, resampled=session.resampled)
    again.restore([Opened(session.spec, 1, False, 1), *entries], [])
    return again


def turn_of(flight: Flight, text: str, session: Session) -> Turn:
    """The turn that a flight ends in when the model says `text`."""
    import orjson

    output = [*text.encode(), STOP]
    acks, deliveries = session.evidence.take_unsaved()
    request = flight.request
    return Turn(
        key=flight.key, parent=flight.parent.turn.key if flight.parent else "", sample=flight.number,
        depth=(flight.parent.turn.depth if flight.parent else 0) + 1, request_id=request.request_id,
        messages=b"" if request.input_ids is not None else orjson.dumps(request.messages[flight.new_from :]),
        tools=b"", prompt_ids=flight.prompt_ids,
        output_ids=ids_bytes(output), logprobs=b"\0" * 4 * len(output), version_spans=(VersionSpan("v0", 0, len(output)),),
        sampling=orjson.dumps(request.sampling, option=orjson.OPT_SORT_KEYS), finish_reason="stop",
        reply=orjson.dumps(assistant(text)), created=1, generations=1, idempotency_key=request.idempotency_key,
        acknowledged=acks, delivered=deliveries, trim=flight.trim, order=flight.order,
    )  # fmt: skip


def begin(session: Session, request: TurnRequest) -> Flight:
    """Starts the generation of a request that must need one."""
    decision = session.decide(request)
    assert isinstance(decision, Begin), decision
    session.take_off(decision.flight)
    session.join(decision.flight, request)
    return decision.flight


def commit(session: Session, flight: Flight, text: str) -> Node:
    for request_id in flight.joined:
        session.leave(flight, request_id)
    return session.committed(turn_of(flight, text, session))


def play(session: Session, request: TurnRequest, text: str, *, delivered: bool = True) -> Node:
    """One turn, from request to reply."""
    node = commit(session, begin(session, request), text)
    if delivered:
        session.delivered(request.request_id)
    return node


@pytest.fixture
def session() -> Session:
    return make_session()
