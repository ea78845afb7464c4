"""The trials of a run directory, read from journals that nobody serves any more."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from conftest import ask, assistant, make_session, play, user
from safetensors.numpy import load_file
from typer.testing import CliRunner

from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.journal import journal_path
from rollout_ft.checkpoint.log import Append, Entry
from rollout_ft.checkpoint.store import Store
from rollout_ft.checkpoint.view import View
from rollout_ft.cli.directory import create, with_journal
from rollout_ft.cli.main import app
from rollout_ft.cli.transcript import BEGAN_ANEW, PHANTOM
from rollout_ft.cli.trials import Past, lines, table
from rollout_ft.config import Config
from rollout_ft.errors import ConfigError
from rollout_ft.samples.trajectory import trajectory
from rollout_ft.session.entries import SessionEntry, encode_entry
from rollout_ft.types import Answered, Ended, Opened, Outcome, SessionSpec, Why

MEMBERS = ("run/store-0/1", "run/store-1/1")
HELLO, MORE = user("hello"), user("more")


def conversation() -> list[Any]:
    """Two turns, played."""
    session = make_session()
    first = play(session, ask(HELLO), "hi")
    second = play(session, ask(HELLO, assistant("hi"), MORE), "bye")
    return [first.turn, second.turn]


class Disk:
    """A run's directory with the journals of its two replicas."""

    def __init__(self, path: Path, *trials: str):
        self.path, self._lengths = path, dict[str, int]()
        config = Config()
        create(path, config, [{"task_id": name} for name in trials])
        self.view = View(1, MEMBERS, 1)
        self._dir = with_journal(config, path).store.journal_dir
        self.stores = [Store(name, self.view, self._dir) for name in MEMBERS]

    def write(self, trial_id: str, *entries: SessionEntry, replicas: tuple[int, ...] = (0, 1), attempt: int = 1) -> None:
        for entry in entries:
            seq = self._lengths[trial_id] = self._lengths.get(trial_id, -1) + 1
            kind, payload = encode_entry(entry)
            append = Append(trial_id, attempt, 1, seq, Entry(kind, f"{kind}/{seq}", payload))
            for replica in replicas:
                batch = wire.join([wire.encode_append(append)])
                asyncio.run(self.stores[replica].fence(self.view.number, trial_id, attempt, 1))
                done = asyncio.run(self.stores[replica].append_many(self.view.number, batch))
                assert wire.decode_results(done) == [None]

    def trial(self, trial_id: str, *entries: SessionEntry, **where: Any) -> None:
        self.write(trial_id, Opened(SessionSpec(trial_id, task_id=trial_id), 1, False, 100), *entries, **where)

    def closed(self) -> Past:
        for store in self.stores:
            store.close()
        return Past(self.path)

    def damage(self, replica: int, needle: bytes) -> None:
        """Flips a bit in the one record that holds `needle`."""
        for file in journal_path(self._dir, MEMBERS[replica]).glob("*.segment"):
            data = bytearray(file.read_bytes())
            at = data.find(needle)
            if at >= 0:
                data[at] ^= 1
                file.write_bytes(data)


def rows(past: Past) -> dict[str, Any]:
    return {row["trial_id"]: row for row in past.listed()["trials"]}


END = Ended(Outcome.COMPLETED, 0.5, "", 107)


def test_every_trial_is_listed_with_what_became_of_it(tmp_path: Path):
    disk, turns = Disk(tmp_path, "a", "b", "c"), conversation()
    disk.trial("a", *turns, END)
    disk.trial("b", turns[0])
    found = rows(disk.closed())
    assert [found[name]["state"] for name in "abc"] == ["ended", "unfinished", "not_started"]
    assert (found["a"]["outcome"], found["a"]["reward"], found["a"]["turns"], found["a"]["attempts"]) == ("completed", 0.5, 2, 1)


def test_on_a_list_an_id_is_whole_whatever_the_width_and_a_cause_is_cut_to_a_terminal():
    trial_id, cause = "django__django-11099-" + "x" * 80, "no\x1btoken for 90 s\nat engine-0 " * 40
    of = {"trial_id": trial_id, "state": "collected", "outcome": "truncated", "reward": None, "attempts": 2, "turns": 31}
    rows: list[dict[str, Any]] = [of | {"cause": cause}, of | {"trial_id": "b", "cause": ""}]
    for width in (None, 40, 80, 200):
        head, first, second = table(rows, width)
        assert first.split()[:5] == [trial_id, "collected", "truncated", "2", "31"]
        assert "\x1b" not in first
        assert (head.split()[-1], second.split()) == ("cause", ["b", "collected", "truncated", "2", "31"])
        assert head.index("cause") == first.index("no\\x1btoken")
    assert len(list(table(rows, 200))[1]) == 200
    assert "at engine-0" in list(table(rows, None))[1]


