"""Token in, token out: only what is new is rendered, and it is what the whole template would render."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import assistant, user
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError
from tokenizers import AddedToken, Tokenizer

from rollout_ft.config import Config, model_dir
from rollout_ft.errors import BadRequest, ConfigError
from rollout_ft.session.drift import check, load_renderer
from rollout_ft.session.render import ChatTemplate, Suffix, splice
from rollout_ft.session.template import Template, compile_template, load
from rollout_ft.testing.quickstart_agent import LOOK_UP

SMALL = model_dir(Config())
TEMPLATE = ChatTemplate(load(SMALL))
STOP = next(iter(TEMPLATE.stop_ids))

CHATML = """
{%- for m in messages -%}
<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt -%}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{%- endif %}"""
# The tokens that end a turn open the next message; arguments must be objects.
GLM = """
{%- for m in messages -%}
{%- if m.role == 'user' -%}<|user|>\n{{ m.content }}
{%- elif m.role == 'assistant' -%}<|assistant|>\n{{ m.content }}
{%- for c in m.tool_calls -%}<tool_call>{{ c.function.name }}{% for k, v in c.function.arguments.items() %}
{{ k }}={{ v }}{% endfor %}</tool_call>{%- endfor -%}
{%- elif m.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|observation|>{%- endif %}
<tool_response>{{ m.content }}</tool_response>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""
LLAMA = """
{%- for m in messages -%}
{%- if m.role not in ('user', 'assistant', 'tool') and not loop.first -%}{{ raise_exception('a late ' + m.role) }}{%- endif -%}
<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n
{%- if m.tool_calls is defined and m.tool_calls | length != 1 -%}{{ raise_exception('one call') }}{%- endif -%}
{%- if m.tool_calls is defined -%}{{ m.tool_calls[0].function.arguments | tojson }}<|eom_id|>
{%- else -%}{{ m.content | trim }}<|eot_id|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start_header_id|>assistant<|end_header_id|>\n\n{%- endif -%}"""
# What stands at the top changes with what comes later.
COUNTING = "<|im_start|>{{ messages | length }}<|im_end|>" + CHATML
ADDED = ["<|user|>", "<|assistant|>", "<|observation|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]


def family(source: str, *eos: str) -> ChatTemplate:
    tokenizer: Any = Tokenizer.from_file(f"{SMALL}/tokenizer.json")
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ADDED])
    return ChatTemplate(Template(tokenizer, compile_template(source), {}, frozenset(tokenizer.token_to_id(t) for t in eos)))


FAMILIES = {
    "small": TEMPLATE,
    "chatml": family(CHATML, "<|im_end|>", "<|endoftext|>"),
    "glm": family(GLM, "<|endoftext|>", "<|user|>", "<|observation|>"),
    "llama": family(LLAMA),
}
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), max_size=30)


def call(name: str = "f", arguments: Any = "{}", number: int = 1) -> dict[str, Any]:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*given: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(given)}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "call_1"}


def token(renderer: ChatTemplate, text: str) -> int:
    found = renderer.template.encode(text)
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("tools", [None, [LOOK_UP]])
def test_the_rendering_is_that_of_transformers(tools: list[Any] | None):
    transformers: Any = pytest.importorskip("transformers", reason="compared where transformers is installed")
    theirs = transformers.AutoTokenizer.from_pretrained(SMALL)
    messages = [
        {"role": "system", "content": "Be brief."}, user("héllo \n {{x}}"),
        {"role": "assistant", "content": "", "tool_calls": [call("look_up", {"query": "é"})]}, result("page 1"), user("go on"),
    ]  # fmt: skip
    expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    assert TEMPLATE.root(messages, tools) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_every_conversation_continued_turn_by_turn_is_what_it_is_from_scratch(name: str):
    assert {d.kind for d in check(FAMILIES[name]) if "enable_thinking" not in d.conversation} <= {"same", "not_rendered"}


def test_an_empty_thought_that_only_a_generation_prompt_has_is_kept_as_it_was_sampled_upon():
    assert {d.kind for d in check(FAMILIES["chatml"]) if "enable_thinking" in d.conversation} == {"assistant_text"}


