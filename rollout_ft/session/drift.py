"""Whether the splice is what the whole conversation would render.

Owns a fixed set of conversations and the comparison. Each is played turn by turn, with what the template itself makes
of an assistant's message as the sampled tokens, and then rendered from scratch. Where both differ within assistants'
turns alone, the tokens of the splice are the better ones: they were sampled. Where they differ in what the template
writes between the turns, the template cannot be appended to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from rollout_ft.config import Config, model_dir
from rollout_ft.errors import BadRequest, ConfigError
from rollout_ft.session.probe import MARK, a_call
from rollout_ft.session.render import ChatTemplate
from rollout_ft.session.template import load
from rollout_ft.types import JSON

Kind = Literal["same", "assistant_text", "structure", "not_rendered"]
SHOWN = 60

TOOLS: list[JSON] = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks a word up.",
            "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "the word"}}, "required": ["x"]},
        },
    }
]


def _user(text: str) -> JSON:
    return {"role": "user", "content": text}


def _said(text: str, *calls: JSON, **more: str) -> JSON:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {}), **more}


def _result(text: str, number: int = 1) -> JSON:
    return {"role": "tool", "content": text, "tool_call_id": a_call(number=number)["id"], "name": "look_up"}


_SYSTEM: JSON = {"role": "system", "content": "Be brief."}
CONVERSATIONS: dict[str, list[JSON]] = {
    "turns": [_SYSTEM, _user("One?"), _said("First."), _user("Two?"), _said("Second."), _user("Three?")],
    "tools": [_SYSTEM, _user("What is it?"), _said("", a_call()), _result("A page."), _said("It is a page."), _user("And?")],
    "tools in two rounds": [_user("Both?"), _said("", a_call()), _result("One."), _said("", a_call(number=2)), _result("Two.", 2)],
    "several results": [
        _user("Both?"), _said("", a_call(), a_call(number=2)), _result("One."), _result("Two.", 2), _said("So."), _user("?"),
    ],
    "a system message in the middle": [_user("One?"), _said("First."), _SYSTEM, _user("Two?"), _said("Second."), _user("Three?")],
    "empty content": [_user("One?"), _said(""), _user(""), _said("Second."), _user("Three?")],
    "unicode": [_user("Grüß dich 👋🏽\u200d"), _said("你好 🇫🇷 e\u0301"), _user("ﷺ\u00a0𝔘"), _said("ok"), _user("end")],
    "reasoning": [
        _user("One?"), _said("First.", reasoning_content="So it is one."), _user("Two?"),
        _said("Second.", reasoning_content="Then two."), _user("Three?"),
    ],
    "reasoning between calls": [
        _user("What is it?"), _said("", a_call(), reasoning_content="I look."), _result("A page."),
        _said("A page.", reasoning_content="I see."), _user("And?"),
    ],
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Drift:
    """How one conversation came out; from token `position` on, `expected` is the whole's text and `actual` the splice's.

    `same`: token for token. `assistant_text`: the turns of the assistant alone differ. `structure`: more than that.
    `not_rendered`: the template refuses the conversation, `expected` is its reason.
    """

    conversation: str
    kind: Kind
    position: int = 0
    expected: str = ""
    actual: str = ""


def check(renderer: ChatTemplate) -> tuple[Drift, ...]:
    """Every conversation, with every generation prompt that the template has."""
    return tuple(_check_all(renderer))


def _check_all(renderer: ChatTemplate) -> Iterator[Drift]:
    for prompt in renderer.traits.prompts:
        when = ", ".join(f"{k}={v}" for k, v in prompt.kwargs.items())
        for name, messages in CONVERSATIONS.items():
            yield compare(renderer, messages, prompt.kwargs, f"{name} ({when})" if when else name)


def compare(renderer: ChatTemplate, messages: list[JSON], kwargs: JSON | None = None, name: str = "") -> Drift:
    """Plays the conversation, whose last message is not the assistant's, and renders it from scratch."""
    try:
        played = play(renderer, messages, kwargs)
        whole = renderer.root(messages, _tools(renderer), kwargs)
    except BadRequest as e:
        return Drift(name, "not_rendered", expected=str(e))
    if played.ids == whole:
        return Drift(name, "same")
    position = _common(played.ids, whole)
    expected, actual = (renderer.text(ids[position : position + SHOWN], keep_special=True) for ids in (whole, played.ids))
    return Drift(name, "assistant_text" if _only_turns_differ(renderer, played, whole) else "structure", position, expected, actual)


