"""Where a replay leaves its record: the recorded turn that a request should have been, and the first thing that differs.

Owns that search, and its words. Pure. Asked only for a request that a replay would not make: it compares what the request adds at
its place with what the turns recorded there add, and never looks at the conversation before, which they share.

The subtle invariant: a turn is said to be the same only where tools, sampling, every message and the pairing of results with
calls all read the same under the normalizers: then it is served in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from rollout_ft.session.canonical import Mark, MessageKey, arguments, calls_of, text_of
from rollout_ft.session.normalizers import Normalize, normal
from rollout_ft.session.place import Place
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.tree import Node
from rollout_ft.types import JSON, Divergence

DIVERGED = "diverged: "
"""How the reason of a fault begins that a trial meets because its replay left the record (`trial.on_divergence: fail`)."""
MOST = 8
"""Recorded turns that a request is compared with, the newest; each comparison reads both."""
SHOWN, BEFORE = 90, 30
"""Characters of either text, from so many before where they part."""
_SAY = ("tool", "user")


@dataclass(frozen=True, slots=True)
class Nearest:
    """The recorded turn that a request should have been. `servable`: but for texts of tools and users it is that turn."""

    node: Node
    divergence: Divergence | None
    """None where the two are the same under the normalizers."""
    servable: bool = False


@dataclass(frozen=True, slots=True)
class _Chain:
    """Messages that follow a place, and the digest after each of them."""

    messages: list[JSON]
    digests: list[bytes]


def nearest(
    recorded: Sequence[Node], request: TurnRequest, place: Place, key: MessageKey, normalize: Normalize | None,
    built_upon: Callable[[Node], bool],
) -> Nearest | None:  # fmt: skip
    """Of turns recorded at one place the most likely: it has the longest beginning in common, it was built upon, it has more of the
    first message that differs, it was asked for first. None where none came in the same form, as messages or as tokens."""
    of_kind = [node for node in recorded if (node.end is None) == (request.input_ids is not None)][-MOST:]
    if not of_kind:
        return None
    if request.input_ids is not None:
        return _in_tokens(of_kind, place)
    start = place.parent.end if place.parent and place.parent.end else Mark(b"")
    sent = _chain(start, normal(request.messages[place.new_from :], normalize), key)
    chains = {node.turn.key: _chain(start, normal(orjson.loads(node.turn.messages), normalize), key) for node in of_kind}

    def likelihood(node: Node) -> tuple[int, bool, bool, int, int]:
        chain = chains[node.turn.key]
        common = _common(chain.digests, sent.digests)
        whole = common == len(chain.digests) == len(sent.digests)
        return common, whole, built_upon(node), _apart(_text(chain, common), _text(sent, common)), -node.turn.order

    node = max(of_kind, key=likelihood)
    chain, turn = chains[node.turn.key], node.turn
    asked_alike = _sampling(request) == turn.sampling and (place.parent is not None or request.tools == turn.tools)
    if asked_alike and chain.digests == sent.digests:
        return Nearest(node, None, True)
    shapes = [_chain(start, messages, _shape(key)).digests[-1:] for messages in (chain.messages, sent.messages)]
    servable = asked_alike and len(chain.messages) == len(sent.messages) and shapes[0] == shapes[1]
    at, role, where, was, now = _difference(chain, sent, place.new_from) or _aside(node, request)
    apart = _apart(was, now)
    made = Divergence(place.base, turn.key, turn.depth, at, role, where, _shown(was, apart), _shown(now, apart))
    return Nearest(node, made, servable)


def words(d: Divergence) -> str:
    """For people, in one line."""
    where = f"message {d.message} ({d.role}), {d.where}" if d.message >= 0 else d.where
    return f"turn {d.turn}: {where}: recorded {d.recorded!r}, sent {d.sent!r}"


def _chain(start: Mark, messages: list[JSON], key: MessageKey) -> _Chain:
    digests: list[bytes] = []
    mark = start
    for message in messages:
        mark = mark.after(message, key=key)
        digests.append(mark.digest)
    return _Chain(messages, digests)


def _shape(key: MessageKey) -> MessageKey:
    """Equal for messages of tools and users whatever they say."""
    return lambda message, where: message["role"].encode() if message["role"] in _SAY else key(message, where)


def _difference(chain: _Chain, sent: _Chain, new_from: int) -> tuple[int, str, str, str, str] | None:
    """Message, role, where in it, and both texts; None where all messages are the same."""
    at = _common(chain.digests, sent.digests)
    here, there = chain.messages[at : at + 1], sent.messages[at : at + 1]
    if not here and not there:
        return None
    if not here or not there:
        role = (here or there)[0]["role"]
        return new_from + at, role, "messages", _counted(chain.messages), _counted(sent.messages)
    one, other = dict(_fields(here[0])), dict(_fields(there[0]))
    parted = (where for where in one | other if one.get(where, "") != other.get(where, ""))
    where = next(parted, "message")
    return new_from + at, there[0]["role"], where, one.get(where, ""), other.get(where, "")


def _fields(message: JSON) -> Iterator[tuple[str, str]]:
    """What the canonical matcher looks at comes first: where that differs, nothing else is to blame."""
    text = text_of(message.get("content"), "message")
    yield "role", message["role"]
    yield "content", text.strip() if message["role"] == "assistant" else text
    yield "name", message.get("name") or ""
    calls: list[JSON] = calls_of(message, "message")
    for i, call in enumerate(calls):
        function: JSON = call["function"]
        yield f"tool_calls[{i}].function.name", function["name"]
        yield f"tool_calls[{i}].function.arguments", arguments(function.get("arguments")).decode("utf-8", "replace")
    yield "tool_call_id", str(message.get("tool_call_id") or "")
    for i, call in enumerate(calls):
        yield f"tool_calls[{i}].id", str(call.get("id") or "")
    yield "reasoning_content", str(message.get("reasoning_content") or "")


def _aside(node: Node, request: TurnRequest) -> tuple[int, str, str, str, str]:
    """What differs beside the messages."""
    if node.parent is None and request.tools != node.turn.tools:
        return -1, "", "tools", node.turn.tools.decode("utf-8", "replace"), request.tools.decode("utf-8", "replace")
    was: JSON = orjson.loads(node.turn.sampling)
    names = sorted(was.keys() | request.sampling.keys())
    name = next((n for n in names if was.get(n) != request.sampling.get(n)), "")
    return -1, "", f"sampling.{name}", _value(was.get(name)), _value(request.sampling.get(name))


def _in_tokens(recorded: list[Node], place: Place) -> Nearest:
    sent = np.frombuffer(place.ids, "<i4")

    def common(node: Node) -> int:
        ids = np.frombuffer(node.turn.prompt_ids, "<i4")
        size = min(len(ids), len(sent))
        parted = np.flatnonzero(ids[:size] != sent[:size])
        return int(parted[0]) if len(parted) else size

    node = max(recorded, key=lambda n: (common(n), -n.turn.order))
    at, ids = common(node), np.frombuffer(node.turn.prompt_ids, "<i4")
    first = (place.parent.tokens - place.trim if place.parent else 0) + at
    was, now = (", ".join(map(str, each[at : at + 8].tolist())) for each in (ids, sent))
    made = Divergence(place.base, node.turn.key, node.turn.depth, -1, "", f"input_ids[{first}]", was, now)
    return Nearest(node, made)


def _sampling(request: TurnRequest) -> bytes:
    return orjson.dumps(request.sampling, option=orjson.OPT_SORT_KEYS)


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _apart(one: str, other: str) -> int:
    """The first character that differs; by bisection, for texts may be long."""
    same, end = 0, min(len(one), len(other)) + 1
    while end - same > 1:
        middle = (same + end) // 2
        same, end = (middle, end) if one[same:middle] == other[same:middle] else (same, middle)
    return same


def _shown(text: str, at: int) -> str:
    """What stands around a place, as text that can be written."""
    start = max(0, at - BEFORE)
    shown = text[start : start + SHOWN]
    cut = ("…" if start else "") + shown + ("…" if start + SHOWN < len(text) else "")
    return cut.encode("utf-8", "replace").decode()


def _text(chain: _Chain, at: int) -> str:
    return text_of(chain.messages[at].get("content"), "message") if at < len(chain.messages) else ""


def _counted(messages: list[JSON]) -> str:
    return "1 message" if len(messages) == 1 else f"{len(messages)} messages"


def _value(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()
