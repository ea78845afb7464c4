"""Paths as rows for trainers, and as a parquet file that loads without this package."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow.parquet as parquet
import pytest
from conftest import ask as asked
from conftest import play, user
from test_past import END, Disk
from test_past import conversation as two_turns
from test_trajectory import conversation, tree

from rollout_ft.cli import main
from rollout_ft.errors import ConfigError
from rollout_ft.samples.export import read_trajectory, write_trajectory
from rollout_ft.samples.parquet import write_parquet
from rollout_ft.samples.rows import rows_of
from rollout_ft.samples.trajectory import trajectory
from rollout_ft.session.session import Session
from rollout_ft.trial.runner import TrialResult
from rollout_ft.types import Ended, Outcome, VersionSpan

AS_LONG_AS_THE_RESPONSE = ("loss_mask", "rollout_log_probs")


def test_a_row_has_the_invariants_of_a_trainers_sample(session: Session):
    tree(session)
    made = trajectory(session)
    rows = rows_of(made, 0.5, "completed")
    assert len(rows) == len(made["paths"]) > 1
    for row, path in zip(rows, made["paths"], strict=True):
        assert {len(row[name]) for name in AS_LONG_AS_THE_RESPONSE} == {len(row["response_ids"])}
        assert [*row["prompt_ids"], *row["response_ids"]] == path["token_ids"].tolist()
        assert row["turns"][0]["start"] == 0
        for mine, theirs in zip(row["turns"], path["turns"], strict=True):
            sampled = path["token_ids"][theirs["start"] : theirs["end"]]
            assert np.array_equal(row["response_ids"][mine["start"] : mine["end"]], sampled)
        assert (row["reward"], row["outcome"], row["attempts"]) == (0.5, "completed", 1)


def test_every_sampled_token_is_trained_in_one_row(session: Session):
    tree(session)
    made = trajectory(session)
    assert sum(int(row["loss_mask"].sum()) for row in rows_of(made, None, None)) == sum(int(p["loss_mask"].sum()) for p in made["paths"])


def test_versions_are_named_in_the_order_of_sampling_and_spans_count_from_the_response(session: Session):
    node = play(session, asked(user("a")), "hello")
    turn = replace(node.turn, version_spans=(VersionSpan("v1", 0, 2), VersionSpan("v2", 2, 4), VersionSpan("v1", 4, 6)))
    session.tree.nodes[turn.key] = replace(node, turn=turn)
    [row] = rows_of(trajectory(session), None, None)
    assert row["weight_versions"] == ["v1", "v2", "v1"]
    assert [(s["version"], s["start"], s["end"]) for s in row["version_spans"]] == [("v1", 0, 2), ("v2", 2, 4), ("v1", 4, 6)]


def test_a_parquet_file_holds_every_row_of_every_trial(tmp_path: Path, session: Session):
    tree(session)
    rows = rows_of(trajectory(session), None, "completed")
    assert write_parquet(tmp_path / "samples.parquet", [rows, [], rows[:1]]) == len(rows) + 1
    read: list[dict[str, Any]] = parquet.read_table(tmp_path / "samples.parquet").to_pylist()
    assert [p.name for p in tmp_path.iterdir()] == ["samples.parquet"]
    for row, there in zip([*rows, rows[0]], read, strict=True):
        for name in ("prompt_ids", "response_ids", *AS_LONG_AS_THE_RESPONSE):
            assert np.array_equal(np.array(there[name], row[name].dtype), row[name])
        assert [orjson.loads(turn["sampling"]) for turn in there["turns"]] == [turn["sampling"] for turn in row["turns"]]
        assert (there["reward"], there["outcome"], there["rollout_routed_experts"]) == (None, "completed", None)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_routed_experts_are_the_same_array_again(tmp_path: Path, session: Session, dtype: type[Any]):
    conversation(session, 2)
    made = trajectory(session)
    tokens = len(made["paths"][0]["token_ids"])
    made["paths"][0]["routed_experts"] = np.arange((tokens - 1) * 6).astype(dtype).reshape(tokens - 1, 3, 2)
    write_parquet(tmp_path / "samples.parquet", [rows_of(made, None, None)])
    [there] = parquet.read_table(tmp_path / "samples.parquet").to_pylist()
    read = np.frombuffer(there["rollout_routed_experts"], there["routed_experts_dtype"]).reshape(there["routed_experts_shape"])
    assert np.array_equal(read, made["paths"][0]["routed_experts"])


def test_a_trajectory_that_was_written_is_read_as_it_was(tmp_path: Path, session: Session):
    tree(session)
    made = trajectory(session)
    write_trajectory(tmp_path / "t.safetensors", made, 0.25)
    there = read_trajectory(tmp_path / "t.safetensors")
    assert there.pop("reward") == 0.25
    assert [row["response_ids"].tolist() for row in rows_of(there, None, None)] == [
        row["response_ids"].tolist() for row in rows_of(made, None, None)
    ]


def test_an_export_has_its_samples_beside_it(tmp_path: Path):
    disk = Disk(tmp_path, "a", "b")
    turns = two_turns()
    disk.trial("a", *turns, END)
    disk.trial("b", turns[0])
    past = disk.closed()
    done = past.export(tmp_path / "x", [], unfinished=True)
    assert past.samples(tmp_path / "x", done["exported"]) == {"samples": 2, "left_out": []}
    read = parquet.read_table(tmp_path / "x" / "samples.parquet").to_pylist()
    assert [(row["trial_id"], row["outcome"], len(row["turns"])) for row in read] == [("a", "completed", 2), ("b", None, 1)]


def test_trials_that_do_not_count_in_their_groups_are_no_samples(tmp_path: Path):
    """Of a dropped group none does; of one that shrank the lost one does not; of one that is not decided all do so far."""
    names, turn = [f"{group}{k}" for group in ("dropped", "shrunk", "open") for k in range(3)], two_turns()[0]
    lost = ("dropped0", "dropped1", "shrunk0", "open0")
    disk, written = Disk(tmp_path, *names), list[bytes]()
    (tmp_path / "tasks.jsonl").write_bytes(b"".join(orjson.dumps({"task_id": n, "group_id": n[:-1]}) + b"\n" for n in names))
    for name in names:
        end = Ended(Outcome.INFRA_EXHAUSTED, None, "", 107) if name in lost else END
        disk.trial(name, turn, *(() if name == "open2" else (end,)))
        written.append(orjson.dumps(TrialResult(name, name, end.outcome, end.reward, "", 1, 1, 0, 9, 0, 0, 1.0).line()) + b"\n")
    (tmp_path / "trials.jsonl").write_bytes(b"".join(written[:-1]))
    past = disk.closed()
    done = past.export(tmp_path / "x", [], unfinished=True)
    assert len(done["exported"]) == 9
    assert past.samples(tmp_path / "x", done["exported"]) == {"samples": 5, "left_out": ["dropped0", "dropped1", "dropped2", "shrunk0"]}
    read = parquet.read_table(tmp_path / "x" / "samples.parquet").to_pylist()
    assert {row["trial_id"] for row in read} == {"shrunk1", "shrunk2", "open0", "open1", "open2"}


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'rollout-ft\[parquet\]'"):
        write_parquet(tmp_path / "samples.parquet", [])
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path: Path, session: Session):
    """As on a disk that is full."""
    tree(session)
    rows = rows_of(trajectory(session), None, None)
    write_parquet(tmp_path / "samples.parquet", [rows])

    def until_it_is_full() -> Iterator[list[dict[str, Any]]]:
        yield rows
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        write_parquet(tmp_path / "samples.parquet", until_it_is_full())
    assert [p.name for p in tmp_path.iterdir()] == ["samples.parquet"]
    assert parquet.read_table(tmp_path / "samples.parquet").num_rows == len(rows)


def test_a_trial_that_is_named_twice_is_exported_once(tmp_path: Path):
    disk = Disk(tmp_path, "a")
    disk.trial("a", *two_turns(), END)
    past = disk.closed()
    assert past.export(tmp_path / "x", ["a", "a"], unfinished=False)["exported"] == ["a"]


def test_a_full_disk_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(main, "app", full)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert "No space left on device: make room, then run it again" in capsys.readouterr().err
