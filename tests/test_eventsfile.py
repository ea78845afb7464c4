"""The file of a run's events: each once, bounded on disk, and accounted for when it is not kept any more."""

from __future__ import annotations

from pathlib import Path

import orjson
import pytest
from test_account import ended, event, numbered, opened

from rollout_ft.telemetry import lines
from rollout_ft.telemetry.account import ROTATED, account
from rollout_ft.telemetry.eventsfile import NAME, OLD, EventsFile, last_gateway_url, read_events
from rollout_ft.telemetry.lines import read_lines
from rollout_ft.types import JSON

MOST = 20_000


def life(trials: int) -> list[JSON]:
    return numbered([each for n in range(trials) for each in (opened(f"t{n}"), ended(f"t{n}", tokens_generated=n, tokens_wasted=1))])


def written(directory: Path, events: list[JSON]) -> EventsFile:
    made = EventsFile(directory, MOST)
    for each in events:
        made.append(each)
    made.close()
    return made


def served(url: str) -> JSON:
    return event("run.started", "run", gateway_url=url)


def test_where_a_run_was_served_last_is_found_from_the_end_and_none_of_the_rest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = EventsFile(tmp_path, 10 * MOST)
    for each in (served("http://a:1"), *life(5), served("http://b:2"), *life(100), event("x", text='of "run.started"')):
        made.append(each)
    made.close()
    with (tmp_path / NAME).open("a") as file:
        file.write('{"event":"run.started","gateway_url":"http://torn')
    parsed = list[bytes]()
    monkeypatch.setattr(lines, "_object", lambda line: parsed.append(line) or orjson.loads(line) if line.endswith(b"\n") else None)  # pyright: ignore
    assert last_gateway_url(tmp_path) == "http://b:2"
    assert len(parsed) == 1


@pytest.mark.parametrize("left", ["both", "old alone", "none"])
def test_where_a_run_was_served_is_known_when_that_event_is_not_kept_any_more(tmp_path: Path, left: str):
    written(tmp_path, [served("http://a:1"), *life(500)])
    assert not any(each["event"] == "run.started" for each in read_events(tmp_path))
    if left != "both":
        (tmp_path / NAME).write_bytes(b"")
    if left == "none":
        (tmp_path / OLD).unlink()
    assert last_gateway_url(tmp_path) == ("" if left == "none" else "http://a:1")


def test_an_event_that_is_told_again_is_written_once(tmp_path: Path):
    events = life(3)
    written(tmp_path, [*events, *events])
    written(tmp_path, events)
    assert list(read_events(tmp_path)) == events


def test_what_is_on_disk_is_bounded_and_the_account_is_of_all(tmp_path: Path):
    events = life(500)
    made = written(tmp_path, events)
    assert sum((tmp_path / name).stat().st_size for name in (NAME, OLD)) < 1.5 * MOST
    kept = list(read_events(tmp_path))
    assert len(kept) < len(events)
    assert kept[0]["event"] == ROTATED
    assert account(kept) == made.account == account(events)


def test_another_process_goes_on_with_the_account(tmp_path: Path):
    events = life(500)
    written(tmp_path, events[:700])
    assert written(tmp_path, events[700:]).account == account(events)


def test_a_process_that_is_killed_between_the_two_files_loses_nothing(tmp_path: Path):
    events = life(500)
    written(tmp_path, events)
    (tmp_path / NAME).replace(tmp_path / OLD)
    assert EventsFile(tmp_path, MOST).account == account(events)
    assert read_lines(tmp_path / NAME)[0]["event"] == ROTATED


def test_an_event_that_a_full_disk_refuses_is_written_when_it_is_told_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made, (first, second) = EventsFile(tmp_path, MOST), life(1)
    with monkeypatch.context() as full:
        full.setattr(made._lines, "append", _full)
        with pytest.raises(OSError, match="full"):
            made.append(first)
    for each in (first, second):
        made.append(each)
    assert list(read_events(tmp_path)) == [first, second]


def _full(line: JSON) -> int:
    raise OSError("the disk is full")


def test_a_torn_line_is_none(tmp_path: Path):
    written(tmp_path, life(1))
    with (tmp_path / NAME).open("ab") as file:
        file.write(b'{"event": "trial.ope')
    written(tmp_path, [event("run.started", "run", gateway_url="http://g")])
    assert [each["event"] for each in read_events(tmp_path)] == ["trial.opened", "trial.ended", "run.started"]
