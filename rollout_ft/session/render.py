"""Messages to token ids, only for what is new.

Owns the splice of what follows a turn behind the tokens of that turn. Knows nothing of turns or requests. What follows
is rendered behind a stand-in for the conversation so far and cut where the stand-in's turn ends, so that the cost is
that of the new messages and sampled tokens are never decoded and encoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Protocol, cast

from rollout_ft.errors import BadRequest, ConfigError
from rollout_ft.session.messages import for_template, tools_for_template
from rollout_ft.session.probe import behind_mark, probe, stand_in
from rollout_ft.session.template import Template
from rollout_ft.types import JSON

OWN = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True, slots=True)
class Suffix:
    """What follows an assistant's turn: its last `trim` tokens are dropped, then come `ids`."""

    trim: int
    ids: list[int]


class Renderer(Protocol):
    """Turns messages into ids and ids into text; `stop_ids` end an assistant's turn, `vocab_size` bounds all ids.

    `splices`: `append` gives what the whole conversation would; where it is False, the whole is to be rendered again.

    `special_texts`: what in a text becomes a special token.
    """

    special_texts: tuple[str, ...]
    stop_ids: frozenset[int]
    vocab_size: int
    splices: bool

    def root(self, messages: list[JSON], tools: list[Any] | None, kwargs: JSON | None = None) -> list[int]: ...
    def append(self, reply: JSON, last_id: int, messages: list[JSON], tools: list[Any] | None, kwargs: JSON | None = None) -> Suffix: ...
    def text(self, ids: list[int], *, keep_special: bool = False) -> str: ...


def splice(last_id: int, ids: list[int], stop_ids: Set[int]) -> Suffix:
    """`ids` begin with what closes the turn: a stop token that was sampled is not repeated, and another one gives way."""
    if last_id not in stop_ids:
        return Suffix(0, ids)
    return Suffix(0, ids[1:]) if ids[:1] == [last_id] else Suffix(1, ids)


class ChatTemplate:
    """A model's own tokenizer and chat template, probed."""

    def __init__(self, template: Template, kwargs: JSON | None = None):
        added: Any = template.tokenizer.get_added_tokens_decoder().values()
        self.special_texts = tuple(str(token.content) for token in added if token.special)
        self.template, self._kwargs = template, kwargs or {}
        self.traits = probe(template, kwargs)
        self.vocab_size = int(template.tokenizer.get_vocab_size(with_added_tokens=True))
        self.stop_ids = self.traits.stop_ids
        self.splices = True
        if not self.stop_ids:
            raise ConfigError("model.path: nothing ends an assistant's turn: no eos_token, and no special token in the chat template")

    def root(self, messages: list[JSON], tools: list[Any] | None, kwargs: JSON | None = None) -> list[int]:
        """All ids of a conversation that starts here, up to where the assistant speaks."""
        messages = self._checked(messages, 0, self.traits.opening, "start a conversation")
        tools = tools_for_template(tools)
        if tools and not self.traits.tools:
            raise BadRequest("tools: the model's chat template does not render them; describe them in a message", param="tools")
        return self._encode(self.render([], messages, tools, kwargs))

    def append(self, reply: JSON, last_id: int, messages: list[JSON], tools: list[Any] | None, kwargs: JSON | None = None) -> Suffix:
        """What stands between a turn of the assistant, whose message is `reply`, and its next. The messages are the
        request's last ones: an error counts them from its end."""
        return splice(last_id, self._encode(self.following(reply, messages, tools, kwargs)), self.stop_ids)

    def following(self, reply: JSON, messages: list[JSON], tools: list[Any] | None, kwargs: JSON | None = None) -> str:
        """The same as text, from what closes the turn to the generation prompt."""
        traits, first = self.traits, -len(messages)
        messages = self._checked(messages, first, traits.appendable, "follow an assistant's turn")
        calls = cast("list[JSON]", reply.get("tool_calls") or [])
        base = stand_in(calls, traits.form, traits.calls)
        shown = tools_for_template(tools) if traits.tools_recur else None
        after = behind_mark(self.render(base, messages, shown, kwargs))
        tail = traits.call_tail if calls and traits.calls != "none" else traits.tail
        if not after.startswith(tail):
            raise BadRequest("the model's chat template cannot continue this conversation behind the last reply", param="messages")
        return after[len(tail) :]

    def text(self, ids: list[int], *, keep_special: bool = False) -> str:
        return self.template.decode(ids, keep_special)

    def _checked(self, messages: list[JSON], first: int, opening: Set[str], what: str) -> list[JSON]:
        """Refuses roles that the template would leave out in silence. A developer is the system to a template that has
        but that: OpenAI's newer clients call it so."""
        checked: list[JSON] = []
        for i, message in enumerate(messages):
            at_start = first == 0 and i == 0
            role, where = message["role"], f"messages[{first + i}]"
            known = opening if at_start else self.traits.appendable
            if role == "developer" and role not in known and "system" in known:
                message, role = {**message, "role": "system"}, "system"
            checked.append(message)
            if role not in known:
                verb = what if at_start else "follow what has been said"
                raise BadRequest(f"{where}: this model's chat template has no {role!r} that can {verb}; use the role 'user'", param=where)
        return checked

    def render(self, base: list[JSON], messages: list[JSON], tools: list[Any] | None, kwargs: JSON | None, *, prompt: bool = True) -> str:
        """The text of these messages behind `base`, with the generation prompt or without."""
        if kwargs and (own := OWN & kwargs.keys()):
            raise BadRequest(f"chat_template_kwargs.{min(own)} is set by the server: leave it out", param="chat_template_kwargs")
        values = {**self._kwargs, **(kwargs or {})}
        first = -len(messages) if base else 0
        plain = [for_template(m, self.traits.form, f"messages[{first + i}]") for i, m in enumerate(messages)]

        def render(count: int) -> str:
            return self.template.render([*base, *plain[:count]], tools, values, prompt=prompt)

        try:
            return render(len(plain))
        except Exception as e:  # a template raises what it likes
            where = f"messages[{first + _culprit(render, len(plain), str(e))}]"
            raise BadRequest(f"{where}: the model's chat template cannot render it: {e}", param=where) from e

    def _encode(self, text: str) -> list[int]:
        try:
            return self.template.encode(text)
        except (TypeError, UnicodeError):
            raise BadRequest("messages: half of a surrogate pair is no text", param="messages") from None


def _culprit(render: Callable[[int], str], count: int, error: str) -> int:
    """The message with which rendering begins to fail like this, by bisection."""
    good, bad = 0, count
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            render(middle)
            good = middle
        except Exception as e:
            good, bad = (good, middle) if str(e) == error else (middle, bad)
    return max(bad - 1, 0)
