"""How an engine is started, and what is said of its end: decisions alone, and the small engine where a process is needed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_ft.config import Config, load
from rollout_ft.engine import arguments, crash, installed, launched, logs, ports
from rollout_ft.engine.launch import Rank, command, environment
from rollout_ft.engine.launched import Launched
from rollout_ft.engine.memory import OomKills, oom_kills
from rollout_ft.engine.process import Exit
from rollout_ft.engine.sglang import SGLang
from rollout_ft.errors import ConfigError, EngineLost

LOGS = Path(__file__).parent / "crash_logs"
PORTS = ports.Ports(20_000)


def sglang(tmp_path: Path, **engine: Any) -> Config:
    (tmp_path / "tokenizer.json").write_text("{}")
    return Config.model_validate({"model": {"path": str(tmp_path)}, "engine": {"kind": "sglang", **engine}})


def value_of(words: list[str], name: str) -> str:
    """What argparse would take: the last one."""
    return words[len(words) - words[::-1].index(name)]


# -- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(arguments.OWNED))
def test_an_argument_that_another_key_says_is_refused_with_that_key(name: str):
    with pytest.raises(ConfigError, match=rf"engine.args: {name} .*{arguments.OWNED[name]}"):
        load(overrides={"engine.kind": "sglang", "model.path": "/m", "engine.args": [name, "1"]})


@pytest.mark.parametrize("name", sorted(arguments.REFUSED))
def test_an_argument_that_cannot_work_is_refused_with_the_reason(name: str):
    with pytest.raises(ConfigError) as e:
        load(overrides={"engine.kind": "sglang", "model.path": "/m", "engine.args": ["--tp-size", "1", f"{name}=1"]})
    assert f"engine.args: {name} cannot be used: {arguments.REFUSED[name]}" in str(e.value)


@pytest.mark.parametrize(
    ("args", "num_gpus", "nodes"),
    [
        ([], 0, 1), ([], 1, 1), ([], 0.25, 1), (["--tp", "8"], 8, 1), (["--tp-size", "4", "--pp-size=2"], 8, 1),
        (["--dp-size", "2", "--tp", "2"], 4, 1), (["--tp", "8", "--attn-dp-size", "8"], 8, 1), (["--tp", "16"], 8, 2),
        (["--tp", "8", "--dp", "4", "--enable-dp-attention"], 8, 1), (["--tp", "2"], 0, 1), (["--tp", "2"], 0, 2),
    ],
)  # fmt: skip
def test_parallel_sizes_that_take_the_gpus_that_ray_assigns_are_accepted(args: list[str], num_gpus: float, nodes: int):
    arguments.check(args, num_gpus=num_gpus, nodes=nodes)


@pytest.mark.parametrize(
    ("args", "num_gpus", "nodes", "said"),
    [
        (["--tp", "8"], 1, 1, "set engine.num_gpus to 8"),
        ([], 2, 1, "set engine.num_gpus to 1"),
        (["--tp", "2"], 0.5, 1, "set engine.num_gpus to 2"),
        (["--dp-size", "2"], 1, 1, "set engine.num_gpus to 2"),
        (["--tp", "16"], 16, 2, "set engine.num_gpus to 8"),
        (["--tp", "3"], 0, 2, "set --tp-size to a multiple"),
        (["--tp", "2", "--dp", "2"], 0, 2, "one replica"),
        (["--tp", "two"], 0, 1, "--tp needs a number"),
        (["--tp"], 0, 1, "--tp needs a number"),
        (["--tp-size=0"], 0, 1, "--tp-size needs a number"),
        (["--base-gpu-id", "1"], 1, 1, "--base-gpu-id cannot be used with engine.num_gpus"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_remedy(args: list[str], num_gpus: float, nodes: int, said: str):
    with pytest.raises(ValueError, match="engine.*" + said):
        arguments.check(args, num_gpus=num_gpus, nodes=nodes)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"num_gpus": 1.5}, "engine.num_gpus: 1.5"),
        ({"num_gpus": 0.5, "nodes": 2}, "engine.nodes"),
        ({"num_gpus": 1, "env": {"CUDA_VISIBLE_DEVICES": "3"}}, "engine.env: CUDA_VISIBLE_DEVICES"),
    ],
)
def test_gpus_that_ray_cannot_assign_are_refused(engine: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        Config.model_validate({"engine": engine})


def test_what_the_user_says_wins_over_what_we_suggest_and_not_over_what_is_ours(tmp_path: Path):
    config = sglang(tmp_path, args=["--max-queued-requests", "7", "--watchdog-timeout=9"], env={"SGLANG_REQ_RUNNING_TIMEOUT": "5"})
    words = command(config, "e0", PORTS)
    assert value_of(words, "--max-queued-requests") == "7"
    assert words.index("--watchdog-timeout") < words.index("--watchdog-timeout=9")
    assert value_of(words, "--port") == "20000"
    env = environment(config)
    assert env["SGLANG_REQ_RUNNING_TIMEOUT"] == "5"
    assert float(env["SGLANG_REQ_WAITING_TIMEOUT"]) > config.engine.first_token_timeout_s
    assert env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "false"


def test_the_leases_of_the_engine_are_longer_than_our_own_limits(tmp_path: Path):
    config = sglang(tmp_path)
    assert float(environment(config)["SGLANG_REQ_RUNNING_TIMEOUT"]) > config.trial.attempt_timeout_s


def test_the_weights_of_the_model_are_called_as_the_config_says(tmp_path: Path):
    config = sglang(tmp_path)
    assert "--weight-version" not in command(config, "e0", PORTS)
    named = config.model_copy(update={"model": config.model.model_copy(update={"weight_version": "v7"})})
    assert value_of(command(named, "e0", PORTS), "--weight-version") == "v7"


def test_every_process_of_an_engine_meets_at_ports_that_are_claimed(tmp_path: Path):
    one = command(sglang(tmp_path), "e0", PORTS)
    assert value_of(one, "--nccl-port") == "20001"
    assert "--dist-init-addr" not in one
    attention = command(sglang(tmp_path, args=["--tp", "2", "--attn-dp-size", "2"]), "e0", PORTS)
    assert value_of(attention, "--dist-init-addr") == f"127.0.0.1:{PORTS.rendezvous}"
    copies = command(sglang(tmp_path, args=["--dp-size", "2"]), "e0", PORTS)
    assert "--nccl-port" not in copies, "each copy has its own"
    ranks = command(sglang(tmp_path, nodes=2, args=["--tp", "2"]), "e0", PORTS, Rank(1, "10.0.0.1:20004"))
    assert [value_of(ranks, n) for n in ("--nnodes", "--node-rank", "--dist-init-addr")] == ["2", "1", "10.0.0.1:20004"]


@pytest.mark.parametrize("visible", ["0,3", None])
def test_the_engine_sees_the_gpus_that_ray_set_or_that_it_left_to_us(monkeypatch: pytest.MonkeyPatch, visible: str | None):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment(load(), ("4", "5"))["CUDA_VISIBLE_DEVICES"] == (visible or "4,5")


def test_no_secret_of_ours_is_in_the_engines_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("RAY_AUTH_TOKEN", "MY_SECRET", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "x")
    assert not {"RAY_AUTH_TOKEN", "MY_SECRET", "OPENAI_API_KEY"} & set(environment(load()))


# -- what is installed --------------------------------------------------------------------------------------------


def answer(version: str = "0.5.23", **more: Any) -> dict[str, Any]:
    return {"version": version, "given": ["--tp-size", "--tensor-parallel-size", "--log-level"], **more}


@pytest.mark.parametrize("version", ["0.5.20", "0.5.23", "0.5.20.post1", "0.6.0rc1", "1.0", "0.0.0.dev0", "of no version"])
def test_a_version_that_is_new_enough_or_has_no_number_is_used(version: str):
    installed.judge(answer(version), [])


@pytest.mark.parametrize("version", ["0.5.19", "0.5.19.post2", "0.4.9", "0.5"])
def test_an_older_version_is_refused_with_the_reason(version: str):
    with pytest.raises(ConfigError, match=rf"SGLang {version} is installed, 0.5.20 is needed: .*abandoned requests"):
        installed.judge(answer(version), [])


def test_what_is_wrong_is_said_with_the_version_that_says_so():
    with pytest.raises(ConfigError, match=r"engine.args: SGLang 0.5.23: --x is not known; did you mean --y"):
        installed.judge({"version": "0.5.23", "wrong": "--x is not known; did you mean --y?"}, [])


def test_an_abbreviation_is_refused_but_for_those_that_everybody_writes():
    installed.judge(answer(), ["--tp", "2", "--log-level=info"])
    with pytest.raises(ConfigError, match="write --log-l in full: --log-level"):
        installed.judge(answer(), ["--log-l", "info"])


def test_the_interpreter_is_found_in_every_command_that_starts_a_python_of_this_machine(tmp_path: Path):
    script = tmp_path / "sglang"
    script.write_text("#!/opt/v/bin/python3.11\nimport sglang\n")
    script.chmod(0o755)
    env = {"PATH": str(tmp_path)}
    found = {
        ("/v/bin/python", "-m", "sglang.launch_server"): ["/v/bin/python"],
        ("python3.12", "x.py"): ["python3.12"],
        ("sglang", "serve"): ["/opt/v/bin/python3.11"],
        (str(script),): ["/opt/v/bin/python3.11"],
        ("numactl", "-N", "0", "/v/bin/python3", "-m", "m"): ["numactl", "-N", "0", "/v/bin/python3"],
        ("env", "A=b", "python", "x.py"): ["env", "A=b", "python"],
        ("docker", "run", "image", "python3", "-m", "m"): [],
        ("numactl", "-N", "0", "sglang"): [],
        ("no-such-program",): [],
    }
    assert {words: installed.interpreter(words, env) for words in found} == found


def test_a_shell_script_names_no_python(tmp_path: Path):
    script = tmp_path / "start"
    script.write_text("#!/bin/sh\nexec python -m sglang.launch_server $@\n")
    script.chmod(0o755)
    assert installed.interpreter([str(script)], {}) == []


async def test_a_command_that_nobody_can_be_asked_about_is_said_to_be_unchecked(tmp_path: Path):
    config = sglang(tmp_path, command=["docker", "run", "image"], args=["--whatever"])
    assert "docker is no Python of this machine" in await installed.check(config, here=True)


async def test_a_python_without_sglang_is_an_error_only_where_it_would_be_started(tmp_path: Path):
    if "sglang" in sys.modules:
        pytest.skip("SGLang is in this environment")
    config = sglang(tmp_path)
    assert "sglang is not installed" in await installed.check(config, here=False)
    with pytest.raises(ConfigError, match=r"sglang is not installed.*set engine\.command"):
        await installed.check(config, here=True)
    assert "sglang is not installed" in await installed.check(sglang(tmp_path, command=[sys.executable]), here=True)


# -- ports --------------------------------------------------------------------------------------------------------


def test_two_engines_never_claim_the_same_ports_and_what_is_closed_is_free_again():
    claimed = [ports.claim(random.Random(1)) for _ in range(20)]
    try:
        assert len({each.server for each in claimed}) == 20
    finally:
        for each in claimed:
            each.close()
    again = ports.claim(random.Random(1))
    assert again.server == claimed[0].server
    again.close()


def test_a_claim_ends_with_the_process_that_has_it():
    code = (
        "import random, sys; from rollout_ft.engine.ports import claim; c = claim(random.Random(5)); print(c.server, flush=True);"
        "sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    theirs = int(process.stdout.readline())
    ours = ports.claim(random.Random(5))
    assert ours.server != theirs
    ours.close()
    process.kill()
    process.communicate()
    after = ports.claim(random.Random(5))
    assert after.server == theirs
    after.close()


def test_ports_that_a_stranger_listens_on_are_left_alone():
    first = ports.claim(random.Random(3))
    first.close()
    with socket.create_server(("127.0.0.1", first.rendezvous)):
        other = ports.claim(random.Random(3))
        other.close()
    assert other.server != first.server


@given(st.sampled_from(ports.FIRSTS))
def test_all_ports_of_an_engine_are_below_those_that_the_kernel_hands_out(first: int):
    assert 20_000 <= first < first + ports.WIDTH <= 32_768
    assert not any(other < first < other + ports.WIDTH for other in ports.FIRSTS)
    meeting = ports.Ports(first).rendezvous
    assert first < meeting < first + ports.WIDTH - 20, "SGLang derives its own from where its processes meet"


# -- logs ---------------------------------------------------------------------------------------------------------


def write(directory: Path, sizes: dict[int, int], name: str = "rollout_ft-r-engine-0") -> Path:
    for number, size in sizes.items():
        (directory / f"{name}-{number}.log").write_bytes(b"x" * (size - 1) + b"\n")
    return directory / f"{name}-{max(sizes)}.log"


def test_the_logs_of_the_earliest_starts_go_first(tmp_path: Path):
    other = write(tmp_path, {1: 900}, "rollout_ft-r-engine-00")
    log = write(tmp_path, {8: 300, 9: 300, 10: 300, 11: 300})
    logs.trim(log, 1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([other.name, *(f"rollout_ft-r-engine-0-{n}.log" for n in (9, 10, 11))])


def test_a_long_log_loses_its_beginning_and_its_writer_goes_on(tmp_path: Path):
    log = tmp_path / "rollout_ft-r-engine-0-1.log"
    with log.open("ab", buffering=0) as f:
        for i in range(1000):
            f.write(b"line %d\n" % i)
        logs.trim(log, 2000)
        f.write(b"after\n")
    lines = log.read_text().splitlines()
    assert lines[-2:] == ["line 999", "after"]
    assert log.stat().st_size <= 1010
    assert lines[0].startswith("line ")


def test_of_a_log_only_what_this_start_wrote_is_read(tmp_path: Path):
    log = tmp_path / "a-1.log"
    log.write_text("address already in use\n")
    since = logs.size(log)
    with log.open("a") as f:
        f.write("something else\n")
    assert logs.tail(log, since) == "something else\n"
    assert logs.tail(tmp_path / "none") == ""


# -- why it ended -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log", "code", "said"),
    [
        ("out_of_vocabulary", -9, "killed by SIGKILL: IndexError: index out of range in self"),
        ("scheduler_killed", -9, "killed by SIGKILL (its scheduler_0 killed by SIGKILL): Subprocess scheduler_0 (pid=21531) crashed"),
        ("bad_model_path", 1, "exited: 1: huggingface_hub.errors.HFValidationError: Repo id must be"),
        ("unknown_argument", 2, "exited: 2: sglang serve: error: unrecognized arguments: --no-such-argument 5"),
        ("server_port_taken", 3, "exited: 3 (a port was taken): ERROR:    [Errno 98] error while attempting to bind"),
        ("nccl_port_taken", -9, "killed by SIGKILL (a port was taken): torch.distributed.DistNetworkError: The server socket"),
        ("killed", -9, "killed by SIGKILL"),
    ],
)
def test_the_logs_of_a_real_server_tell_why_it_ended(log: str, code: int, said: str):
    text = (LOGS / f"{log}.log").read_text()
    told = crash.describe(Exit(code), text)
    assert told.startswith(said)
    assert len(told) < 1100
    assert "\n" not in told
    assert crash.port_taken(text) == ("port_taken" in log)


def test_a_sigkill_counts_as_memory_only_when_the_kernel_counted_it():
    killed, scheduler = (LOGS / "killed.log").read_text(), (LOGS / "scheduler_killed.log").read_text()
    oom = OomKills(2, 5).since(OomKills(1, 4))
    assert crash.describe(Exit(-9), killed, oom) == f"killed by SIGKILL ({oom})"
    assert f"({oom})" in crash.describe(Exit(-9), scheduler, oom), "the kernel took the scheduler, which took the server along"
    assert "memory" not in crash.describe(Exit(1), (LOGS / "bad_model_path.log").read_text(), oom)
    assert OomKills(1, 5).since(OomKills(1, 4)) == "out of memory: the kernel killed it, the machine has none left"
    assert OomKills(1, 4).since(OomKills(1, 4)) == ""


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "out of memory on the GPU"),
        ("RuntimeError: CUDA error: out of memory", "out of memory on the GPU"),
        ("RuntimeError: Not enough memory. Please try to increase --mem-fraction-static.", "out of memory for the KV cache"),
        ("MemoryError", "out of memory"),
    ],
)
def test_memory_of_the_gpu_and_of_the_cache_are_named(line: str, cause: str):
    log = f'Traceback (most recent call last):\n  File "/x.py", line 1, in f\n    f()\n{line}\n'
    assert crash.describe(Exit(-9), log) == f"killed by SIGKILL ({cause}): {line}"


def test_what_we_killed_has_no_cause_in_its_log():
    assert crash.describe(Exit(None, ours=True), "MemoryError") == "ended: we killed it"
    assert crash.describe(Exit(None), "") == "ended: its guard was killed"


def test_a_log_without_a_telling_line_is_quoted_from_its_end_unless_a_signal_says_enough():
    log = "\n".join(f"line {i}" for i in range(9))
    assert crash.describe(Exit(1), log) == "exited: 1: line 6 | line 7 | line 8"
    assert crash.describe(Exit(-11), log) == "killed by SIGSEGV"
    assert crash.describe(Exit(-99), "") == "killed by signal 99"


@given(st.text(max_size=400), st.integers(-70, 255), st.sampled_from(["", "out of memory"]))
def test_no_log_is_too_strange_to_be_read(log: str, code: int, oom: str):
    told = crash.describe(Exit(code), log, oom)
    assert told
    assert len(told) < 1100


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a\n", {"sys/fs/cgroup/a/memory.events": "oom 1\noom_kill 3\n"}, 3),
        ("0::/host/path\n", {"sys/fs/cgroup/memory.events": "oom_kill 4\n"}, 4),
        ("4:cpu,memory:/b\n0::/\n", {"sys/fs/cgroup/memory/b/memory.oom_control": "under_oom 0\noom_kill 5\n"}, 5),
        ("4:memory:/b\n", {"sys/fs/cgroup/memory/memory.oom_control": "oom_kill 6\n"}, 6),
        ("4:memory:/b\n", {}, 0),
    ],
)
def test_the_kernels_count_is_found_in_both_kinds_of_cgroup(tmp_path: Path, groups: str, files: dict[str, str], expected: int):
    for name, text in {"proc/self/cgroup": groups, "proc/vmstat": "pgfault 1\noom_kill 9\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert oom_kills(tmp_path) == OomKills(expected, 9)


def test_a_machine_that_counts_nothing_has_killed_nobody(tmp_path: Path):
    assert oom_kills(tmp_path) == OomKills(0, 0)


# -- a start ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Start:
    """A start that ends as it is told, played: which error, and whether it lost a port."""

    error: EngineLost | None
    lost_a_port: bool = False
    closed: bool = False

    async def ready(self) -> None:
        if self.error is not None:
            raise self.error

    async def aclose(self) -> None:
        self.closed = True


@given(st.lists(st.sampled_from(["up", "port", "crash"]), min_size=launched.PORT_TRIES, max_size=launched.PORT_TRIES))
def test_a_start_is_made_again_for_a_lost_port_alone_and_leaves_nothing_of_those_that_failed(ends: list[str]):
    made: list[Start] = []

    async def begin() -> Start:
        end = ends[len(made)]
        made.append(Start(None if end == "up" else EngineLost("e0", end), end == "port"))
        return made[-1]

    with contextlib.suppress(EngineLost):
        assert asyncio.run(launched.start(begin, "e0", 5)) is made[-1]
    last = next((i for i, end in enumerate(ends) if end != "port"), len(ends) - 1)
    assert len(made) == last + 1
    assert [s.closed for s in made] == [*(True for _ in range(last)), ends[last] != "up"]


SMALL = {"args": ["--model", "hash", "--tokens-per-s", "0"]}


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(launched, "log_path", lambda name: str(tmp_path / f"{name.replace('/', '-')}.log"))
    return tmp_path


@contextlib.asynccontextmanager
async def small(name: str, **engine: Any) -> AsyncIterator[Launched]:
    config = Config.model_validate({"engine": {**SMALL, **engine}})

    async def begin() -> Launched:
        return await Launched.begin(config, "e0", name)

    unit = await launched.start(begin, "e0", config.engine.start_timeout_s)
    try:
        yield unit
    finally:
        await unit.aclose()


async def test_an_engine_that_is_launched_serves_and_its_end_is_told_with_its_log(in_tmp: Path):
    async with small("r/e0/1") as unit:
        engine = SGLang("e0", unit.url)
        assert await engine.ready()
        await engine.aclose()
        pid = unit.pid()
        assert pid
        assert unit.ours
        os.kill(pid, signal.SIGSEGV)
        assert await unit.wait() == f"killed by SIGSEGV (log: {in_tmp / 'r-e0-1.log'})"


async def test_engines_that_start_in_the_same_moment_all_come_up(in_tmp: Path):
    async with contextlib.AsyncExitStack() as stack:
        units = await asyncio.gather(*(stack.enter_async_context(small(f"r/e{i}/1")) for i in range(6)))
        assert len({unit.url for unit in units}) == 6


async def test_a_start_whose_port_a_stranger_takes_in_between_comes_up_on_another(in_tmp: Path, monkeypatch: pytest.MonkeyPatch):
    strangers: list[socket.socket] = []
    claim = ports.claim

    def raced(rng: random.Random) -> ports.Ports:
        claimed = claim(rng)
        if len(strangers) < 2:
            strangers.append(socket.create_server(("127.0.0.1", claimed.server)))
        return claimed

    monkeypatch.setattr(ports, "claim", raced)
    try:
        async with small("r/e0/1") as unit:
            assert not any(unit.url.endswith(str(s.getsockname()[1])) for s in strangers)
    finally:
        for s in strangers:
            s.close()
    assert len(strangers) == 2


async def test_a_start_that_takes_too_long_is_ended_at_its_deadline(in_tmp: Path):
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(EngineLost, match=r"not ready within 0.5 s \(engine.start_timeout_s\)"):
        async with small("r/e0/1", command=sleeper, start_timeout_s=0.5):
            pass


async def test_an_engine_that_ends_at_its_start_says_why(in_tmp: Path):
    with pytest.raises(EngineLost, match=r"exited: 2: .*: error: unrecognized arguments: --no-such-thing .*at its start"):
        async with small("r/e0/1", args=["--no-such-thing"]):
            pass
