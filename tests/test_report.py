"""The page about a run: its figures are the run's, its marks are its events, it needs nothing else, and what a run wrote is text."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_page import Page, whole
from rich.console import Console
from run_history import BEGAN, a_run, event, result, written
from typer.testing import CliRunner

from rollout_ft.cli import report as command
from rollout_ft.cli.main import app
from rollout_ft.cli.report import read, write
from rollout_ft.cli.run import _report  # pyright: ignore[reportPrivateUsage]
from rollout_ft.config import Config
from rollout_ft.errors import ConfigError
from rollout_ft.telemetry.figures import WORST, worst
from rollout_ft.telemetry.history import FAULTS, Fault, History, Life, history
from rollout_ft.telemetry.plots.faultmarks import fault_marks
from rollout_ft.telemetry.plots.running import MAX_POINTS, running
from rollout_ft.telemetry.svg import MAX_TICKS, SIZE, Scale
from rollout_ft.trial.groups import LOST
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import Outcome

HOSTILE = """</script></style><img src=x onerror="alert('1')"> & "t{}" """


def page_of(*directories: Path) -> tuple[str, Page]:
    text = write(read(list(directories))).read_text()
    return text, Page(text)


def test_its_figures_are_those_of_trials_jsonl_and_summary_json_to_the_token(tmp_path: Path):
    directory = written(tmp_path / "run", *a_run(60))
    _, page = page_of(directory)
    lines = [json.loads(line) for line in (directory / "trials.jsonl").read_text().splitlines()]
    summary = json.loads((directory / "summary.json").read_text())
    shown = {name: whole(page.row("tokens", name)[1]) for name in ("generated", "wasted", "reused", "in trajectories")}
    for name in ("generated", "wasted", "reused"):
        assert shown[name] == summary[f"tokens_{name}"] == sum(line[f"tokens_{name}"] for line in lines)
    assert shown["in trajectories"] == shown["generated"] - shown["wasted"]
    listed = {row[0]: row for row in page.cells["trials"] if row}
    assert {t: (row[1], whole(row[6]), whole(row[8])) for t, row in listed.items()} == {
        line["trial_id"]: (line["outcome"], line["tokens_generated"], line["tokens_wasted"]) for line in lines
    }
    in_json = json.loads(CliRunner().invoke(app, ["report", str(directory), "--json"]).output)
    assert in_json["figures"][str(directory)]["totals"] == summary


def test_every_fault_of_the_events_is_marked_and_counted(tmp_path: Path):
    results, events = a_run(80, faults=12)
    _, page = page_of(written(tmp_path / "run", results, events))
    there = Counter(e["event"] for e in events if e["event"] in FAULTS)
    assert set(there) == {"engine.dead", "gateway.lost", "store.lost", "trial.restarted"}
    marks = page.marks["tokens"]
    assert {kind: marks[key] for kind, key in [("engine.dead", "f-engine"), ("gateway.lost", "f-gateway"), ("store.lost", "f-store"),
            ("trial.restarted", "f-restart")]} == there  # fmt: skip
    assert {name: whole(page.row("time", FAULTS[name])[1]) for name in there} == there
    recoveries = Counter(row[0] for row in page.cells["recovery"] if row)
    assert set(recoveries) == {"process", "stalled", "actor", "silent"}
    took = sum(e["event"] == "session.resumed" for e in events)
    assert sum(whole(row[1]) for row in page.cells["recovery"] if row) == took > 0


def test_it_needs_nothing_that_is_not_in_it(tmp_path: Path):
    one, two = written(tmp_path / "one", *a_run()), written(tmp_path / "two", *a_run(seed=2))
    for text, page in (page_of(one), page_of(one, two)):
        assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
        links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href", "srcset", "action", "data")]
        assert {link[0] for link in links} == {"#"}
        assert {link[1:] for link in links} <= page.ids
        assert not re.search(r"https?://|url\(|@import|javascript:| on\w+=", text)
        assert "default-src 'none'" in text


def test_what_a_run_wrote_is_text_on_the_page(tmp_path: Path):
    results, events = a_run(30, named=HOSTILE)
    results = [replace(r, cause=HOSTILE, outcome=HOSTILE if n == 3 else r.outcome) for n, r in enumerate(results)]
    events = [e | {"reason": HOSTILE} if e["event"] == "store.lost" else e for e in events]
    events += [e | {"cause": HOSTILE, "outcome": HOSTILE} for e in events if e["event"] == "trial.ended"]
    events.append(event(3, HOSTILE, trial=results[0].trial_id, reason=HOSTILE))
    _, clean = page_of(written(tmp_path / "clean", *a_run(30)))
    _, page = page_of(written(tmp_path / "run", results, events))
    assert page.tags == clean.tags
    assert {name for name, _ in page.attributes} == {name for name, _ in clean.attributes}
    assert HOSTILE.format(0) in page.text


def test_of_a_run_that_was_gone_on_with_it_says_what_is_known_to_be_wasted(tmp_path: Path):
    results, events = a_run(30)
    rotated = event(0, "events.rotated", account={"events": {"run.resumed": 1}})
    for name, more in (("resumed", event(9, "run.resumed", trials=3)), ("rotated", rotated)):
        _, page = page_of(written(tmp_path / name, results, [*events, more]))
        assert "known to be wasted (" in page.text
    assert "known to be wasted" not in page_of(written(tmp_path / "run", results, events))[1].text


def test_the_worst_trials_are_told_of_on_the_same_page(tmp_path: Path):
    directory = written(tmp_path / "run", *a_run(60))
    text, _ = page_of(directory)
    chosen = read([directory])[0].figures["worst"]
    assert len(chosen) == WORST
    for n, each in enumerate(chosen):
        assert f'<a href="#run-0-{n}">{each["trial_id"]}</a>' in text
        told = text[text.index(f'<article id="run-0-{n}">') :].split("</article>")[0]
        assert f"<h3>{each['trial_id']}" in told
        assert f"{each['outcome']}, reward" in told


@pytest.mark.timeout(240)
def test_of_fifty_thousand_trials_it_has_a_bounded_part_and_says_so(tmp_path: Path):
    results, events = a_run(50_000, faults=40, engines=32)
    text, page = page_of(written(tmp_path / "run", results, events))
    assert len(text) < 500_000
    assert "The 100 of 50,000 trials that took longest" in page.text
    assert "And 49,700 more, in trials.jsonl" in page.text
    assert whole(page.row("tokens", "generated")[1]) == sum(r.tokens_generated for r in results)
    assert sum(page.marks["tokens"].values()) == sum(e["event"] in FAULTS for e in events)


def test_it_says_what_to_do_about_what_befell_the_run(tmp_path: Path):
    directory = written(tmp_path / "run", *a_run(60))
    _, page = page_of(directory)
    lost = sum(r.lost for r in read([directory])[0].results)
    assert f"infra_exhausted {lost}Faults of the infrastructure used" in page.text
    assert "Read the engine's log for NCCL or CUDA" in page.text


def test_a_run_that_goes_on_or_met_nothing_has_a_page_too(tmp_path: Path):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "trials.jsonl").touch()
    assert "0 trials" in Page(write([command.reported(tmp_path / "begun")]).read_text()).text
    _, page = page_of(written(tmp_path / "clean", [result("a"), result("b")], []))
    assert "No event says when its trials ran" in page.text
    assert "worst" not in page.ids


def test_runs_are_beside_each_other_with_the_same_scales(tmp_path: Path):
    one, two = written(tmp_path / "one", *a_run()), written(tmp_path / "two", *a_run(80, seed=2))
    page = Page(write(read([one, two])).read_text())
    assert (one / "compared.html").exists()
    assert not (one / "report.html").exists()
    assert f"{two} beside {one}, the same trials" in page.text
    assert [whole(row[1]) for row in page.cells["tokens"] if row and row[0] == "generated"] == [
        sum(r.tokens_generated for r in a_run()[0]),
        sum(r.tokens_generated for r in a_run(80, seed=2)[0]),
    ]


def test_what_is_unfinished_is_what_the_tasks_say_whether_a_summary_is_there_or_not(tmp_path: Path):
    directory = written(tmp_path / "run", *a_run(32))
    tasks = [{"task_id": f"t{n}"} for n in range(48)]
    (directory / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    (directory / "config.json").write_text(Config().model_dump_json())
    for left in ('{"unfinished": 0, "seconds": 61.5}', '{"unfini', None):
        (directory / "summary.json").write_text(left) if left else (directory / "summary.json").unlink()
        _, page = page_of(directory)
        assert "16 unfinished" in page.text
        shown = CliRunner().invoke(app, ["report", str(directory)], env={"COLUMNS": "200"})
        said = " ".join(shown.output.split())
        assert "32 trials, " in said
        assert "16 unfinished" in said


@pytest.mark.parametrize("outcome", sorted({*Outcome} - {Outcome.COMPLETED, Outcome.CANCELLED}))
def test_a_run_whose_trials_failed_does_not_read_as_one_in_which_all_is_well(tmp_path: Path, outcome: str):
    results = [replace(result(f"t{n}"), outcome=outcome, reward=None, cause="a bad key") for n in range(24)]
    directory = written(tmp_path / "run", results, [])
    text, page = page_of(directory)
    assert f"{outcome} 24" in page.text
    assert "The last: t23: a bad key" in page.text
    assert 'class="good"' not in text
    shown = CliRunner().invoke(app, ["report", str(directory)], env={"COLUMNS": "200"})
    said = " ".join(shown.output.split())
    assert ("24 trials, 24 lost" in said) == (outcome in LOST)
    assert (f"24 trials, 0 lost, 24 {outcome}" in said) == (outcome not in LOST)


def test_a_run_in_which_all_is_well_says_so(tmp_path: Path):
    text, _ = page_of(written(tmp_path / "run", *a_run(faults=0)))
    assert '<b class="good">0 lost</b>. ' in text


def test_the_command_writes_the_page_where_it_is_told_and_json_alone_writes_none(tmp_path: Path):
    directory = written(tmp_path / "run", *a_run())
    shown = CliRunner().invoke(app, ["report", str(directory), "--json"])
    assert shown.exit_code == 0
    assert not (directory / "report.html").exists()
    shown = CliRunner().invoke(app, ["report", str(directory)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "recoveries, to the next token" in shown.output
    assert (directory / "report.html").exists()
    CliRunner().invoke(app, ["report", str(directory), "--output", str(tmp_path / "page.html"), "--json"])
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_a_run_does_not_fail_for_want_of_its_page(tmp_path: Path):
    (tmp_path / "trials.jsonl").write_text('{"odd": 1}\n')
    with pytest.raises(ConfigError, match="none of a run's"):
        command.reported(tmp_path)
    console = Console(record=True, width=500)
    _report(tmp_path, console)
    assert f"rollout-ft report {tmp_path} does it" in console.export_text()


# -- what is decided ---------------------------------------------------------------------------------------------------

TRIALS = st.lists(
    st.builds(
        lambda attempts, wasted, outcome: (attempts, wasted, outcome),
        st.integers(1, 4), st.integers(0, 50), st.sampled_from(["completed", "infra_exhausted", "truncated"]),
    ),
    max_size=40,
)  # fmt: skip


def some(rows: list[tuple[int, int, str]]) -> list[TrialResult]:
    return [replace(result(f"t{n}"), attempts=a, tokens_wasted=w, outcome=o) for n, (a, w, o) in enumerate(rows)]


@settings(deadline=None)
@given(TRIALS, st.dictionaries(st.sampled_from([f"t{n}" for n in range(40)]), st.floats(0.1, 99)))
def test_the_worst_are_those_that_something_befell_and_the_first_of_every_kind(rows: list[tuple[int, int, str]], stalled: dict[str, float]):
    results = some(rows)
    bad = [r for r in results if r.lost or r.attempts > 1 or r.tokens_wasted or stalled.get(r.trial_id)]
    found = worst(results, stalled)
    ids = [r.trial_id for r, _ in found]
    assert len(ids) == len(set(ids)) == min(WORST, len(bad))
    assert set(ids) <= {r.trial_id for r in bad}
    assert all(why for _, why in found)
    assert [r.lost for r, _ in found] == sorted((r.lost for r, _ in found), reverse=True)
    if bad:
        assert max(r.tokens_wasted for r in bad) == max(r.tokens_wasted for r, _ in found)
        assert max(r.attempts for r in bad) == max(r.attempts for r, _ in found)
        assert max(stalled.get(r.trial_id, 0) for r in bad) == max(stalled.get(r.trial_id, 0) for r, _ in found)


@settings(deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.floats(-2e6, 2e6))
def test_what_is_drawn_is_on_the_plot_and_its_ticks_are_few(low: float, length: float, value: float):
    scale = Scale(low, low + length)
    ticks = scale.ticks()
    assert 0 <= scale.at(value) <= SIZE
    assert len(ticks) <= MAX_TICKS
    assert all(low - length * 1e-6 <= tick <= low + length * (1 + 1e-6) for tick in ticks)
    assert Scale(low, low).at(value) == 0


@settings(deadline=None)
@given(st.integers(0, 400), st.integers())
def test_no_fault_is_left_out_however_near_they_are(count: int, seed: int):
    rng = random.Random(seed)
    met = [(rng.choice(list(FAULTS)), rng.uniform(0, 100)) for _ in range(count)]
    seen = History(faults=[Fault(BEGAN + after, kind, "who", "why") for kind, after in met], began=BEGAN, ended=BEGAN + 100)
    marks = fault_marks(seen, Scale(0, 100))
    assert sum(int(n) for mark in marks for n in re.findall(r'data-count="(\d+)"', mark)) == len(met)
    assert len(marks) <= 201 * len(FAULTS)


@settings(deadline=None)
@given(st.integers(0, 600), st.integers())
def test_how_many_trials_run_is_never_less_than_it_was(count: int, seed: int):
    rng = random.Random(seed)
    spans = [(rng.uniform(0, 50), rng.uniform(0.001, 50)) for _ in range(count)]
    lives = {f"t{n}": Life(BEGAN + a, BEGAN + a + long) for n, (a, long) in enumerate(spans)}
    found = running(History(lives=lives, began=BEGAN, ended=BEGAN + 100), 100)
    assert len(found) <= MAX_POINTS + 2
    changes = sorted([(BEGAN + a, 1) for a, _ in spans] + [(BEGAN + a + long, -1) for a, long in spans])
    assert max(n for _, n in found) == max(accumulate((change for _, change in changes), initial=0))
    assert [t for t, _ in found] == sorted(t for t, _ in found)


def test_why_a_session_had_to_move_is_what_its_event_says_whatever_the_clocks():
    moves = [
        event(1, "engine.dead", engine="engine-0", incarnation=1, reason="stalled: no token"),
        event(2, "session.moved", session="a~1", engine="engine-1", epoch=2, source_engine="engine-0"),
        event(0.5, "session.resumed", session="a~1", engine="engine-1", epoch=2, seconds=0.5, reason="stalled"),
        event(4, "engine.draining", engine="engine-1", reason="drained"),
        event(5, "session.moved", session="a~1", engine="engine-2", epoch=3, source_engine="engine-1"),
        event(6, "session.resumed", session="a~1", engine="engine-2", epoch=3, seconds=0.25, reason="moved"),
        event(7, "session.moved", session="a~1", engine="engine-1", epoch=4, source_engine=""),
        event(8, "session.resumed", session="a~1", engine="engine-1", epoch=4, seconds=0.75, reason="moved"),
    ]
    seen = history(reversed(moves))  # as actors told of them
    assert [(r.reason, r.seconds) for r in seen.recoveries] == [("stalled", 0.5), ("moved", 0.25), ("moved", 0.75)]
    assert seen.stalled_s == {"a": 0.75}


def test_what_is_told_twice_counts_once_and_what_is_not_kept_is_said(tmp_path: Path):
    dead = event(1, "engine.dead", engine="engine-0", reason="exited: 1", seq=7)
    ended = event(
        2, "trial.ended", trial="a", outcome="completed", reward=1.0, cause="", tokens_wasted_by={"phantom": 5, "dropped": 2}, seq=8
    )
    rotated = event(0, "events.rotated", account={})
    results = [replace(result("a"), tokens_wasted=7)]
    _, page = page_of(written(tmp_path / "run", results, [rotated, dead, ended, dead, ended]))
    assert page.marks["tokens"]["f-engine"] == 1
    assert page.row("tokens", "wasted: phantom")[1:] == ["5", "5.00%"]
    assert "Older events are not kept" in page.text


# -- how it looks ------------------------------------------------------------------------------------------------------


def colours() -> list[dict[str, str]]:
    """Of the light and of the dark page."""
    blocks = re.findall(r":root \{(.*?)\}", files("rollout_ft.telemetry").joinpath("report.css").read_text(), re.DOTALL)
    light, dark = ({name: _six(value) for name, value in re.findall(r"--(\w+): (#\w+)", block)} for block in blocks)
    return [light, light | dark]


def _six(colour: str) -> str:
    return colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", [0, 1], ids=["light", "dark"])
def test_words_and_marks_have_enough_contrast(page: int):
    found = colours()[page]
    words: list[tuple[str, str, float]] = [
        (name, ground, 4.5) for name in ("ink", "quiet", "link", "good", "bad") for ground in ("paper", "soft")
    ]
    marks = [(name, "paper", 3.0) for name in ("blue", "teal", "amber", "violet", "red", "grey", "orange")]
    assert [(a, b, round(contrast(found[a], found[b]), 2)) for a, b, least in words + marks if contrast(found[a], found[b]) < least] == []


def test_a_keyboard_reaches_what_scrolls(tmp_path: Path):
    text, _ = page_of(written(tmp_path / "run", *a_run()))
    scrolling: list[Any] = re.findall(r'<div class="scroll"[^>]*>', text)
    assert scrolling
    assert all('tabindex="0"' in tag and 'role="group"' in tag and "aria-label" in tag for tag in scrolling)