@pytest.mark.parametrize("columns", ["80", "40"])
def test_a_list_that_is_piped_is_not_cut(tmp_path: Path, columns: str):
    names = [f"django__django-{'1' * 60}-{n}" for n in range(3)]
    disk = Disk(tmp_path, *names)
    disk.closed()
    shown = CliRunner().invoke(app, ["trial", "list", str(tmp_path)], env={"COLUMNS": columns})
    assert [line.split()[0] for line in shown.output.splitlines()] == ["trial_id", *names]


def test_of_two_replicas_the_longer_log_is_the_trial(tmp_path: Path):
    disk, turns = Disk(tmp_path, "a"), conversation()
    disk.trial("a", turns[0])
    disk.write("a", turns[1], replicas=(1,))
    assert rows(disk.closed())["a"]["turns"] == 2


def test_a_replica_that_was_left_out_of_the_last_view_is_not_believed(tmp_path: Path):
    disk, turns = Disk(tmp_path, "a"), conversation()
    disk.trial("a", turns[0])
    disk.write("a", turns[1], replicas=(0,))
    later = View(2, MEMBERS[1:], 1)
    asyncio.run(disk.stores[1].install(later))
    assert rows(disk.closed())["a"]["turns"] == 1


def test_a_trial_that_one_replica_cannot_read_is_read_from_the_other(tmp_path: Path):
    disk, turns = Disk(tmp_path, "a"), conversation()
    disk.trial("a", *turns, END)
    past = disk.closed()
    disk.damage(0, turns[0].reply)
    past = Past(tmp_path)
    assert rows(past)["a"]["state"] == "ended"


def test_a_damaged_trial_is_shown_with_file_and_offset_and_does_not_stop_the_others(tmp_path: Path):
    disk, turns = Disk(tmp_path, "a", "b"), conversation()
    disk.trial("a", *turns, END)
    session = make_session()
    disk.trial("b", play(session, ask(user("another")), "one").turn, END)
    disk.closed()
    for replica in (0, 1):
        disk.damage(replica, turns[0].reply)
    past = Past(tmp_path)
    found = rows(past)
    assert (found["a"]["state"], found["b"]["state"]) == ("damaged", "ended")
    assert "journal" in found["a"]["cause"]
    assert "byte" in found["a"]["cause"]
    done = past.export(tmp_path / "x", [], unfinished=True)
    assert done["exported"] == ["b"]
    assert "byte" in done["skipped"]["a"]
    assert past.shown("a")["state"] == "damaged"


def test_an_export_is_what_the_run_writes(tmp_path: Path):
    disk, turns = Disk(tmp_path, "a", "b"), conversation()
    disk.trial("a", *turns, END)
    disk.trial("b", turns[0])
    past = disk.closed()
    assert past.export(tmp_path / "x", [], unfinished=False) == {"exported": ["a"], "skipped": {"b": "it has no outcome yet"}}
    written = load_file(tmp_path / "x" / "a.safetensors")
    session = make_session()
    session.restore([Opened(session.spec, 1, False, 1), *turns, END], [])
    [path] = trajectory(session)["paths"]
    assert all(np.array_equal(written[f"0.{name}"], path[name]) for name in ("token_ids", "loss_mask", "logprobs"))
    assert past.export(tmp_path / "x", ["b"], unfinished=True)["exported"] == ["b"]


def test_a_transcript_says_what_was_generated_replayed_and_continued(tmp_path: Path):
    disk, turns = Disk(tmp_path, "a"), conversation()
    disk.trial("a", turns[0])
    disk.write("a", Opened(SessionSpec("a"), 2, True, 101), Answered(turns[0].key, "r"), attempt=2)
    disk.write("a", replace(turns[1], tokens_reused=2, generations=2), END, attempt=2)
    shown = disk.closed().shown("a")
    assert [[turn["how"] for turn in each["turns"]] for each in shown["attempts_made"]] == [["generated"], ["replayed", "continued"]]
    words = "\n".join(lines(shown))
    assert "turn 1: replayed" in words
    assert "2 of them from before" in words
    assert "user: hello" in words
    assert "assistant: bye" in words


