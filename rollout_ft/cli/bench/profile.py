"""Where the CPU goes: py-spy on every process of ours while a load runs.

Owns the recorders and the reading of what they wrote. The subtle invariant: a sample is a share of its process's CPU,
and not a time: py-spy's own clock says how often it looked, and the kernel says what was used.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path

from rollout_ft.cli.bench.usage import OURS, Processes
from rollout_ft.errors import ConfigError

RATE = "100"
Threads = dict[tuple[str, str], float]
"""CPU seconds by role and name."""


@dataclass(frozen=True, slots=True)
class Hot:
    """A function, with its share of the samples of its role: at work itself, or somewhere below it."""

    role: str
    function: str
    own: float
    below: float


class Profile(AbstractAsyncContextManager[None]):
    """Records into `directory`, a file a process: stacks, one a line with its count, as flame graph tools read them.

    A process is not stopped to be looked at: one that stood still a hundred times a second would be taken for frozen.
    """

    def __init__(self, directory: Path, processes: Processes):
        spy = shutil.which("py-spy", path=os.pathsep.join((os.environ.get("PATH", ""), str(Path(sys.executable).parent))))
        if spy is None:
            raise ConfigError("--profile needs py-spy: pip install py-spy, or leave the option out")
        directory.mkdir(parents=True, exist_ok=True)
        self._spy, self._processes = spy, processes
        self._files = {p.pid: (role, directory / f"{role.replace(' ', '-')}-{p.pid}.txt") for role, p in processes.roles if role in OURS}
        self._recorders: list[asyncio.subprocess.Process] = []
        self._threads: Threads = {}

    async def __aenter__(self) -> None:
        self._threads = self._read_threads()
        for pid, (_, file) in self._files.items():
            command = [self._spy, "record", "--gil", "--nonblocking", "--rate", RATE, "--duration", "unlimited", "--format", "raw"]
            command += ["--pid", str(pid), "--output", str(file)]
            quiet = asyncio.subprocess.DEVNULL
            self._recorders.append(await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet, start_new_session=True))

    async def __aexit__(self, *exc: object) -> None:
        if exc[0] is None:
            self._threads = {key: used - self._threads.get(key, 0.0) for key, used in self._read_threads().items()}
        for recorder in self._recorders:
            if recorder.returncode is None:
                recorder.send_signal(signal.SIGINT)
        await asyncio.gather(*(recorder.wait() for recorder in self._recorders))

    def threads(self) -> list[tuple[str, str, float]]:
        """Role, name and CPU seconds while it recorded, most first: Ray's own work is in threads without Python."""
        return [(role, name, used) for (role, name), used in sorted(self._threads.items(), key=lambda item: -item[1])]

    def _read_threads(self) -> Threads:
        used: Threads = {}
        for role, process in self._processes.roles:
            if role in OURS:
                for thread in process.threads():
                    key = role, _thread_name(process.pid, thread.id)
                    used[key] = used.get(key, 0.0) + thread.user_time + thread.system_time
        return used

    def hottest(self) -> list[Hot]:
        """Every function that was seen, the one with most work of its own first, role by role."""
        found: list[Hot] = []
        for role in OURS:
            files = [file for r, file in self._files.values() if r == role and file.exists()]
            found += hottest(role, [line for file in files for line in file.read_text().splitlines()])
        return found


def hottest(role: str, stacks: Iterable[str]) -> list[Hot]:
    """Of lines like `outer (file:line);inner (file:line) 12`."""
    own: Counter[str] = Counter()
    below: Counter[str] = Counter()
    total = 0
    for line in stacks:
        stack, _, count = line.rpartition(" ")
        frames = [_function(frame) for frame in stack.split(";")]
        total += int(count)
        own[frames[-1]] += int(count)
        for name in set(frames):
            below[name] += int(count)
    return [Hot(role, name, own[name] / total, below[name] / total) for name, _ in sorted(below.items(), key=lambda i: (-own[i[0]], -i[1]))]


def _thread_name(pid: int, thread: int) -> str:
    try:
        name = Path(f"/proc/{pid}/task/{thread}/comm").read_text().strip()
    except OSError:
        return ""
    return name.rstrip("0123456789")


def _function(frame: str) -> str:
    """`handle (rollout_ft/gateway/gateway.py:52)` without the line."""
    name, _, line = frame.rpartition(":")
    return f"{name})" if name and line.rstrip(")").isdigit() else frame
