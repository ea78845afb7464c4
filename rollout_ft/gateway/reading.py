"""The bodies of one session to JSON, each read only where it goes on from the one before.

Owns the body that was read last: an agent sends its whole history with every turn, and what it sent before is compared,
not read again. Knows nothing of what a message is.

The subtle invariant: what is skipped ends behind a whole element of the top-level `messages`. So the text in front of
the first element and the text behind the skipped ones are a document of their own, which says what the body says but
for those elements, and is refused where the body would be.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
import orjson

from rollout_ft.errors import BadRequest
from rollout_ft.gateway.body import MAX_DEPTH, load_json
from rollout_ft.types import JSON, Raw

_OPENING = re.compile(rb'"messages"\s*:\s*\[')
_HEAD_BYTES = 1024
"""What comes before the messages is looked for so far and no further."""
_COMMA, _BRACE, _BRACKET = b",}]"
_SPACES = b" \t\r\n"


class _Only(msgspec.Struct):
    messages: msgspec.Raw


_only = msgspec.json.Decoder(_Only)


class Reading:
    """`load` is `load_json` for one body after the other; messages that were there before are the same objects."""

    def __init__(self, max_depth: int = MAX_DEPTH):
        self._max_depth = max_depth
        self._body: Raw = b""
        self._head = b""
        self._end = 0
        """Where the last message of `_body` ends; 0 where nothing can go on from it."""
        self._messages: list[Any] = []

    def load(self, body: Raw) -> JSON:
        """The object in a body. Raises BadRequest saying what is wrong with it."""
        found = self._go_on(body)
        if found is None:
            found = load_json(body, self._max_depth)
            self._begin(body, found)
        return found

    def _go_on(self, body: Raw) -> JSON | None:
        """None where the body does not go on from the last one, or what is new in it cannot be read."""
        end = self._end
        if not end or len(body) <= end or body[end] not in (_COMMA, _BRACKET):
            return None
        with memoryview(self._body)[:end] as known:
            if not body.startswith(known):
                return None
        more = body[end] == _COMMA
        rest = self._head + body[end + more :]
        try:
            found = load_json(rest, self._max_depth)
        except BadRequest:
            return None
        if more and not found["messages"]:  # a comma that nothing follows
            return None
        self._messages = found["messages"] = self._messages + found["messages"]
        within = _end_of_messages(rest, len(self._head)) if more else len(self._head)
        self._body, self._end = body, within and end + more + within - len(self._head)
        return found

    def _begin(self, body: Raw, found: JSON) -> None:
        opening = _OPENING.search(body, 0, _HEAD_BYTES)
        head = bytes(body[: opening.end()]) if opening else b""
        self._end = _end_of_messages(body, len(head)) if _opens(head) else 0
        self._body, self._head, self._messages = (body, head, found["messages"]) if self._end else (b"", b"", [])


def _opens(head: bytes) -> bool:
    """Whether a document stands inside its own `messages` behind `head`, and in nothing else."""
    try:
        return orjson.loads(head + b"]}")["messages"] == []
    except (orjson.JSONDecodeError, KeyError):
        return False


def _end_of_messages(document: Raw, begin: int) -> int:
    """Where the last of the messages ends, whose first begins at `begin`; 0 where that is not known."""
    try:
        at = begin - 1 + memoryview(_only.decode(document).messages).nbytes - 1
    except msgspec.MsgspecError:
        return 0
    if document[at] != _BRACKET:
        return 0
    while document[at - 1] in _SPACES:
        at -= 1
    return at if document[at - 1] == _BRACE else 0