@given(
    name=st.sampled_from(["small", "chatml", "glm"]),
    turns=st.lists(st.tuples(texts, st.lists(st.tuples(st.sampled_from(["user", "tool"]), texts), max_size=3)), min_size=1, max_size=4),
)
@settings(max_examples=100, deadline=None)
def test_a_prompt_starts_with_all_tokens_of_the_turn_before_and_is_what_the_whole_renders(name: str, turns: list[Any]):
    renderer = FAMILIES[name]
    stop, head = (token(renderer, "<|user|>"), "\n") if name == "glm" else (STOP, "")
    messages = [user("start")]
    ids = renderer.root(messages, None)
    for said, new in turns:
        before = [*ids, *renderer.template.encode(head + said), stop]
        added = [{"role": role, "content": text} for role, text in [*new, ("user", "?")]]
        suffix = renderer.append(assistant(said), stop, added, None)
        ids = [*before[: len(before) - suffix.trim], *suffix.ids]
        assert ids[: len(before) - 1] == before[:-1]
        messages += [assistant(said), *added]
    assert renderer.text(ids, keep_special=True) == renderer.text(renderer.root(messages, None), keep_special=True)


@given(last=st.integers(0, 5), ids=st.lists(st.integers(0, 5)), stop=st.frozensets(st.integers(0, 5)))
def test_a_stop_token_is_there_once_and_nothing_else_is_dropped(last: int, ids: list[int], stop: frozenset[int]):
    suffix = splice(last, ids, stop)
    turn = [9, last]
    prompt = [*turn[: 2 - suffix.trim], *suffix.ids]
    assert prompt == ([9, *ids] if last in stop else [9, last, *ids])
    assert suffix.trim == 0 or (last in stop and ids[:1] != [last])


def test_the_newline_that_a_template_writes_behind_the_stop_token_is_added():
    suffix = TEMPLATE.append(assistant("a"), STOP, [user("b")], None)
    assert TEMPLATE.text(suffix.ids, keep_special=True) == "\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_that_ended_by_length_is_closed_before_the_next(name: str):
    renderer, cut = FAMILIES[name], token(FAMILIES[name], "a")
    suffix = renderer.append(assistant("a"), cut, [user("b")], None)
    whole = renderer.render([], [user("-"), assistant("a"), user("b")], None, None)
    assert suffix.trim == 0
    assert whole.endswith("a" + renderer.text(suffix.ids, keep_special=True))


def test_a_stop_token_that_opens_another_message_than_the_one_that_follows_gives_way():
    glm = FAMILIES["glm"]
    observation, opener = token(glm, "<|observation|>"), token(glm, "<|user|>")
    assert glm.append(calls(call()), observation, [user("b")], None).trim == 1
    assert glm.append(calls(call()), observation, [user("b")], None).ids[0] == opener
    assert glm.append(calls(call()), observation, [result("b")], None).trim == 0
    assert glm.append(assistant("a"), opener, [user("b")], None).ids[0] != opener


def test_another_stop_token_than_that_of_the_template_gives_way_to_it():
    chatml = FAMILIES["chatml"]
    suffix = chatml.append(assistant("a"), token(chatml, "<|endoftext|>"), [user("b")], None)
    assert suffix == Suffix(1, [STOP, *chatml.append(assistant("a"), STOP, [user("b")], None).ids])


def test_a_developer_is_the_system_to_a_template_that_knows_only_that():
    strict = family(CHATML.replace("for m in messages", "for m in messages if m.role != 'developer'"), "<|im_end|>")
    assert "developer" not in strict.traits.opening | strict.traits.appendable
    said = [{"role": "developer", "content": "be brief"}, user("a")]
    meant = [{**said[0], "role": "system"}, said[1]]
    assert strict.root(said, None) == strict.root(meant, None)
    assert strict.append(assistant("b"), STOP, said, None) == strict.append(assistant("b"), STOP, meant, None)


def test_stop_tokens_are_found_without_a_list_of_them():
    llama, glm = FAMILIES["llama"], family(GLM)
    assert llama.stop_ids == {token(llama, "<|eot_id|>"), token(llama, "<|eom_id|>")}
    assert glm.stop_ids == {token(glm, "<|user|>"), token(glm, "<|observation|>")}


