"""What a chat template does, learned by rendering with it.

Owns the stand-in conversation and what is read off it: where an assistant's turn ends, which tokens end it, which
roles can follow. Knows no family of models, no sampled token and no stored turn. The invariant: the model's own part
of a turn ends where the text of its turn does, so whatever the template writes behind that (`<|im_end|>` and a newline,
or nothing where the opener of the next message ends the turn) belongs to what follows.
"""

from __future__ import annotations

import itertools
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from rollout_ft.session.canonical import ROLES
from rollout_ft.session.messages import CallForm, for_template
from rollout_ft.session.template import Template
from rollout_ft.types import JSON

MARK = f"mark-{uuid.uuid4().hex}"
"""Where the stand-in's turn is found again; nobody can have written it into a message."""
SECOND = f"mark-{uuid.uuid4().hex}"

Calls = Literal["none", "one", "many"]
_USER: JSON = {"role": "user", "content": "-"}
_FUNCTION: JSON = {"name": MARK, "description": MARK, "parameters": {"type": "object", "properties": {}}}
_TOOL: JSON = {"type": "function", "function": _FUNCTION}
_PLAIN_TOOL: JSON = {"type": "function", "function": {**_FUNCTION, "name": "f", "description": "-"}}
_THINKING: tuple[JSON, ...] = ({"enable_thinking": False}, {"enable_thinking": True})


@dataclass(frozen=True, slots=True)
class Prompt:
    """What stands where the assistant begins to speak, and the `chat_template_kwargs` that it takes."""

    kwargs: JSON
    text: str


@dataclass(frozen=True, slots=True)
class Traits:
    """What was learned. `opening` may be the first message, `appendable` may follow an assistant's turn.

    `tail` and `call_tail` are what a model itself writes behind its content, and behind the arguments of its last call.
    `closing` and `call_closing` are what the template writes behind that where the turn is the last.
    """

    stop_ids: frozenset[int]
    opening: frozenset[str]
    appendable: frozenset[str]
    form: CallForm
    calls: Calls
    tools: bool
    tools_recur: bool
    """What follows a turn depends on the tools: they are rendered with the stand-in as well."""
    tail: str
    call_tail: str
    closing: str
    call_closing: str
    prompts: tuple[Prompt, ...]


def stand_in(calls: list[JSON], form: CallForm, kind: Calls) -> list[JSON]:
    """A conversation that ends in an assistant's turn with these calls, whose text ends in MARK and a tail.

    Names and ids are kept, because templates look for the call that a tool's message answers; arguments are not.
    """
    reply: JSON = {"role": "assistant", "content": MARK if kind == "none" or not calls else ""}
    given = calls if kind == "many" else calls[:1]
    if given:
        reply["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": {"x": MARK if call is given[-1] else "-"}}} for call in given
        ]
    return [_USER, for_template(reply, form)]


def behind_mark(text: str) -> str:
    return text.partition(MARK)[2]


def probe(template: Template, kwargs: JSON | None = None) -> Traits:
    """Learns a template; `kwargs` are the `chat_template_kwargs` that hold unless a request has its own."""
    return _Probe(template, kwargs or {}).traits()


