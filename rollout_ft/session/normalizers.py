"""What in a message may be other than it was, for the message to be the one that is recorded.

Owns `session.normalizers`: the names that ship, functions of one's own (`module:function`, from a text to a text), and what
they are applied to. Pure. Asked only where a replay would leave its record otherwise: a request that is recorded as it stands
never gets here, so that in one attempt two texts that differ stay two. What is stored and trained is what was sent first.

The subtle invariant: agents' texts are hostile. No pattern can go on for ever from one place, so that each takes time linear in
the text; and a request with more text than `MAX_CHARS` is compared as it stands.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

from rollout_ft.errors import ConfigError, NormalizerFailed
from rollout_ft.types import JSON

Normalize = Callable[[str], str]
MAX_CHARS = 2**16
"""Of all texts of the messages that a request adds."""

_MONTH = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)"
_DAY = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_CLOCK = r"\d{1,2}:\d\d(?::\d\d(?:[.,]\d{1,9})?)?"
_ZONE = r"(?: ?(?:Z|UTC|GMT|[A-Z]{3,4}|[+-]\d\d:?\d\d)\b)?"
PATTERNS: dict[str, str] = {
    "timestamps": "|".join(
        (
            rf"\b\d{{4}}[-/]\d\d[-/]\d\d(?:[T ]{_CLOCK}{_ZONE})?(?!\d)",  # 2026-01-31T10:20:30.123Z
            rf"\b(?:{_DAY},? )?{_MONTH} {{1,2}}\d{{1,2}} {_CLOCK}{_ZONE}(?: \d{{4}}\b)?",  # Sat Jan 31 10:20:30 UTC 2026
            rf"\b(?:{_DAY}, )?\d{{1,2}}[ /-]{_MONTH}[ /-]\d{{4}}(?:[ :]{_CLOCK}{_ZONE})?",  # Sat, 31 Jan 2026 10:20:30 GMT
            r"(?<![\d.:])\d{1,2}:\d\d:\d\d(?:[.,]\d{1,9})?(?![\d:])",  # 10:20:30
            r"(?<![\w.])1\d{9}(?:\d{3}|\d{6}|\d{9})?(?:\.\d{1,9})?(?![\w])",  # seconds since 1970, or thousandths of them
        )
    ),
    "durations": r"(?<![\w.])(?:\d{1,6}m ?)?\d{1,9}(?:\.\d{1,9})? ?(?:[nmu\u00b5]?s|secs?|seconds?|milliseconds?|minutes?)\b",
    "uuids": r"(?<![0-9A-Za-z])[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}(?![0-9A-Za-z])",
    "temp_paths": "|".join(
        (
            r"(?:/private)?(?:/var)?/tmp/pytest-of-[\w.-]{1,64}/pytest-\d{1,9}",
            r"(?:/private)?(?:/var)?/tmp/[\w.+@%=-]{1,255}",
            r"(?:/private)?/var/folders/[\w+]{1,16}/[\w+]{1,64}/T/[\w.+@%=-]{1,255}",
            r"[A-Za-z]:\\Users\\[^\\\s]{1,64}\\AppData\\Local\\Temp\\[\w.+@%=-]{1,255}",
            r"(?<=/)tmp[a-z0-9_]{8}(?![a-z0-9_])",  # what Python makes in whatever directory it was given
        )
    ),
    "hex_ids": r"\b0x[0-9A-Fa-f]{4,16}\b|(?<![0-9A-Za-z])(?=[a-f]{0,63}\d)(?=\d{0,63}[a-f])[0-9a-f]{7,64}(?![0-9A-Za-z])",
}
"""What ships: each finds what it is named after, and every find reads the same. A number alone is never an id."""


@cache
def load(names: tuple[str, ...]) -> Normalize | None:
    """All of them in this order; None where there is none. Raises ConfigError for what cannot be one."""
    steps = [_own(name) if ":" in name else _shipped(name) for name in names]
    if not steps:
        return None

    def normalize(text: str) -> str:
        for step in steps:
            text = step(text)
        return text

    return normalize


def _shipped(name: str) -> Normalize:
    if name not in PATTERNS:
        raise ConfigError(f"session.normalizers: {name!r} is none of {', '.join(PATTERNS)}; one of your own is module:function")
    pattern, mark = re.compile(PATTERNS[name]), f"<{name}>"
    return lambda text: pattern.sub(mark, text)


def _own(name: str) -> Normalize:
    module, _, attribute = name.partition(":")
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except Exception as e:
        raise ConfigError(f"session.normalizers: {name!r} cannot be imported ({e}); write module:function") from None
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise ConfigError(f"session.normalizers: {name!r} must be a plain function from a text to a text")

    def normalize(text: str) -> str:
        try:
            found: Any = function(text)
        except Exception as e:
            raise NormalizerFailed(name, f"raised {type(e).__name__}: {e}") from e
        if not isinstance(found, str):
            raise NormalizerFailed(name, f"returned {type(found).__name__}, not a text")
        return found

    return normalize


def normal(messages: Sequence[JSON], normalize: Normalize | None) -> list[JSON]:
    """The messages with the texts of tools and users in their normal form. What the model said is never touched."""
    if normalize is None or sum(_chars(message) for message in messages) > MAX_CHARS:
        return list(messages)
    return [{**m, "content": _content(m.get("content"), normalize)} if m["role"] in ("tool", "user") else m for m in messages]


def alike(normalize: Normalize | None, one: str, other: str) -> bool:
    """Whether two texts read the same."""
    return normalize is not None and max(len(one), len(other)) <= MAX_CHARS and normalize(one) == normalize(other)


def _content(content: Any, normalize: Normalize) -> Any:
    if isinstance(content, str):
        return normalize(content)
    if isinstance(content, list):
        parts = cast("list[JSON]", content)
        return [{**part, "text": normalize(part["text"])} if part.get("type") == "text" else part for part in parts]
    return content


def _chars(message: JSON) -> int:
    content: Any = message.get("content")
    if isinstance(content, list):
        return sum(len(part.get("text") or "") for part in cast("list[JSON]", content))
    return len(content or "")