def test_a_transcript_says_where_a_turn_was_made_and_what_is_dropped(tmp_path: Path):
    disk, (first, second) = Disk(tmp_path, "a", "b"), conversation()
    made = replace(first, engine="engine-1", seconds=0.5)
    disk.trial("a", made, replace(second, unheard=True, acknowledged=()), END)
    disk.trial("b", made, attempt=1)
    began = Opened(SessionSpec("b"), 2, False, 101, why=Why("infra", "engine_lost"))
    disk.write("b", began, first, second, END, attempt=2)
    past = disk.closed()
    phantom, anew = past.shown("a"), past.shown("b")
    assert [turn["dropped"] for turn in phantom["attempts_made"][0]["turns"]] == ["", PHANTOM]
    assert [turn["dropped"] for each in anew["attempts_made"] for turn in each["turns"]] == [BEGAN_ANEW, "", ""]
    words = "\n".join(lines(phantom))
    assert f"{len(first.output_ids) // 4} tokens in 0.5 s at engine-1, weights v0, stop" in words
    assert f"dropped: {PHANTOM}" in words
    assert "from nothing, 1970-01-01 00:01:41 UTC, for infra: engine_lost" in "\n".join(lines(anew))
    assert any(moment["text"].endswith("begins from nothing: infra: engine_lost") for moment in anew["timeline"])
    assert [moment["kind"] for moment in anew["timeline"]] == ["opened", "turn", "restarted", "turn", "turn", "ended"]


def test_what_befell_a_trial_is_told_before_its_transcript(tmp_path: Path):
    disk = Disk(tmp_path, "a")
    disk.trial("a", *conversation(), END)
    told = [
        {"time": 100.5, "event": "trial.opened", "trial": "a", "engine": "engine-0"},
        {"time": 102.0, "event": "engine.dead", "engine": "engine-0", "reason": "exited: 1"},
    ]
    (tmp_path / "events.jsonl").write_bytes(b"".join(orjson.dumps(each) + b"\n" for each in told))
    shown = lines(disk.closed().shown("a"))
    assert shown[1].split() == ["+", "0.00", "s", "opened", "opened", "at", "engine-0"]
    assert "its engine engine-0 was lost: exited: 1" in shown[2] + shown[3]


def test_nothing_that_was_said_moves_the_cursor(tmp_path: Path):
    disk, (first, _) = Disk(tmp_path, "a"), conversation()
    disk.trial("a", replace(first, reply=orjson.dumps(assistant("\x1b]0;title\x07\x9b2J"))), END)
    words = "\n".join(lines(disk.closed().shown("a")))
    assert "assistant: \\x1b]0;title\\x07\\x9b2J" in words


def test_a_collected_trial_is_shown_from_what_the_run_wrote(tmp_path: Path):
    disk, turns = Disk(tmp_path, "a"), conversation()
    disk.trial("a", *turns, END)
    note = {"task_id": "a", "outcome": "completed", "reward": 0.5, "cause": "", "attempt": 1, "metadata": {"turns_committed": 2}}
    for store in disk.stores:
        asyncio.run(store.release("a", orjson.dumps(note)))
    past = disk.closed()
    assert rows(past)["a"] | {"state": "collected", "reward": 0.5, "turns": 2} == rows(past)["a"]
    assert past.export(tmp_path / "x", ["a"], unfinished=False)["skipped"].keys() == {"a"}


def test_of_a_collected_trial_it_is_told_where_its_replay_left_the_record(tmp_path: Path):
    differs = {"turn": 2, "recorded": "12:00", "sent": "12:01"}
    told = {"time": 103.0, "event": "trial.diverged", "trial": "a", "attempt": 2, **differs}
    disk, diverged = Disk(tmp_path, "a", "b"), "the replay left the record at turn 2: '12:00' was recorded, '12:01' came"
    for trial_id in "ab":
        disk.trial(trial_id, *conversation(), END)
    for store in disk.stores:
        asyncio.run(store.release("a", orjson.dumps({"task_id": "a", "outcome": "completed", "reward": 0.5, "cause": "", "attempt": 2})))
    (tmp_path / "events.jsonl").write_bytes(b"".join(orjson.dumps(told | {"trial": name}) + b"\n" for name in "ab"))
    past = disk.closed()
    assert diverged in "\n".join(lines(past.shown("a")))
    assert diverged not in "\n".join(lines(past.shown("b"))), "its transcript has it"


def test_a_trial_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="no trial zzz"):
        Disk(tmp_path, "a").closed().shown("zzz")


def test_what_is_printed_is_json(tmp_path: Path):
    disk = Disk(tmp_path, "a")
    disk.trial("a", *conversation(), END)
    past = disk.closed()
    assert json.loads(orjson.dumps(past.listed())) == past.listed()
    assert json.loads(orjson.dumps(past.shown("a"))) == past.shown("a")