@dataclass(frozen=True, slots=True)
class Played:
    """A conversation turn by turn: its tokens, what the template wrote around the turns, and the last token of each turn
    before the one that ends it."""

    ids: list[int]
    around: list[str]
    last: list[list[int]]


def play(renderer: ChatTemplate, messages: list[JSON], kwargs: JSON | None = None) -> Played:
    tools = _tools(renderer)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    ids = renderer.root(messages[: turns[0]], tools, kwargs)
    around, last = [renderer.text(ids, keep_special=True)], list[list[int]]()
    for at, until in zip(turns, [*turns[1:], len(messages)], strict=True):
        reply, new = messages[at], messages[at + 1 : until]
        said, stop = _spoken(renderer, messages[: at + 1], kwargs)
        suffix = renderer.append(reply, stop, new, tools, kwargs)
        ids = [*ids, *said, stop][: len(ids) + len(said) + 1 - suffix.trim] + suffix.ids
        last.append(said[-1:])
        # As it is decoded: some tokenizers normalise what they encode.
        around.append(renderer.text(renderer.template.encode(renderer.following(reply, new, tools, kwargs)), keep_special=True))
    before = [_without_thinking(renderer, text, kwargs) for text in around[:-1]]
    return Played(ids, [*before, around[-1]], last)


def _spoken(renderer: ChatTemplate, messages: list[JSON], kwargs: JSON | None) -> tuple[list[int], int]:
    """What a model would have sampled for the last message, and the token that ends the turn."""
    traits, encode, tools = renderer.traits, renderer.template.encode, _tools(renderer)
    closing = traits.call_closing if messages[-1].get("tool_calls") else traits.closing
    before = renderer.render([], messages[:-1], tools, kwargs)
    whole = renderer.render([], messages, tools, kwargs, prompt=False).removesuffix(closing)
    # Whole tokens in common: a turn without the thought that the prompt opened is not cut within a token.
    said = encode(whole.removeprefix(before)) if whole.startswith(before) else encode(whole)[_common(encode(before), encode(whole)) :]
    stop = next(iter(traits.stop_ids & set(encode(closing)[:1])), min(traits.stop_ids))
    return list(takewhile(lambda i: i not in traits.stop_ids, said)), stop


def _without_thinking(renderer: ChatTemplate, text: str, kwargs: JSON | None) -> str:
    """Without what a generation prompt has and a turn in the history has not: an opened block of thinking."""
    first = _user("-")
    bare, prompted, turn = (
        renderer.render([], messages, None, kwargs, prompt=prompt)
        for messages, prompt in (([first], False), ([first], True), ([first, _said(MARK), first], False))
    )
    prompt, header = prompted.removeprefix(bare), turn.removeprefix(bare)
    return text.removesuffix(prompt) + prompt[: _common(prompt, header)] if text.endswith(prompt) else text


def _only_turns_differ(renderer: ChatTemplate, played: Played, ids: list[int]) -> bool:
    """Whether the whole is what the template wrote around the turns, in its order, and each turn ends as it did."""
    whole = renderer.text(ids, keep_special=True)
    first, *between, end = played.around
    if not whole.startswith(first) or not whole.endswith(end):
        return False
    at, ends = len(first), len(whole) - len(end)
    for piece, last in zip([*between, end], played.last, strict=True):
        found = ends if piece is end else whole.find(piece, at, ends)
        turn = renderer.template.encode(whole[at:found])
        if found < at or (turn and turn[-1:] != last):
            return False
        at = found + len(piece)
    return True


def _tools(renderer: ChatTemplate) -> list[JSON] | None:
    return TOOLS if renderer.traits.tools else None


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How much both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def unchecked_renderer(config: Config) -> ChatTemplate:
    model = config.model
    return ChatTemplate(load(model_dir(config), model.chat_template), model.chat_template_kwargs)


def load_renderer(config: Config) -> ChatTemplate:
    """The renderer of the config's model. Raises ConfigError for a template that cannot be used as the config says."""
    model, renderer = config.model, unchecked_renderer(config)
    broken = next((d for d in check(renderer) if d.kind == "structure"), None)
    if broken is not None and model.on_template_drift == "refuse":
        raise ConfigError(
            f"model.path: the chat template of {model.chat_template or model_dir(config)} cannot be appended to: in "
            f"{broken.conversation!r}, token {broken.position} of the whole conversation begins {broken.expected!r}, and of the one "
            f"continued turn by turn {broken.actual!r}. Set model.chat_template to a template that only appends, or "
            "model.on_template_drift to rerender or splice"
        )
    renderer.splices = broken is None or model.on_template_drift == "splice"
    return renderer
