"""What of an unfinished generation another engine can go on from."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_ft.engine.continuation import Start, cut_spans, join_spans, start_from
from rollout_ft.session.parse import sampled_text
from rollout_ft.testing.plain import PlainTemplate
from rollout_ft.types import VersionSpan

few = settings(max_examples=50, deadline=None)

STOPS = {99}
IDS = st.lists(st.integers(0, 99), max_size=12)


def start(ids: list[int], limit: int = 10, **sampling: Any) -> Start:
    return start_from(ids, sampling=sampling, stop_ids=STOPS, max_new_tokens=limit)


@pytest.mark.parametrize(
    ("ids", "sampling", "expected"),
    [
        ([], {}, Start(0)),
        ([1, 2, 3], {}, Start(3)),
        ([1, 2, 99], {}, Start(3, "stop")),
        ([1, 99, 3], {}, Start(3)),
        ([1, 2, 99], {"ignore_eos": True}, Start(3)),
        ([1] * 10, {}, Start(10, "length")),
        ([1] * 12, {}, Start(10, "length")),
        ([1] * 9 + [99], {}, Start(10, "stop")),
        ([1, 2, 3], {"json_schema": "{}"}, Start(0)),
        ([1, 2, 3], {"regex": "a"}, Start(0)),
        ([1, 2, 3], {"regex": None}, Start(3)),
        ([1, 2, 3], {"frequency_penalty": 0.5}, Start(0)),
        ([1, 2, 3], {"repetition_penalty": 1.1}, Start(0)),
        ([1, 2, 3], {"repetition_penalty": 1.0, "presence_penalty": 0}, Start(3)),
        ([1, 2, 3], {"ebnf": "root ::= 'a'"}, Start(0)),
        ([1, 2, 3], {"structural_tag": "{}"}, Start(0)),
        ([1, 2, 3], {"presence_penalty": -1}, Start(0)),
        ([1, 2, 3], {"presence_penalty": None}, Start(3)),
        ([1, 2, 3], {"min_new_tokens": 5}, Start(3)),
        ([1, 2, 3], {"stop_regex": "a+"}, Start(0)),
        ([1, 2, 3], {"max_thinking_tokens": 5}, Start(0)),
        ([1, 2, 3], {"custom_params": {"thinking_budget": 5}}, Start(0)),
        ([1, 2, 3], {"custom_logit_processor": "x"}, Start(0)),
        ([1, 2, 3], {"n": 2}, Start(0)),
        ([1, 2, 3], {"n": 1, "beam_width": None}, Start(3)),
        ([1, 2, 3], {"beam_width": 4}, Start(0)),
        ([1, 2, 3], {"logit_bias": {"1": 2.0}}, Start(3)),
        ([1, 2, 3], {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "sampling_seed": 3}, Start(3)),
        ([1, 2, 3], {"stop": ["ab"]}, Start(1)),
        ([1, 2, 3], {"stop": ["a", "\N{EURO SIGN}"]}, Start(0)),
        ([1, 2, 3], {"stop": ["abcdefgh"]}, Start(0)),
        ([1, 2, 99], {"stop": ["ab"], "json_schema": "{}"}, Start(3, "stop")),
    ],
)
def test_where_a_generation_goes_on(ids: list[int], sampling: dict[str, Any], expected: Start):
    assert start(ids, **sampling) == expected


@few
@given(IDS, st.integers(1, 12), st.sampled_from([{}, {"stop": ["abc"]}, {"regex": "a"}, {"ignore_eos": True}]))
def test_what_is_kept_is_a_prefix_within_the_limit(ids: list[int], limit: int, sampling: dict[str, Any]):
    kept = start(ids, limit, **sampling)
    assert 0 <= kept.keep <= min(len(ids), limit)


@few
@given(IDS, st.integers(1, 12))
def test_a_generation_that_is_not_finished_has_room_left(ids: list[int], limit: int):
    kept = start(ids, limit)
    assert kept.finish or kept.keep < limit


def partition(lengths: list[tuple[str, int]]) -> list[VersionSpan]:
    spans: list[VersionSpan] = []
    for version, length in lengths:
        at = spans[-1].end if spans else 0
        spans.append(VersionSpan(version, at, at + length))
    return spans


SPANS = st.lists(st.tuples(st.sampled_from(["v0", "v1", "v2"]), st.integers(1, 5)), max_size=5).map(partition)


def versions(spans: tuple[VersionSpan, ...] | list[VersionSpan]) -> list[str]:
    """The version of each token; fails for spans that do not partition their range."""
    found: list[str] = []
    for span in spans:
        assert span.start == len(found) < span.end
        found += [span.version] * (span.end - span.start)
    return found


@few
@given(SPANS, SPANS, st.integers(0, 10))
def test_joined_spans_partition_all_tokens_and_each_keeps_its_version(before: list[VersionSpan], after: list[VersionSpan], missing: int):
    offset, length = len(versions(before)), len(versions(after))
    end = offset + max(0, length - missing)
    assert versions(join_spans(before, after, offset, end)) == (versions(before) + versions(after))[:end]


@few
@given(SPANS, SPANS)
def test_neighbours_of_one_version_become_one_span(before: list[VersionSpan], after: list[VersionSpan]):
    merged = join_spans(join_spans((), before, 0, 100), after, len(versions(before)), 100)
    assert all(one.version != other.version for one, other in itertools.pairwise(merged))


@few
@given(SPANS, st.integers(0, 30))
def test_cut_spans_cover_what_is_kept(spans: list[VersionSpan], keep: int):
    assert versions(cut_spans(spans, keep)) == versions(spans)[:keep]


@few
@given(SPANS, SPANS, st.integers(0, 30))
def test_cutting_and_joining_again_leaves_no_hole(before: list[VersionSpan], after: list[VersionSpan], keep: int):
    kept = cut_spans(before, keep)
    offset = len(versions(kept))
    assert versions(join_spans(kept, after, offset, offset + len(versions(after)))) == versions(kept) + versions(after)


@pytest.mark.parametrize("cut", [1, 2])
def test_a_character_that_the_break_cut_is_whole_again_in_the_text_of_all_ids(cut: int):
    ids, renderer = [*b"5 \xe2\x82\xac"], PlainTemplate()
    apart = renderer.text(ids[: -3 + cut]) + renderer.text(ids[-3 + cut :])
    assert sampled_text(ids, renderer, stop=()) == "5 \N{EURO SIGN}" != apart