def test_a_turn_with_calls_is_closed_as_the_template_closes_it():
    llama = FAMILIES["llama"]
    suffix = llama.append(calls(call()), token(llama, "a"), [result("b")], None)
    assert suffix.ids[0] == token(llama, "<|eom_id|>")


def test_several_results_stand_under_one_opener():
    glm = FAMILIES["glm"]
    suffix = glm.append(calls(call(), call(number=2)), token(glm, "<|observation|>"), [result("a"), result("b")], None)
    text = "<tool_response>a</tool_response><tool_response>b</tool_response><|assistant|>"
    assert glm.text(suffix.ids, keep_special=True) == text


def test_several_calls_where_the_template_takes_one_are_continued_all_the_same():
    llama = FAMILIES["llama"]
    assert llama.append(calls(call(), call(number=2)), 5, [result("a"), result("b")], None).ids


@given(arguments=st.one_of(texts, st.sampled_from(["", "{}", "[1]", "null", '{"a": NaN}', '{"cmd": "ls', "<|im_end|>", "■"])))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_follows_a_turn_does_not_depend_on_the_arguments_of_its_calls(name: str, arguments: str):
    renderer = FAMILIES[name]
    expected = renderer.append(calls(call()), STOP, [result("x")], None)
    assert renderer.append(calls(call(arguments=arguments)), STOP, [result("x")], None) == expected


def test_a_string_of_arguments_is_rendered_as_the_object_that_it_is():
    def conversation(arguments: Any) -> list[dict[str, Any]]:
        return [user("a"), calls(call(arguments=arguments)), result("x")]

    assert TEMPLATE.root(conversation('{"a": 1}'), None) == TEMPLATE.root(conversation({"a": 1}), None)
    assert "123456789012345678901" in TEMPLATE.text(TEMPLATE.root(conversation('{"a": 123456789012345678901}'), None))


@pytest.mark.parametrize("name", ["small", "chatml", "glm", "llama"])
@pytest.mark.parametrize("arguments", ['{"cmd": "ls', "[1, 2]", '{"a": NaN}', "word"])
def test_arguments_that_are_no_object_are_rendered_as_they_stand(name: str, arguments: str):
    renderer = FAMILIES[name]
    text = renderer.render([], [user("a"), calls(call(arguments=arguments)), user("b")], None, None)
    assert arguments in text.replace('\\"', '"')


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("arguments", ["", None, "{}"])
def test_empty_arguments_are_none(name: str, arguments: str | None):
    renderer = FAMILIES[name]
    expected = renderer.root([user("a"), calls(call(arguments={})), user("b")], None)
    assert renderer.root([user("a"), calls(call(arguments=arguments)), user("b")], None) == expected


def test_a_key_without_a_value_is_no_key():
    llama = FAMILIES["llama"]
    bare = [user("a"), assistant("b"), user("c")]
    nulls = [user("a"), {**assistant("b"), "tool_calls": None, "refusal": None}, {**user("c"), "name": None}]
    assert llama.root(nulls, None) == llama.root(bare, None)


@pytest.mark.parametrize(("name", "role"), [("llama", "system"), ("llama", "developer"), ("glm", "system"), ("glm", "developer")])
def test_a_role_that_cannot_follow_is_a_bad_request_that_names_message_and_role(name: str, role: str):
    renderer, late = FAMILIES[name], {"role": role, "content": "x"}
    with pytest.raises(BadRequest, match=rf"messages\[-2\].*{role}.*user") as caught:
        renderer.append(assistant("a"), STOP, [user("b"), late, user("c")], None)
    assert caught.value.param == "messages[-2]"
    with pytest.raises(BadRequest, match=rf"messages\[1\].*{role}"):
        renderer.root([user("b"), late], None)


def test_a_message_that_the_template_refuses_is_named():
    llama = FAMILIES["llama"]
    two = calls(call(), call(number=2))
    with pytest.raises(BadRequest, match=r"messages\[2\].*one call") as caught:
        llama.root([user("a"), assistant("b"), two, user("c"), user("d")], None)
    assert caught.value.param == "messages[2]"
    with pytest.raises(BadRequest, match=r"messages\[-2\].*one call"):
        llama.append(assistant("b"), STOP, [user("a"), two, user("c")], None)


