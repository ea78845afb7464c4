"""Which equality of messages a session uses, and what it has worked out already.

Owns `session.matcher`: canonical, strict, or a function of one's own, `module:function`, from a message to the bytes
that are equal for equal messages. Whatever the matcher, what is no message is refused in the same way. Digests of the
conversation seen last are kept, so that a request costs its new messages and a comparison of the others; and which
conversations stand for a recorded one that reads otherwise.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from functools import cache
from typing import Any, cast

import orjson

from rollout_ft.errors import BadRequest, ConfigError, MatcherFailed
from rollout_ft.session.canonical import MessageKey, calls_of, message_key, start, text_of
from rollout_ft.types import JSON

_DEEP = 16


@cache
def load(name: str) -> MessageKey:
    """The matcher of that name. Raises ConfigError for what cannot be one."""
    match name:
        case "canonical":
            return message_key
        case "strict":
            return strict_key
        case _:
            return _own(name)


def strict_key(message: JSON, where: str = "message") -> bytes:
    """Everything that a client can send back, as it stands; only None, empty and missing are equal."""
    message_key(message, where)
    content: Any = message.get("content") or None
    parts = [text_of([part], where) for part in cast("list[Any]", content)] if isinstance(content, list) else content
    calls = [[call.get("id"), call["function"]["name"], call["function"].get("arguments") or None] for call in calls_of(message, where)]
    rest = [message.get(k) or None for k in ("name", "tool_call_id", "reasoning_content")]
    try:
        return orjson.dumps([message["role"], parts, calls, rest], option=orjson.OPT_SORT_KEYS)
    except TypeError:
        raise BadRequest(f"{where} is nested too deep", param=where) from None


def _own(name: str) -> MessageKey:
    module, _, attribute = name.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except Exception as e:
        raise ConfigError(f"session.matcher {name!r} cannot be imported ({e}); use strict, canonical or module:function") from None
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise ConfigError(f"session.matcher {name!r} must be a plain function from a message to bytes")

    def key(message: JSON, where: str = "message") -> bytes:
        message_key(message, where)
        try:
            found: Any = function(message)
        except Exception as e:
            raise MatcherFailed(name, f"raised {type(e).__name__}: {e}") from e
        if not isinstance(found, bytes):
            if inspect.iscoroutine(found):
                found.close()
            raise MatcherFailed(name, f"returned {type(found).__name__}, not bytes")
        return found

    return key


class Seen:
    """The conversation that a session was sent last: its messages and the mark before each and after the last.

    One that stands for a recorded one (`stand_for`) has that one's digest, and so has whatever is built upon it."""

    def __init__(self, key: MessageKey):
        self._key = key
        self._stand_for: dict[bytes, bytes] = {}
        self._tools: bytes = b""
        self._messages: list[JSON] = []
        self._comparable: list[bool] = []
        self._marks = [start(b"")]
        self._digests = [self._marks[0].digest]

    def digests(self, tools: bytes, messages: list[JSON]) -> list[bytes]:
        """What `running_digests` gives; messages that were there the last time are compared, not hashed."""
        if tools != self._tools:
            self._tools, self._messages, self._comparable, self._marks = tools, [], [], [start(tools)]
            self._digests = [self._marks[0].digest]
        same = self._same(messages)
        messages[:same] = self._messages[:same]  # what is equal need not be held twice while a turn is generated
        for i, message in enumerate(messages[same:], same):
            known = i < len(self._messages)
            if known and self._comparable[i] and self._messages[i] == message:
                continue
            mark = self._marks[i].after(message, f"messages[{i}]", self._key)
            if mark.digest in self._stand_for:
                mark = replace(mark, digest=self._stand_for[mark.digest])
            if known and mark == self._marks[i + 1]:  # spelled in another way, and from now on so
                self._messages[i], self._comparable[i] = message, _comparable(message)
                continue
            del self._messages[i:], self._comparable[i:], self._marks[i + 1 :], self._digests[i + 1 :]
            self._messages.append(message)
            self._comparable.append(_comparable(message))
            self._marks.append(mark)
            self._digests.append(mark.digest)
        return self._digests[: len(messages) + 1]

    def stand_for(self, digest: bytes, recorded: bytes) -> None:
        """From now on the conversation with this digest is the recorded one."""
        self._stand_for[digest] = recorded
        if digest in self._digests:
            at = self._digests.index(digest)
            self._marks[at], self._digests[at] = replace(self._marks[at], digest=recorded), recorded
            del self._messages[at:], self._comparable[at:], self._marks[at + 1 :], self._digests[at + 1 :]

    def recorded(self, digest: bytes) -> bytes:
        """The digest of what a conversation stands for; its own where that is itself."""
        return self._stand_for.get(digest, digest)

    @property
    def respelled(self) -> bool:
        """Whether any conversation stands for another."""
        return bool(self._stand_for)

    def _same(self, messages: list[JSON]) -> int:
        """How many messages need not be looked at one by one: all that were there, where the request begins with them."""
        count = len(self._messages)
        return count if messages[:count] == self._messages and all(self._comparable) else 0


def _comparable(message: JSON) -> bool:
    """Whether == tells this message from every other: Python takes True for 1, and recurses."""
    left: list[tuple[Any, int]] = [(message, 0)]
    while left:
        value, depth = left.pop()
        if isinstance(value, dict | list) and depth < _DEEP:
            inner = cast(JSON, value).values() if isinstance(value, dict) else cast("list[Any]", value)
            left += [(each, depth + 1) for each in inner]
        elif not isinstance(value, str | None):
            return False
    return True
