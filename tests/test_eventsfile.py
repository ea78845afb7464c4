"""The file of a run's events: each once, bounded on disk, and accounted for when it is not kept any more."""

from __future__ import annotations

import asyncio
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import orjson
import pytest
from test_account import ended, event, numbered, opened

from rollout_ft.config import Config
from rollout_ft.fleet.member import Member
from rollout_ft.runtime import Run, _renew  # pyright: ignore[reportPrivateUsage]
from rollout_ft.telemetry import lines
from rollout_ft.telemetry.account import MISSED, ROTATED, account
from rollout_ft.telemetry.eventsfile import NAME, OLD, EventsFile, last_gateway_url, read_events
from rollout_ft.telemetry.feed import News
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


@pytest.mark.parametrize("room", [0, 20])
def test_an_event_that_a_full_disk_refuses_is_there_once_when_it_is_told_again(tmp_path: Path, room: int):
    """Also one without a number, and one of which the disk took a part."""
    first, second = life(1)
    del first["seq"]
    made = EventsFile(tmp_path, MOST)
    with full_disk(tmp_path / NAME, room):
        for _ in range(5):
            with pytest.raises(OSError, match="too large"):
                made.append(first)
    for each in (first, second):
        made.append(each)
    assert list(read_events(tmp_path)) == [first, second]
    assert (tmp_path / NAME).read_bytes().count(b"\n") == 2
    assert made.account == account([first, second])


@pytest.mark.parametrize("refused", [0, 1, 2, 10, 31])
def test_a_disk_that_is_full_when_the_file_is_full_costs_no_event_and_no_account(tmp_path: Path, refused: int):
    events, made = life(500), EventsFile(tmp_path, MOST)
    for number, each in enumerate(events):
        if number % 40 == refused:
            with full_disk(tmp_path / NAME, 0), suppress(OSError):
                made.append(each)
        made.append(each)
    assert made.account == account(events) == account(read_events(tmp_path))
    assert EventsFile(tmp_path, MOST).account == account(events)


@contextmanager
def full_disk(path: Path, room: int) -> Iterator[None]:
    """This process may write so many bytes more to the file, and none to an empty one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((path.stat().st_size if path.exists() else 0) + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("odd", ["half \ud83d of a pair", 2**70, {3: {"\udfff"}}, b"bytes"])
def test_an_event_that_is_no_json_is_written_with_its_text_replaced(tmp_path: Path, odd: object):
    first, second = life(1)
    written(tmp_path, [first | {"cause": odd}, second])
    told = list(read_events(tmp_path))
    assert [each | {"cause": ""} for each in told] == [first | {"cause": ""}, second | {"cause": ""}]
    assert told[0]["cause"]


def test_what_a_run_tells_is_for_its_user_alone(tmp_path: Path):
    written(tmp_path, life(500))
    assert [(tmp_path / name).stat().st_mode & 0o077 for name in (NAME, OLD)] == [0, 0]


async def test_what_has_no_number_is_told_once_though_another_event_is_refused():
    run, told, refusals = object.__new__(Run), list[str](), [True, False]

    async def ask(*_: object, **__: object) -> News:
        return News([{"event": "engine.up"}], "feed:1", 3)

    def take(event: JSON) -> None:
        if event["event"] == "engine.up" and refusals.pop(0):
            raise OSError(28, "full")
        told.append(event["event"])

    run.supervisor, run.on_event, run._cursor = cast(Member, SimpleNamespace(ask=ask)), take, ""
    with pytest.raises(OSError, match="full"):
        await run.renew(1)
    await run.renew(1)
    assert told == ["engine.up", MISSED]


async def test_events_that_cannot_be_taken_are_said_once_until_they_can(caplog: pytest.LogCaptureFixture):
    errors = [OSError(28, "full"), OSError(28, "full"), TypeError("odd"), OSError(28, "full"), None, OSError(28, "full")]
    done = asyncio.Event()

    async def renew(timeout_s: float) -> None:
        if not errors:
            done.set()
        elif error := errors.pop(0):
            raise error

    renewing = asyncio.create_task(_renew(cast(Run, SimpleNamespace(config=Config(orphan_s=0.01), renew=renew))))
    await done.wait()
    renewing.cancel()
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "run.not_renewed: OSError: [Errno 28] full", "run.not_renewed: TypeError: odd", "run.not_renewed: OSError: [Errno 28] full",
    ]  # fmt: skip


def test_a_torn_line_is_none(tmp_path: Path):
    written(tmp_path, life(1))
    with (tmp_path / NAME).open("ab") as file:
        file.write(b'{"event": "trial.ope')
    written(tmp_path, [event("run.started", "run", gateway_url="http://g")])
    assert [each["event"] for each in read_events(tmp_path)] == ["trial.opened", "trial.ended", "run.started"]
