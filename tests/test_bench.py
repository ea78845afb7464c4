"""What `rollout-ft bench` measures with, and one small run of it."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.cli.bench import telemetry
from rollout_ft.cli.bench.generator import generator
from rollout_ft.cli.bench.loads import Chat, Load, LoadFailed, Result
from rollout_ft.cli.bench.phases import joined, parts_of
from rollout_ft.cli.bench.profile import hottest
from rollout_ft.cli.bench.recovery import figures_of
from rollout_ft.cli.bench.telemetry import Compared
from rollout_ft.cli.bench.trial import Restart
from rollout_ft.cli.bench.trial import figures as figures_of_restarts
from rollout_ft.testing.siege import Blow, Siege
from rollout_ft.testing.small_engine import MODEL_DIR

pytestmark = pytest.mark.timeout(180)


@given(st.integers(1, 10_000))
def test_the_parts_of_a_load_are_all_its_turns_and_as_equal_as_they_can_be(turns: int):
    parts = parts_of(turns)
    assert sum(parts) == turns
    assert len(parts) == min(5, turns)
    assert max(parts) - min(parts) <= 1


def test_joined_steps_are_one_step():
    a = Result(1.0, 0.5, 10, [1.0], [2.0], 4.0, 100, 10)
    b = Result(2.0, 0.5, 30, [3.0, 5.0, 7.0], [4.0, 6.0, 8.0], 8.0, 200, 20)
    assert joined([a, b]) == Result(3.0, 1.0, 40, [1.0, 3.0, 5.0, 7.0], [2.0, 4.0, 6.0, 8.0], 7.0, 200, 20)


def test_the_figures_of_a_fault_are_of_all_its_runs_and_none_where_nothing_was_measured():
    sieges = [Siege(Blow.NODE_KILLED, 1, detect_s=1.0, next_token_s=[2.0, 4.0]), Siege(Blow.NODE_KILLED, 2, detect_s=None)]
    made = figures_of(sieges)
    assert (made["runs"], made["detect_s_p50"], made["next_token_s_p50"], made["next_token_s_p99"]) == (2, 1.0, 3.0, 3.98)
    assert figures_of(sieges[1:]) == {
        "runs": 1, "detect_s_p50": None, "detect_s_p99": None, "next_token_s_p50": None, "next_token_s_p99": None,
    }  # fmt: skip


def test_a_function_is_charged_once_a_stack_with_what_it_calls():
    stacks = ["run (a.py:1);walk (b.py:2);walk (b.py:9) 3", "run (a.py:1);read (c.py:4) 1"]
    found = {hot.function: (hot.own, hot.below) for hot in hottest("store", stacks)}
    assert found == {"run (a.py)": (0, 1), "walk (b.py)": (0.75, 0.75), "read (c.py)": (0.25, 0.25)}


def load(url: str) -> Load:
    return Load("through", [Chat(url, "key")], [url], str(MODEL_DIR), 20, 5)


@given(st.lists(st.tuples(st.floats(1, 10), st.floats(0.95, 1.2)), min_size=1, max_size=20))
def test_what_telemetry_adds_is_told_round_by_round_whatever_else_the_machine_does(rounds: list[tuple[float, float]]):
    noise, ratios = zip(*rounds, strict=True)
    made = telemetry.figures(Compared(64, {"off": list(noise), "all": [a * b for a, b in rounds]}))
    assert made["off"]["ratio"] == 1
    assert made["all"]["ratio"] == pytest.approx(statistics.median(ratios), abs=1e-3)
    assert min(ratios) - 1e-3 <= made["all"]["ratio_low"] <= made["all"]["ratio"] <= made["all"]["ratio_high"] <= max(ratios) + 1e-3


async def test_a_load_that_nobody_answers_fails_with_the_address():
    with pytest.raises(LoadFailed, match=r"http://127\.0\.0\.1:9/v1/chat/completions"):
        async with generator(load("http://127.0.0.1:9/v1")) as clients:
            await clients.take(turns=1)


async def test_the_load_ends_with_whoever_began_it_in_the_middle_of_a_turn():
    asked = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with generator(load(f"http://127.0.0.1:{port}/v1")) as clients:
            step = asyncio.create_task(clients.take(turns=1))
            await asked.wait()
            step.cancel()
        assert clients.process.returncode == 0


def test_bench_session_returns_its_figures(tmp_path: Path):
    command = [sys.executable, "-m", "rollout_ft.cli.main", "bench", "session", "--sessions", "2", "--turns", "5", "--tokens-in", "60"]
    command += ["--tokens-out", "20", "--wide", "0", "--long", "4000", "--paced", "0", "--profile", str(tmp_path), "--json"]
    figures = orjson.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    for key in ("turns_per_s", "cpu_ms_per_turn", "rss_mb_per_session", "added_ms_p50", "added_ms_p99", "direct_turns_per_s"):
        assert figures[key] != 0, key
    lengths = [part["prompt_tokens"] for part in figures["parts"]]
    assert all(75 <= b - a <= 90 for a, b in itertools.pairwise(lengths)), lengths
    assert figures["long"]["parts"][-1]["prompt_tokens"] > 3000
    assert {file.name.rpartition("-")[0] for file in tmp_path.iterdir()} <= {"gateway", "engine-actor", "store", "supervisor"}


def test_bench_overhead_compares_runs_with_and_without_telemetry():
    command = [sys.executable, "-m", "rollout_ft.cli.main", "bench", "overhead", "--sessions", "2", "--turns", "2", "--tokens-in", "60"]
    command += ["--tokens-out", "20", "--rounds", "2", "--json"]
    made = orjson.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["telemetry"]
    assert (made["rounds"], made["turns"]) == (2, 32)
    assert {"off", "metrics"} <= made.keys()
    assert min(made["off"]["cpu_ms_per_turn"], made["metrics"]["cpu_ms_per_turn"], made["metrics"]["ratio_low"]) > 0


def test_bench_store_returns_its_figures(tmp_path: Path):
    command = [sys.executable, "-m", "rollout_ft.cli.main", "bench", "store", "--seconds", "0.2", "--sessions", "1,4", "--resumed", "5"]
    command += ["--tokens", "4000", "--journal-dir", str(tmp_path), "--json"]
    figures = orjson.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    for key in ("commit_ms_p50", "commit_ms_p99", "commits_per_s", "bytes_kept_ratio", "resume_s"):
        assert figures[key] > 0, key
    assert len(figures["loads"]) == 2 * (4 + 2) * 2
    assert figures["resume"]["tokens"] == 3800
    assert 1 < figures["journal_bytes_ratio"] < 1.2
    assert list(tmp_path.iterdir()) == []


def test_the_figures_of_restarts_are_the_medians_of_their_runs():
    runs = [Restart(1.0, 0), Restart(9.0, 7), Restart(2.0, 0)]
    assert figures_of_restarts({"replay": runs}) == {"replay_s": 2.0, "replay_tokens": 0}


def test_bench_trial_returns_its_figures():
    command = [sys.executable, "-m", "rollout_ft.cli.main", "bench", "trial", "--turns", "2,4", "--runs", "1", "--tokens-in", "5"]
    command += ["--tokens-out", "8", "--tokens-per-s", "0", "--json"]
    figures = orjson.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    for turns in (2, 4):
        row = figures[f"{turns}"]
        assert (row["replay_tokens"], row["normalized_tokens"], row["scratch_tokens"]) == (0, 0, 8 * (turns - 1))
        assert min(row["replay_s"], row["normalized_s"], row["scratch_s"]) > 0