def test_what_no_template_can_render_is_a_bad_request():
    with pytest.raises(BadRequest, match=r"messages\[0\]\.content"):
        TEMPLATE.root([{"role": "user", "content": [{"type": "image_url"}]}], None)
    with pytest.raises(BadRequest, match="surrogate"):
        TEMPLATE.root([user("\ud800")], None)
    with pytest.raises(BadRequest, match="tools"):
        FAMILIES["chatml"].root([user("a")], [LOOK_UP])


def test_template_kwargs_reach_the_template():
    chatml = FAMILIES["chatml"]
    off = {"enable_thinking": False}
    assert chatml.text(chatml.root([user("a")], None, off)).endswith("<think>\n\n</think>\n\n")
    assert chatml.text(chatml.append(assistant("a"), STOP, [user("b")], None, off).ids).endswith("<think>\n\n</think>\n\n")
    assert [p.kwargs for p in chatml.traits.prompts] == [{}, off]


@pytest.mark.parametrize("own", ["add_generation_prompt", "messages", "tools"])
def test_template_kwargs_that_are_the_server_s_own_are_refused(own: str):
    with pytest.raises(BadRequest, match=f"chat_template_kwargs.{own}"):
        TEMPLATE.root([user("a")], None, {own: False})


def test_special_tokens_are_kept_where_they_are_asked_for():
    assert TEMPLATE.text([STOP]) == ""
    assert TEMPLATE.text([STOP], keep_special=True) == "<|im_end|>"


def test_characters_are_decoded_over_all_ids():
    ids = TEMPLATE.template.encode("👋🏽")
    assert len(ids) > 1
    assert TEMPLATE.text(ids) == "👋🏽"


def config_with(source: str, tmp_path: Path, **model: Any) -> Config:
    path = tmp_path / "template.jinja"
    path.write_text(source)
    return Config.model_validate({"model": {"chat_template": str(path), **model}})


def test_a_template_that_changes_what_it_wrote_is_refused_at_start_with_the_first_token_that_differs(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"token 1 .*<\|im_end\|>.*model\.chat_template .*model\.on_template_drift"):
        load_renderer(config_with(COUNTING, tmp_path))


@pytest.mark.parametrize(("choice", "splices"), [("splice", True), ("rerender", False)])
def test_a_template_that_changes_what_it_wrote_is_used_as_the_config_says(choice: str, splices: bool, tmp_path: Path):
    assert load_renderer(config_with(COUNTING, tmp_path, on_template_drift=choice)).splices is splices


def test_thinking_that_is_taken_out_of_the_history_is_no_reason_to_refuse(tmp_path: Path):
    forgetful = CHATML.replace("{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think>\n</think>{% endif %}{{ m.content }}")
    renderer = load_renderer(config_with(forgetful, tmp_path))
    assert renderer.splices
    assert {d.kind for d in check(renderer)} == {"assistant_text"}


@pytest.mark.parametrize("escape", ["messages[0].__class__.mro()", "messages.append(1)", "messages[0].update(a=1)", "''.__class__.mro()"])
def test_a_template_cannot_leave_its_sandbox_however_often_it_tries(escape: str):
    template = compile_template("{{ messages[0].role }}{{ " + escape + " }}")
    for _ in range(2):
        with pytest.raises(SecurityError):
            template.render(messages=[user("a")])


def test_a_key_that_is_not_there_is_undefined_and_a_method_of_the_object_comes_before_a_key():
    template = compile_template("{{ m.nothing is defined }} {{ m.items() | list }} {{ m.role }}")
    assert template.render(m={"role": "user"}) == "False [('role', 'user')] user"


def test_a_directory_without_a_tokenizer_is_a_config_error_that_names_the_key(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.path"):
        load(str(tmp_path))


def test_a_template_file_that_is_not_there_is_a_config_error_that_names_the_key(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model\.chat_template"):
        load(SMALL, str(tmp_path / "none.jinja"))
