"""What normalizers find, and that no text can make them slow."""

from __future__ import annotations

import re
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

import pytest
from conftest import assistant, user
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import Trial, tool

from rollout_ft.config import Config, load
from rollout_ft.errors import ConfigError, NormalizerFailed
from rollout_ft.runtime import check
from rollout_ft.session import normalizers
from rollout_ft.session.normalizers import MAX_CHARS, PATTERNS, normal

FOUND = {
    "timestamps": [
        "2026-01-31", "2026-01-31 10:20", "2026-01-31T10:20:30.123Z", "2026/01/31 10:20:30 UTC", "10:20:30", "10:20:30,123",
        "Sat Jan 31 10:20:30 2026", "Sat Jan 31 10:20:30 UTC 2026", "Jan  1 10:20:30", "Sat, 31 Jan 2026 10:20:30 GMT",
        "31/Jan/2026:10:20:30 +0000", "1769854830", "1769854830.25", "1769854830123", "1769854830123456789",
    ],
    "durations": ["0.03s", "12 ms", "5 seconds", "1m2.5s", "3 minutes"],
    "uuids": ["550e8400-e29b-41d4-a716-446655440000"],
    "temp_paths": ["/tmp/tmpab12cd34", "/private/var/folders/zz/ab_12/T/tmpx", "/tmp/pytest-of-me/pytest-7", "/var/tmp/x.txt"],
    "hex_ids": ["0x7f12ab34cd", "a1b2c3d", "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"],
}  # fmt: skip
LEFT = {
    "timestamps": ["10:20", "1.2.3", "42", "1234567890123456789012", "v10.20.30"],
    "durations": ["12 things", "3.14", "x12s", "8 apples"],
    "uuids": ["550e8400-e29b-41d4-a716-44665544000g"],
    "temp_paths": ["/home/tmp", "/tmp", "temp/x", "x/tmpfile"],
    "hex_ids": ["deadbeef", "1234567", "abc", "0x1f"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in FOUND.items() for text in texts])
def test_each_finds_what_it_is_named_after(name: str, text: str):
    normalize = normalizers.load((name,))
    assert normalize is not None
    assert normalize(f"now {text} in [{text}]") == f"now <{name}> in [<{name}>]"


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in LEFT.items() for text in texts])
def test_what_only_looks_like_it_stays(name: str, text: str):
    normalize = normalizers.load((name,))
    assert normalize is not None
    assert normalize(f"now {text} here") == f"now {text} here"


def test_a_file_in_a_temporary_directory_is_still_told_from_another():
    normalize = normalizers.load(("temp_paths",))
    assert normalize is not None
    assert normalize("/tmp/tmpab12cd34/a.txt") != normalize("/tmp/tmpab12cd34/b.txt")
    assert normalize("/srv/tmpab12cd34/a.txt") == normalize("/srv/tmpxyz98765/a.txt")


@pytest.mark.parametrize("name", PATTERNS)
def test_no_pattern_can_go_on_for_ever_from_one_place(name: str):
    def repeats(parsed: Any) -> list[int]:
        found: list[int] = []
        for _, argument in parsed:
            stack = [argument]
            while stack:
                each = stack.pop()
                if isinstance(each, parser.SubPattern):
                    found += repeats(each)
                elif isinstance(each, tuple | list):
                    if len(each) == 3 and isinstance(each[1], int) and isinstance(each[2], parser.SubPattern):
                        found.append(int(each[1]))
                    stack += each
        return found

    assert repeats(parser.parse("(?:a{0,3}){0,9}")) == [9, 3], "the walk sees what it should"
    assert repeats(parser.parse("a+"))[0] == int(parser.MAXREPEAT)
    assert max(repeats(parser.parse(PATTERNS[name])), default=0) <= 255
    re.compile(PATTERNS[name])


@settings(deadline=None)
@given(st.text(alphabet=" abz", max_size=30))
def test_a_text_without_a_digit_or_a_path_is_left_alone(text: str):
    normalize = normalizers.load(tuple(PATTERNS))
    assert normalize is not None
    assert normalize(text) == text


def test_only_tools_and_users_are_read_otherwise_and_the_messages_stay_as_they_are():
    parts = {"role": "user", "content": [{"type": "text", "text": "at 10:20:30"}]}
    messages = [user("at 10:20:30"), assistant("at 10:20:30"), tool("10:20:30"), parts, {"role": "system", "content": "10:20:30"}]
    made = normal(messages, normalizers.load(("timestamps",)))
    assert [m["content"] for m in made] == [
        "at <timestamps>", "at 10:20:30", "<timestamps>", [{"type": "text", "text": "at <timestamps>"}], "10:20:30",
    ]  # fmt: skip
    assert messages[0]["content"] == "at 10:20:30"


def test_more_text_than_the_limit_is_compared_as_it_stands():
    trial = Trial("branch", "timestamps")
    trial.ask(user("10:20:30" + "x" * MAX_CHARS))
    trial.restart()
    assert trial.ask(user("10:20:31" + "x" * MAX_CHARS))[0] == "generated"


def drop_digits(text: str) -> str:
    return re.sub(r"\d", "", text)


def forgets_to_return(text: str) -> None: ...


def test_a_function_of_ones_own_says_what_is_the_same():
    trial = Trial("branch", "test_normalizers:drop_digits")
    _, node = trial.ask(user("seat 12"))
    trial.restart()
    assert trial.ask(user("seat 7"))[1].turn == node.turn


def test_a_function_that_is_none_is_named():
    trial = Trial("branch", "test_normalizers:forgets_to_return")
    trial.ask(user("a"))
    trial.restart()
    with pytest.raises(NormalizerFailed, match="test_normalizers:forgets_to_return returned NoneType"):
        trial.ask(user("b"))


@pytest.mark.parametrize("name", ["timestamp", "no_such_module:f", "test_normalizers:FOUND"])
def test_a_normalizer_that_cannot_be_is_refused_before_anything_starts(name: str):
    with pytest.raises(ConfigError, match=r"session\.normalizers"):
        check(load(None, {"session.normalizers": [name]}))


def test_a_divergence_without_a_replay_is_refused():
    with pytest.raises(ConfigError, match=r"trial\.on_divergence"):
        load(None, {"trial.on_divergence": "serve", "trial.recovery": "restart"})
    assert Config().trial.on_divergence == "branch"
