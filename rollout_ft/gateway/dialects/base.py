"""What every dialect is: a way to ask for a turn, to be told a turn, and to be told an error.

Owns the port. Knows no dialect. What a client asked for and the form in which it wants the answer travel together, so
that whoever serves a turn need not know how it is spelled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from rollout_ft.gateway.body import load_json
from rollout_ft.session.canonical import running_digests
from rollout_ft.session.render import Renderer
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.tree import Node
from rollout_ft.types import JSON, Raw


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the headers say about who asks."""

    request_id: str
    retry: bool = False
    idempotency_key: str = ""
    resent: bool = False


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for all requests of a session, whatever they say. `sampling` has the engine's names."""

    session_id: str
    sampling: JSON = field(default_factory=dict[str, Any])
    force: bool = True
    """The session's sampling parameters win over the request's; False: the other way round."""
    model: str = "default"
    form_ignored: bool = False
    """What shapes only the text of a reply is ignored, not refused: miles' driver sends it with every request, and its own
    session server overrules it."""
    max_messages: int = 20_000
    max_tools: int = 512
    max_output_tokens: int = 8192
    vocab_size: int = 2**31
    digests: Callable[[bytes, list[JSON]], list[bytes]] = running_digests
    """What the session knows messages by: `(tools, messages)`."""
    load: Callable[[Raw], JSON] = load_json
    """A body to the object in it."""


class Asked(Protocol):
    """A request that was understood: the turn that it asks for, and how its reply is written."""

    @property
    def turn(self) -> TurnRequest: ...
    @property
    def stream(self) -> bool: ...
    def reply(self, node: Node, renderer: Renderer) -> bytes:
        """The committed turn: one JSON body, or all events of a stream. The same turn gives the same bytes."""
        ...


class Dialect(Protocol):
    keep_alive: bytes
    """Said in a stream that has begun and has nothing to say yet."""

    def parse(self, body: Raw, evidence: Evidence, rules: Rules) -> Asked:
        """Raises BadRequest naming the field and the remedy."""
        ...

    def error(self, message: str, code: str, status: int, param: str | None = None) -> bytes: ...
    def error_event(self, error: bytes) -> bytes:
        """The same error inside a stream that has begun: its status is sent already."""
        ...
