"""The start and the end of a real SGLang: what it is asked before, what is left after, and what its logs tell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from rollout_ft.config import Config
from rollout_ft.engine import installed, launched, ports
from rollout_ft.engine.launched import Launched
from rollout_ft.errors import ConfigError, EngineLost
from rollout_ft.testing.sglang_cpu import CPU_ARGS, launch_command

GONE_S = 10.0


@pytest.fixture(autouse=True)
def _logs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def log_path(name: str) -> str:
        return str(tmp_path / f"{name.replace('/', '-')}.log")

    monkeypatch.setattr(launched, "log_path", log_path)


def config_of(python: Path, model: Path, *args: str, **engine: Any) -> Config:
    settings: dict[str, Any] = {
        "kind": "sglang",
        "start_timeout_s": 280,
        "command": launch_command(str(python)),
        "args": [*CPU_ARGS, *args],
        "env": {"OMP_NUM_THREADS": "1"},
    }
    return Config.model_validate({
        "model": {"path": str(model), "context_tokens": 4096}, "session": {"max_output_tokens": 512}, "engine": {**settings, **engine},
    })  # fmt: skip


@contextlib.asynccontextmanager
async def up(config: Config, name: str = "r/e0/1") -> AsyncGenerator[Launched]:
    async def begin() -> Launched:
        return await Launched.begin(config, "e0", name)

    unit = await launched.start(begin, "e0", config.engine.start_timeout_s)
    try:
        yield unit
    finally:
        await unit.aclose()


def family(unit: Launched) -> list[psutil.Process]:
    pid = unit.pid()
    assert pid is not None
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def named(processes: list[psutil.Process], name: str) -> psutil.Process:
    return next(p for p in processes if name in " ".join(p.cmdline()))


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=GONE_S)[1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--max-runing-requests", "5"], "--max-runing-requests is not known; did you mean --max-running-requests?"),
        (["--dtype", "float99"], "argument --dtype: invalid choice: 'float99'"),
        (["--chunked-prefill-size", "many"], "argument --chunked-prefill-size: invalid int value: 'many'"),
        (["--chunked-prefill-siz", "5"], "write --chunked-prefill-siz in full: --chunked-prefill-size"),
        (["astray"], "astray belongs to no argument"),
    ],
)
async def test_an_argument_that_the_installed_version_does_not_take_is_named(
    sglang_python: Path, tiny_model: Path, args: list[str], said: str
):
    with pytest.raises(ConfigError) as e:
        await installed.check(config_of(sglang_python, tiny_model, *args), here=True)
    assert str(e.value).startswith("engine.args: ")
    assert said in str(e.value)


async def test_what_the_installed_version_takes_is_accepted_and_torch_stays_out_of_this_process(sglang_python: Path, tiny_model: Path):
    assert await installed.check(config_of(sglang_python, tiny_model, "--tp", "2"), here=True) == ""
    script = [str(sglang_python.with_name("sglang")), "serve"]
    assert await installed.check(config_of(sglang_python, tiny_model, command=script), here=True) == ""
    assert "sglang" not in sys.modules


async def test_smoke_an_engine_comes_up_with_what_we_suggest_and_nothing_of_it_is_left(sglang_python: Path, tiny_model: Path):
    async with up(config_of(sglang_python, tiny_model)) as unit:
        processes = family(unit)
        assert {"sglang::scheduler", "sglang::detokenizer"} <= {p.cmdline()[0] for p in processes}
        async with aiohttp.ClientSession(unit.url) as http, http.get("/server_info") as response:
            info = await response.json()
        assert [info[k] for k in ("max_queued_requests", "watchdog_timeout", "soft_watchdog_timeout")] == [256, 3600, 60]
        assert info["enable_cache_report"]
        assert info["enable_metrics"]
        assert info["incremental_streaming_output"]
        assert ports.claim.__module__
        assert info["nccl_port"] == info["port"] + 1
        unit.kill()
        assert await unit.wait() == "ended: we killed it"
        assert gone(processes)


@pytest.mark.parametrize(
    ("part", "cause"),
    [("sglang::scheduler", "its scheduler_0 killed by SIGKILL"), ("sglang::detokenizer", "its detokenizer killed by SIGKILL")],
)
async def test_a_part_that_is_killed_is_named_and_the_rest_goes(sglang_python: Path, tiny_model: Path, part: str, cause: str):
    async with up(config_of(sglang_python, tiny_model)) as unit:
        processes = family(unit)
        named(processes, part).kill()
        assert cause in await unit.wait()
        assert gone(processes)


async def test_ids_out_of_the_vocabulary_are_named_as_what_they_did(sglang_python: Path, tiny_model: Path):
    async with up(config_of(sglang_python, tiny_model)) as unit:
        processes = family(unit)
        async with aiohttp.ClientSession(unit.url) as http:
            with contextlib.suppress(aiohttp.ClientError):
                await http.post("/generate", json={"input_ids": [99999], "sampling_params": {"max_new_tokens": 4}})
        assert "IndexError: index out of range" in await unit.wait()
        assert gone(processes)


async def test_a_model_that_is_not_one_is_named_at_the_start(sglang_python: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(EngineLost, match=r"exited: 1: .*Error"):
        async with up(config_of(sglang_python, tmp_path)):
            pass


@pytest.mark.parametrize("which", ["server", "nccl"])
async def test_a_start_that_loses_a_port_comes_up_on_others(
    sglang_python: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, which: str
):
    strangers: list[socket.socket] = []
    claimed: list[int] = []
    claim = ports.claim

    def raced(*args: Any) -> ports.Ports:
        made = claim(*args)
        claimed.append(made.server)
        if not strangers:
            strangers.append(socket.create_server(("0.0.0.0", getattr(made, which))))
        return made

    monkeypatch.setattr(ports, "claim", raced)
    async with up(config_of(sglang_python, tiny_model)) as unit:
        claimed.remove(int(unit.url.rpartition(":")[2]))
        assert len(claimed) == 1
    strangers[0].close()


STARTER = """
import asyncio, sys
from pathlib import Path
from rollout_ft.config import Config
from rollout_ft.engine import launched
launched.log_path = lambda name: sys.argv[2]
async def main():
    unit = await launched.Launched.begin(Config.model_validate_json(sys.argv[1]), "e0", "r/e0/1")
    await unit.ready()
    print(unit.pid(), flush=True)
    await unit.wait()
asyncio.run(main())
"""


@pytest.mark.parametrize("victim", ["starter", "guard", "both"])
async def test_nothing_outlives_whoever_started_it_or_its_guard(sglang_python: Path, tiny_model: Path, tmp_path: Path, victim: str):
    words = [sys.executable, "-c", STARTER, config_of(sglang_python, tiny_model).model_dump_json(), str(tmp_path / "log")]
    starter = await asyncio.to_thread(subprocess.Popen[str], words, stdout=subprocess.PIPE, text=True)
    try:
        assert starter.stdout is not None
        pid = int(await asyncio.to_thread(starter.stdout.readline))
        engine = psutil.Process(pid)
        guard = engine.ppid()
        processes = [engine, *engine.children(recursive=True)]
        assert len(processes) >= 3
        if victim in ("guard", "both"):
            os.kill(guard, signal.SIGKILL)
        if victim in ("starter", "both"):
            starter.kill()
        assert gone(processes)
    finally:
        starter.kill()
        starter.communicate()
