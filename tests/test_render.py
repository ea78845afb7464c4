"""Token in, token out: only what is new is rendered, and it is what the whole template would render."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import assistant, user
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.config import Config, model_dir
from rollout_ft.errors import BadRequest, ConfigError
from rollout_ft.session.render import ChatTemplate
from rollout_ft.testing.quickstart_agent import LOOK_UP

TEMPLATE = ChatTemplate(model_dir(Config()))
STOP = next(iter(TEMPLATE.stop_ids))
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), max_size=30)
appended = st.lists(
    st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "tool", "assistant"]), texts),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("tools", [None, [LOOK_UP]])
def test_the_rendering_is_that_of_transformers(tools: list[Any] | None):
    transformers: Any = pytest.importorskip("transformers", reason="compared where transformers is installed")
    theirs = transformers.AutoTokenizer.from_pretrained(model_dir(Config()))
    call = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": {"query": "é"}}}
    messages = [
        {"role": "system", "content": "Be brief."}, user("héllo \n {{x}}"),
        {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "page 1"}, user("go on"),
    ]  # fmt: skip
    expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    assert TEMPLATE.root(messages, tools) == expected


@given(said=texts, new=appended)
@settings(max_examples=50, deadline=None)
def test_what_follows_a_turn_renders_as_it_does_in_the_whole(said: str, new: list[dict[str, Any]]):
    first = [user("start")]
    prompt = TEMPLATE.root(first, None)
    sampled = [*TEMPLATE._encode(said), STOP]
    whole = TEMPLATE.text(TEMPLATE.root([*first, assistant(said), *new], None))
    assert TEMPLATE.text(prompt + sampled + TEMPLATE.after(STOP, new, None)) == whole


def test_a_turn_that_ended_by_length_is_closed_before_the_next():
    ended, cut = TEMPLATE.after(STOP, [user("b")], None), TEMPLATE.after(5, [user("b")], None)
    assert cut == [STOP, *ended]


def test_a_string_of_arguments_is_rendered_as_the_object_that_it_is():
    def conversation(arguments: Any) -> list[dict[str, Any]]:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return [user("a"), {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "x"}]

    assert TEMPLATE.root(conversation('{"a": 1}'), None) == TEMPLATE.root(conversation({"a": 1}), None)


def test_arguments_that_are_no_json_are_rendered_as_they_stand():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"cmd": "ls'}}
    text = TEMPLATE.text(TEMPLATE.root([user("a"), {"role": "assistant", "content": None, "tool_calls": [call]}, user("b")], None))
    assert '{"cmd": "ls' in text


def test_what_a_template_refuses_is_a_bad_request():
    with pytest.raises(BadRequest, match="content"):
        TEMPLATE.root([{"role": "user", "content": [{"type": "image_url"}]}], None)


def test_a_directory_without_a_tokenizer_is_a_config_error_that_names_the_key(tmp_path: Any):
    with pytest.raises(ConfigError, match=r"model\.path"):
        ChatTemplate(str(tmp_path))
