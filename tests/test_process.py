"""The engine's process, shown on real children: it never outlives whoever started it.

Every process of a family holds the writing end of one FIFO: what it wrote says who is there, its end that nobody is.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from rollout_ft.engine.process import EngineProcess, Exit

ROOT = Path(__file__).parents[1]
LIMIT_S = 20

HEAD = "import os, sys, signal; f = os.open(sys.argv[1], os.O_WRONLY); os.set_inheritable(f, True); "
HELLO = "os.write(f, b'%d\\n' % os.getpid()); "
PARTS = {
    "single": HEAD + HELLO + "signal.pause()",
    "family": HEAD + "os.fork(); os.fork(); " + HELLO + "signal.pause()",
    "deaf": HEAD + "[signal.signal(s, signal.SIG_IGN) for s in (1, 2, 3, 15)]; " + HELLO + "signal.pause()",
    "scattered": HEAD + "\nfor _ in range(2):\n  if os.fork() == 0: os.setsid()\n" + HELLO + "signal.pause()",
    "daemon": HEAD + "\nif os.fork() == 0:\n  os.setsid()\n  if os.fork(): os._exit(0)\n" + HELLO + "signal.pause()",
    "crash": HEAD + "\nif os.fork():\n  os.read(0, 1)\n  os._exit(3)\n" + HELLO + "signal.pause()",
}
FAMILIES = [("single", 1), ("family", 4), ("deaf", 1), ("scattered", 4), ("daemon", 2)]
STARTER = """
import asyncio, os, sys
from rollout_ft.engine.process import EngineProcess
async def main():
    process = await EngineProcess.start(sys.argv[2:], dict(os.environ), sys.argv[1])
    await process.wait()
asyncio.run(main())
"""


class Family:
    """The processes that hold the FIFO."""

    def __init__(self, path: Path):
        os.mkfifo(path)
        self.path = str(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._read = b""
        self.pids: list[int] = []

    def command(self, part: str) -> list[str]:
        return [sys.executable, "-I", "-S", "-c", PARTS[part], self.path]

    async def arrive(self, count: int) -> list[int]:
        """Waits until so many have said their pids."""
        while len(self.pids) < count:
            data = await asyncio.to_thread(self._next)
            assert data, "they are gone already"
            self._read += data
            self.pids = [int(line) for line in self._read.split(b"\n")[:-1]]
        return self.pids

    async def gone(self) -> None:
        """Waits until none is left."""
        while await asyncio.to_thread(self._next):
            pass

    def _next(self) -> bytes:
        ready, _, _ = select.select([self._fd], [], [], LIMIT_S)
        assert ready, "nothing happened"
        return os.read(self._fd, 4096)

    def close(self) -> None:
        os.close(self._fd)
        for pid in self.pids:  # only ever finds one when a test has failed
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if self.path.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    family = Family(tmp_path / "alive")
    yield family
    family.close()


async def ended(process: EngineProcess) -> Exit:
    """How it ended, once nothing is left of it."""
    how = await process.wait()
    await process.aclose()
    return how


async def start(family: Family, part: str, tmp_path: Path) -> EngineProcess:
    return await EngineProcess.start(family.command(part), dict(os.environ), str(tmp_path / "log"))


@contextlib.asynccontextmanager
async def starter(family: Family, part: str, count: int, tmp_path: Path) -> AsyncIterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that starts the family and waits, and a pidfd of the guard."""
    log = str(tmp_path / "log")
    command = [sys.executable, "-c", STARTER, log, *family.command(part)]
    process = await asyncio.to_thread(subprocess.Popen, command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        await family.arrive(count)
        guard = os.pidfd_open(os.getpgid(family.pids[0]))
        try:
            yield process, guard
        finally:
            os.close(guard)
    finally:
        process.kill()
        process.wait()


async def exited(pidfd: int) -> None:
    ready, _, _ = await asyncio.to_thread(select.select, [pidfd], [], [], LIMIT_S)
    assert ready, "it is still there"


@pytest.mark.parametrize(("part", "count"), FAMILIES)
async def test_nothing_outlives_a_starter_that_is_killed(family: Family, tmp_path: Path, part: str, count: int):
    async with starter(family, part, count, tmp_path) as (process, guard):
        process.kill()
        await family.gone()
        await exited(guard)


async def test_a_stopped_engine_does_not_outlive_its_starter_either(family: Family, tmp_path: Path):
    async with starter(family, "single", 1, tmp_path) as (process, guard):
        os.kill(family.pids[0], signal.SIGSTOP)
        process.kill()
        await family.gone()
        await exited(guard)


@pytest.mark.parametrize(("part", "count"), FAMILIES)
async def test_kill_ends_the_whole_family(family: Family, tmp_path: Path, part: str, count: int):
    process = await start(family, part, tmp_path)
    await family.arrive(count)
    process.kill()
    await family.gone()
    assert await ended(process) == Exit(None, ours=True)
    assert not process.alive


async def test_what_left_the_group_and_its_parent_goes_when_the_engine_crashes(family: Family, tmp_path: Path):
    process = await start(family, "daemon", tmp_path)
    pids = await family.arrive(2)
    engine = process.pid()
    assert engine in pids
    os.kill(engine, signal.SIGKILL)
    await family.gone()
    assert await ended(process) == Exit(-9)


async def test_a_crash_that_was_there_first_is_not_called_our_doing(family: Family, tmp_path: Path):
    process = await start(family, "single", tmp_path)
    [pid] = await family.arrive(1)
    crashed = os.pidfd_open(pid)
    os.kill(pid, signal.SIGSEGV)
    await exited(crashed)  # its files are closed before that
    os.close(crashed)
    process.kill()
    assert await ended(process) == Exit(-11)


async def test_kill_ends_a_stopped_family(family: Family, tmp_path: Path):
    process = await start(family, "family", tmp_path)
    for pid in await family.arrive(4):
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    await family.gone()
    assert await ended(process) == Exit(None, ours=True)


async def test_kill_ends_an_engine_whose_guard_is_stopped(family: Family, tmp_path: Path):
    process = await start(family, "single", tmp_path)
    await family.arrive(1)
    os.kill(process.group, signal.SIGSTOP)
    process.kill()
    await family.gone()
    await ended(process)


async def test_a_guard_that_is_killed_takes_the_engine_along(family: Family, tmp_path: Path):
    process = await start(family, "single", tmp_path)
    await family.arrive(1)
    os.kill(process.group, signal.SIGKILL)
    await family.gone()
    assert await ended(process) == Exit(None)


async def test_an_engine_that_crashes_takes_its_children_along(family: Family, tmp_path: Path):
    process = await start(family, "crash", tmp_path)
    await family.gone()
    assert await ended(process) == Exit(3)


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("", 0),
        ("raise SystemExit(7)", 7),
        ("import os; os.kill(os.getpid(), 11)", -11),
        ("print('99', flush=True); raise SystemExit(7)", 7),
    ],
)
async def test_how_an_engine_ended_is_reported(tmp_path: Path, code: str, exit_code: int):
    process = await EngineProcess.start([sys.executable, "-I", "-S", "-c", code], dict(os.environ), str(tmp_path / "log"))
    assert await ended(process) == Exit(exit_code)
    assert not process.alive


