"""One trial and its log: an agent that asks, attempt after attempt, and owners that know nothing but the log."""

from __future__ import annotations

import uuid
from typing import Any

import orjson
from conftest import assistant, turn_of, user

from rollout_ft.config import SessionConfig
from rollout_ft.session.entries import SessionEntry, decode_entry, encode_entry
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.session import Begin, Diverged, Replay, Session
from rollout_ft.session.tree import Node, ids_bytes
from rollout_ft.testing.plain import PlainTemplate
from rollout_ft.types import JSON, Answered, Divergence, Opened, SessionSpec, Turn


class Rerendering(PlainTemplate):
    """A template that cannot be appended to: the whole is rendered again."""

    splices = False


class Trial:
    def __init__(self, on_divergence: Any = "branch", *normalizers: str, renderer: PlainTemplate | None = None):
        self._config, self._mode = SessionConfig(normalizers=list(normalizers)), on_divergence
        self._renderer = renderer or PlainTemplate()
        self.log: list[tuple[str, bytes]] = []
        self.events: list[Divergence] = []
        self.write(Opened(SessionSpec("t1"), 1, False, 1))
        self.move()

    def write(self, entry: SessionEntry) -> None:
        self.log.append(encode_entry(entry))

    @property
    def turns(self) -> list[Turn]:
        return [entry for entry in (decode_entry(*e) for e in self.log) if isinstance(entry, Turn)]

    def move(self) -> None:
        """Another owner, from the log alone."""
        self.session = Session(
            SessionSpec("t1"), 1, self._renderer, self._config, run_seed=0, context_tokens=2**20, on_divergence=self._mode
        )  # fmt: skip
        self.session.restore([decode_entry(*entry) for entry in self.log], [])

    def restart(self) -> None:
        self.write(Opened(SessionSpec("t1"), self.session.attempt + 1, True, 1))
        self.move()

    def ask(self, *messages: JSON, says: str = "", tools: bytes = b"", ids: list[int] | None = None, **sampling: Any) -> tuple[str, Node]:
        """How the request got its reply, and the turn."""
        request = self.request(messages, tools, ids, sampling)
        met = self.session.decide(request)
        while isinstance(met, Diverged):
            self.events.append(met.divergence)
            self.write(Answered(diverged=met.divergence))
            self.session.diverge(met.divergence)
            met = self.session.decide(request)
        if isinstance(met, Replay):
            entry = self.session.answer(met.node, request) if met.first else None
            if entry is not None:
                self.write(entry)
            self.session.replayed(met.node, request, entry)
            self.session.delivered(request.request_id)
            return "replayed", met.node
        assert isinstance(met, Begin)
        self.session.take_off(met.flight)
        self.session.join(met.flight, request)
        self.session.leave(met.flight, request.request_id)
        turn = turn_of(met.flight, says or f"r{len(self.turns)}", self.session)
        self.write(turn)
        node = self.session.committed(turn)
        self.session.delivered(request.request_id)
        return "generated", node

    def request(self, messages: tuple[JSON, ...], tools: bytes, ids: list[int] | None, sampling: JSON) -> TurnRequest:
        sent = [orjson.loads(orjson.dumps(m)) for m in messages]
        return TurnRequest(
            uuid.uuid4().hex, sent, [] if ids else self.session.digests(tools, sent), tools, None, {"max_new_tokens": 8, **sampling},
            input_ids=ids_bytes(ids) if ids else None,
        )  # fmt: skip


def tool(text: str) -> JSON:
    return {"role": "tool", "content": text, "tool_call_id": "c"}


def says(node: Node) -> str:
    return orjson.loads(node.turn.reply)["content"]


def play(trial: Trial, texts: list[str], *, move_at: int = -1) -> list[tuple[str, Node]]:
    """An agent that says these texts, one after each reply."""
    history: list[JSON] = []
    got: list[tuple[str, Node]] = []
    for i, text in enumerate(texts):
        if i == move_at:
            trial.move()
        history.append(user(text))
        got.append(trial.ask(*history))
        history.append(assistant(says(got[-1][1])))
    return got
