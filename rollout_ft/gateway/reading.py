"""The bodies of one session to JSON, each read only where it goes on from the one before.

Owns the body that was read last: an agent sends its whole history with every turn, and what it sent before is compared,
not read again. Knows nothing of what a message is.

The subtle invariant: what is skipped ends behind a whole element of the top-level `messages`. So the text in front of
the first element and the text behind the skipped ones are a document of their own, which says what the body says but
for those elements, and is refused where the body would be.
"""

from __future__ import annotations

import re
from secrets import token_hex
from typing import Any

import msgspec
import orjson

from rollout_ft.errors import BadRequest, RolloutFTError
from rollout_ft.gateway.body import MAX_DEPTH, load_json
from rollout_ft.types import JSON, Raw

_OPENING = re.compile(rb'"messages"\s*:\s*\[')
_HEAD_BYTES = 1024
"""What comes before the messages is looked for so far and no further."""
_COMMA, _BRACE, _BRACKET = b",}]"
_SPACES = b" \t\r\n"


class NotRead(RolloutFTError):
    """What a body is said to go on from is not what was read last, or does not go on like this: the whole is needed."""


class _Only(msgspec.Struct):
    messages: msgspec.Raw


_only = msgspec.json.Decoder(_Only)


class Reading:
    """`load` is `load_json` for one body after the other; messages that were there before are the same objects.

    `load_rest` is the same for somebody who has compared already, and so sends only what stands behind.
    """

    def __init__(self, max_depth: int = MAX_DEPTH):
        self._max_depth = max_depth
        self._body: Raw = b""
        self._head = b""
        self._end = 0
        """Where the last message of `_body` ends; 0 where nothing can go on from it."""
        self._messages: list[Any] = []
        self._own, self._loads = token_hex(8), 0

    @property
    def name(self) -> str:
        """Names what was read last and need not be sent again, which is as long as the name's last part says; empty where
        there is nothing."""
        return f"{self._own}.{self._loads}:{self._end}" if self._end else ""

    def load(self, body: Raw) -> JSON:
        """The object in a body. Raises BadRequest saying what is wrong with it."""
        found = self._go_on(body[self._end :]) if self._begins(body) else None
        if found is None:
            found = load_json(body, self._max_depth)
            self._begin(body, found)
        else:
            self._body = body
        return found

    def load_rest(self, name: str, rest: Raw) -> JSON:
        """The object in a body that begins with what `name` stands for. Raises NotRead."""
        end = self._end
        found = self._go_on(rest) if name and name == self.name else None
        if found is None:
            raise NotRead
        if not isinstance(self._body, bytearray):
            self._body = bytearray(self._body)
        self._body[end:] = rest
        return found

    def _begins(self, body: Raw) -> bool:
        """Whether a body goes on from the last one."""
        if not self._end:
            return False
        with memoryview(self._body)[: self._end] as known:
            return body.startswith(known)

    def _go_on(self, rest: Raw) -> JSON | None:
        """None where what stands behind the last message that was read cannot be read."""
        if not rest or rest[0] not in (_COMMA, _BRACKET):
            return None
        more = rest[0] == _COMMA
        document = self._head + rest[more:]
        try:
            found = load_json(document, self._max_depth)
        except BadRequest:
            return None
        if more and not found["messages"]:  # a comma that nothing follows
            return None
        self._messages = found["messages"] = self._messages + found["messages"]
        within = _end_of_messages(document, len(self._head)) if more else len(self._head)
        self._end = within and self._end + more + within - len(self._head)
        self._loads += 1
        return found

    def _begin(self, body: Raw, found: JSON) -> None:
        self._loads += 1
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