def a_call(name: str = "look_up", number: int = 1) -> JSON:
    # An id of nine letters and digits: some templates insist.
    return {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": {"x": "-"}}}


class _Probe:
    def __init__(self, template: Template, kwargs: JSON):
        self._template, self._kwargs = template, kwargs
        added: dict[int, Any] = template.tokenizer.get_added_tokens_decoder()
        self._special = {str(t.content): i for i, t in added.items() if t.special or i in template.eos_ids}
        self._find = re.compile("|".join(re.escape(s) for s in sorted(self._special, key=len, reverse=True)) or r"(?!)")
        self._form: CallForm
        self._calls: Calls
        self._form, self._calls = self._learn_calls()

    def traits(self) -> Traits:
        closing, call_closing, tail, call_tail = self._ends()
        appendable = frozenset(role for role in ROLES if self._appends(role))
        return Traits(
            stop_ids=self._stop_ids(closing, call_closing),
            opening=frozenset(role for role in ROLES if self._opens(role)),
            appendable=appendable,
            form=self._form,
            calls=self._calls,
            tools=MARK in self._try([_USER], tools=[_TOOL]),
            tools_recur=self._tools_recur(appendable),
            tail=tail,
            call_tail=call_tail,
            closing=closing,
            call_closing=call_closing,
            prompts=tuple(self._prompts()),
        )

    def _try(self, messages: list[JSON], *, tools: list[Any] | None = None, prompt: bool = True, **kwargs: Any) -> str:
        """The text; empty where the template refuses."""
        try:
            return self._template.render(messages, tools, {**self._kwargs, **kwargs}, prompt=prompt)
        except Exception:  # whatever a template raises: it is what we ask
            return ""

    def _base(self, calls: int = 0) -> list[JSON]:
        return stand_in([a_call(number=i) for i in range(calls)], self._form, self._calls)

    def _learn_calls(self) -> tuple[CallForm, Calls]:
        for null_content, as_object in itertools.product((False, True), (True, False)):
            form = CallForm(as_object, True, null_content)
            text = self._try(stand_in([a_call()], form, "one"), prompt=False)
            if MARK in text and "{'x'" not in text:  # Python's own rendering of an object: the template wants text
                two = self._try(stand_in([a_call(), a_call("other", 2)], form, "many"), prompt=False)
                odd: JSON = {"role": "assistant", "tool_calls": [{**a_call(), "function": {"name": "f", "arguments": MARK}}]}
                any_text = MARK in self._try([_USER, for_template(odd, form)], prompt=False)
                return CallForm(as_object, any_text, null_content), "many" if MARK in two and "look_up" in two else "one"
        return CallForm(), "none"

    def _ends(self) -> tuple[str, str, str, str]:
        """`(closing, call_closing, tail, call_tail)`: what the template writes, and the model, behind a last turn's mark."""
        after = behind_mark(self._try(self._base(), prompt=False))
        found = list(self._find.finditer(after))
        known = [m for m in found if self._special[m.group()] in self._template.eos_ids]
        at = (known or found)[0].start() if found else 0
        tail, closing = after[:at], after[at:]
        after = behind_mark(self._try(self._base(1), prompt=False))
        found = list(self._find.finditer(after))
        at = found[-1].start() if found else len(after)
        if after.endswith(closing):
            at = len(after) - len(closing)
        return closing, after[at:], tail, after[:at]

    def _stop_ids(self, closing: str, call_closing: str) -> frozenset[int]:
        """Where nothing closes a turn, the opener of the next message ends it."""
        ends = [closing, call_closing]
        if not closing:
            ends = [behind_mark(self._try([*self._base(n), {**_USER, "role": role}])) for n, role in ((0, "user"), (1, "tool"))]
            ends[1] = ends[1].removeprefix(behind_mark(self._try(self._base(1), prompt=False)))
        first = [self._find.match(end.lstrip()) for end in ends]
        return self._template.eos_ids | {self._special[m.group()] for m in first if m}

    def _opens(self, role: str) -> bool:
        said: JSON = {"role": role, "content": SECOND}
        return any(SECOND in self._try(messages) for messages in ([said], [said, _USER]))

    def _appends(self, role: str) -> bool:
        said: JSON = {"role": role, "content": SECOND, **({"tool_call_id": a_call()["id"], "name": "look_up"} if role == "tool" else {})}
        base = self._base(role == "tool")
        return any(SECOND in behind_mark(self._try([*base, *new])) for new in ([said], [said, _USER]))

    def _tools_recur(self, appendable: frozenset[str]) -> bool:
        for role in appendable & {"user", "tool"}:
            messages = [*self._base(role == "tool"), {**_USER, "role": role}]
            if behind_mark(self._try(messages)) != behind_mark(self._try(messages, tools=[_PLAIN_TOOL])):
                return True
        return False

    def _prompts(self) -> Iterator[Prompt]:
        known: set[str] = set()
        for kwargs in ({}, *_THINKING):
            text, bare = (self._try([_USER], prompt=prompt, **kwargs) for prompt in (True, False))
            prompt = text.removeprefix(bare)
            if prompt not in known:
                known.add(prompt)
                yield Prompt({**self._kwargs, **kwargs}, prompt)