async def test_an_engine_killed_from_outside_is_reported_with_the_signal(family: Family, tmp_path: Path):
    process = await start(family, "single", tmp_path)
    os.kill((await family.arrive(1))[0], signal.SIGKILL)
    assert await ended(process) == Exit(-9)


async def test_a_command_that_does_not_exist_ends_at_once_and_says_so_in_the_log(tmp_path: Path):
    process = await EngineProcess.start(["/no/such/program"], dict(os.environ), str(tmp_path / "log"))
    assert await ended(process) != Exit(0)
    assert "/no/such/program" in (tmp_path / "log").read_text() or "No such file" in (tmp_path / "log").read_text()


async def test_what_an_engine_prints_is_in_its_log(tmp_path: Path):
    code = "import sys; print('to stdout', flush=True); print('to stderr', file=sys.stderr)"
    process = await EngineProcess.start([sys.executable, "-I", "-S", "-c", code], dict(os.environ), str(tmp_path / "log"))
    await ended(process)
    assert (tmp_path / "log").read_text().splitlines() == ["to stdout", "to stderr"]


async def test_the_log_of_an_earlier_start_stays(tmp_path: Path):
    for word in ("first", "second"):
        command = [sys.executable, "-I", "-S", "-c", f"print({word!r})"]
        await ended(await EngineProcess.start(command, dict(os.environ), str(tmp_path / "log")))
    assert (tmp_path / "log").read_text().split() == ["first", "second"]


async def test_the_engine_gets_the_environment_it_is_given_and_no_other(tmp_path: Path):
    command = [sys.executable, "-I", "-S", "-c", "import os; print(os.environ.get('A'), 'HOME' in os.environ)"]
    await ended(await EngineProcess.start(command, {"A": "b"}, str(tmp_path / "log")))
    assert (tmp_path / "log").read_text().split() == ["b", "False"]


async def test_the_pid_is_the_engines_own(family: Family, tmp_path: Path):
    process = await start(family, "single", tmp_path)
    pids = await family.arrive(1)
    assert [process.pid()] == pids
    assert process.alive
    await process.aclose()
    assert process.pid() is None


async def test_before_the_engine_is_there_it_has_no_pid(family: Family, tmp_path: Path):
    process = await start(family, "single", tmp_path)
    early = process.pid()
    assert early in (None, *await family.arrive(1))
    await process.aclose()


async def test_the_engine_inherits_no_open_file_but_its_three(tmp_path: Path):
    held = os.open(tmp_path / "secret", os.O_RDWR | os.O_CREAT)
    code = "import os; print(sorted(os.listdir('/proc/self/fd'), key=int))"
    try:
        await ended(await EngineProcess.start([sys.executable, "-I", "-S", "-c", code], dict(os.environ), str(tmp_path / "log")))
    finally:
        os.close(held)
    assert (tmp_path / "log").read_text().strip() == "['0', '1', '2', '3']"  # 3 is the listing itself


async def test_of_several_engines_only_the_one_that_is_killed_ends(tmp_path: Path):
    families = [Family(tmp_path / f"alive-{i}") for i in range(3)]
    processes = [await start(f, "single", tmp_path) for f in families]
    for f in families:
        await f.arrive(1)
    processes[1].kill()
    await families[1].gone()
    await ended(processes[1])
    assert [p.alive for p in processes] == [True, False, True]
    for p, f in zip(processes, families, strict=True):
        await p.aclose()
        await f.gone()
        f.close()


async def test_closing_leaves_no_process_and_no_open_file(family: Family, tmp_path: Path):
    before = set(os.listdir("/proc/self/fd"))
    process = await start(family, "family", tmp_path)
    await family.arrive(4)
    await process.aclose()
    await family.gone()
    async with asyncio.timeout(LIMIT_S):
        while set(os.listdir("/proc/self/fd")) - before:  # asyncio closes its own a moment later
            await asyncio.sleep(0.01)


async def test_closing_twice_is_closing_once(family: Family, tmp_path: Path):
    process = await start(family, "single", tmp_path)
    await process.aclose()
    await process.aclose()
    assert not process.alive
