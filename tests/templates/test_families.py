"""The templates and tokenizers of real models: spliced conversations are the models' own.

`make test-templates` installs what these need. Where a family's template is not faithful to itself, `families.py` says
why.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from families import FAMILIES, FILES, Family, model
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rollout_ft.config import Config
from rollout_ft.errors import ConfigError
from rollout_ft.session.drift import TOOLS, check, compare, load_renderer, play, unchecked_renderer
from rollout_ft.session.messages import for_template
from rollout_ft.session.probe import a_call
from rollout_ft.session.render import ChatTemplate

if not (FILES / ".installed").exists():
    pytest.skip("make test-templates installs the tokenizers and templates of real models", allow_module_level=True)

JSON = dict[str, Any]
pytestmark = pytest.mark.timeout(300)
by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
some = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))

# Marks of special tokens stay out: a template gives no way to write them as text.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>｜[]"), max_size=40)
arguments = st.dictionaries(
    st.text("abcxyz_", min_size=1, max_size=8), texts | st.integers() | st.lists(st.booleans()), min_size=1, max_size=3
)
said = st.tuples(texts, st.lists(arguments, max_size=2))
rounds = st.lists(st.tuples(said, st.lists(texts, max_size=2)), min_size=1, max_size=4)


@functools.cache
def renderer(family: Family) -> ChatTemplate:
    return unchecked_renderer(config(family))


def config(family: Family) -> Config:
    return Config.model_validate({"model": {"path": str(model(family))}})


def conversation(turns: list[Any], roles: frozenset[str]) -> list[JSON]:
    """A user's question, then turns of the assistant, each with the results of its calls and what the user says next."""
    messages: list[JSON] = [{"role": "user", "content": "go"}]
    for (text, calls), asked in turns:
        given = [{**a_call(number=i), "function": {"name": "look_up", "arguments": c}} for i, c in enumerate(calls)]
        messages.append({"role": "assistant", "content": "" if given else text, **({"tool_calls": given} if given else {})})
        messages += [{"role": "tool", "content": "r", "tool_call_id": c["id"], "name": "look_up"} for c in given if "tool" in roles]
        messages += [{"role": "user", "content": text} for text in (asked if given else [*asked, "next"])]
    return messages


@by_family
def test_drift_is_where_it_is_known_to_be(family: Family):
    kinds = {d.kind for d in check(renderer(family))}
    assert ("assistant_text" in kinds) == bool(family.thinking)
    assert ("structure" in kinds) == bool(family.broken)
    assert "same" in kinds or family.thinking


@by_family
def test_a_template_that_is_broken_is_refused_and_no_other(family: Family):
    if family.broken:
        with pytest.raises(ConfigError, match="cannot be appended to"):
            load_renderer(config(family))
    else:
        assert load_renderer(config(family)).splices


@by_family
def test_the_tokens_that_end_a_turn_are_found(family: Family):
    found = {renderer(family).text([i], keep_special=True) for i in renderer(family).stop_ids}
    closing = {"llama3": {"<|eot_id|>"}}.get(family.name, set[str]())
    assert found == {family.eos_token, *family.eos, *closing}


@by_family
@some
@given(turns=rounds)
def test_a_conversation_continued_turn_by_turn_is_what_it_is_from_scratch(family: Family, turns: list[Any]):
    assume(not family.broken or not any(calls for (_, calls), _ in turns))
    it = renderer(family)
    messages = conversation(turns, it.traits.appendable)
    drift = compare(it, messages)
    assert drift.kind != "structure", drift
    assert drift.kind != "not_rendered" or it.traits.calls != "many", drift
    if not family.thinking and drift.kind == "assistant_text":  # what a turn begins with melts into the prompt's last token
        assert it.text(play(it, messages).ids, keep_special=True) == it.text(
            it.root(messages, TOOLS if it.traits.tools else None), keep_special=True
        )


@by_family
@some
@given(turns=rounds, data=st.data())
def test_every_sampled_token_is_in_the_next_prompt_whatever_was_sampled(family: Family, turns: list[Any], data: st.DataObject):
    it = renderer(family)
    tokens = st.integers(0, it.vocab_size - 1)
    messages = conversation(turns, it.traits.appendable)
    ids = it.root(messages[:1], TOOLS if it.traits.tools else None)
    spoken = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for at, until in zip(spoken, [*spoken[1:], len(messages)], strict=True):
        path = (
            ids
            + data.draw(st.lists(tokens, min_size=1, max_size=8))
            + data.draw(st.lists(st.sampled_from(sorted(it.stop_ids)), max_size=1))
        )
        suffix = it.append(messages[at], path[-1], messages[at + 1 : until], None)
        ids = path[: len(path) - suffix.trim] + suffix.ids
        assert ids[: len(path) - 1] == path[:-1]
        assert ids[len(path) - 1] == path[-1] or path[-1] in it.stop_ids
        assert suffix.ids


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name != "smollm2"], ids=lambda f: f.name)  # it lacks some bytes
@some
@given(text=texts)
def test_text_of_joined_ids_is_the_text(family: Family, text: str):
    it = renderer(family)
    normal = it.template.tokenizer.normalizer
    expected = normal.normalize_str(text) if normal else text
    assert it.text(it.template.encode(text), keep_special=True) == expected


@by_family
def test_the_rendering_is_that_of_transformers(family: Family):
    render: Any = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    it, directory = renderer(family), model(family)
    apart = directory / "chat_template.jinja"
    source = apart.read_text() if apart.exists() else json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    # transformers leaves out a content that is null, which one template asks for beside calls.
    calls = [] if it.traits.form.null_content else [{"x": "é"}]
    messages = conversation([(("a", []), ["Ünïcode 👋🏽"]), (("", calls), [])], it.traits.appendable)
    tools = TOOLS if it.traits.tools else None
    plain = [for_template(m, it.traits.form) for m in messages]
    theirs, _ = render([plain], tools=tools, chat_template=source, add_generation_prompt=True, **it.template.special)
    assert it.render([], messages, tools, None) == theirs[0]
