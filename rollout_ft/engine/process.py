"""The engine's process: started under the guard, watched, killed whole.

Owns the child process, its pipe and its log. Knows nothing of what it serves. The pipe is never inherited by the
engine, so that it closes exactly when this process ends or `kill` is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

GUARD = str(Path(__file__).with_name("guard.py"))


def free_port(host: str) -> int:
    """A port that was free a moment ago; a start that loses the race fails and is tried again with another."""
    with socket.socket() as s:
        s.bind((host, 0))
        return s.getsockname()[1]


class EngineProcess:
    def __init__(self, process: asyncio.subprocess.Process, pipe: int, log: IO[bytes]):
        self._process, self._pipe, self._log = process, pipe, log
        self.exit_reason = ""
        self._exited = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, command: Sequence[str], env: dict[str, str], log_path: str) -> EngineProcess:
        """Starts `command` in a process group of its own; its output goes to `log_path`."""
        read, write = os.pipe()
        log = open(log_path, "ab")  # noqa: SIM115, ASYNC230 - open for as long as the engine lives
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", GUARD, str(read), *command,
                pass_fds=(read,), start_new_session=True, env=env,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=log,
            )  # fmt: skip
        finally:
            os.close(read)
        return cls(process, write, log)

    @property
    def group(self) -> int:
        """The id of the process group: the guard's pid."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._exited.done()

    def pid(self) -> int | None:
        """The engine's own pid, for a fault plan that stops it: the guard's only child."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(Path(f"/proc/{self.group}/task/{self.group}/children").read_text().split()[0])
        return None

    async def wait(self) -> str:
        """Returns why the engine ended, when it has."""
        return await asyncio.shield(self._exited)

    def kill(self) -> None:
        """Ends the whole group at once, stopped processes included."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)

    async def aclose(self) -> None:
        self.kill()
        await self._exited

    async def _watch(self) -> str:
        assert self._process.stdout is not None
        out = await self._process.stdout.read()
        await self._process.wait()
        os.close(self._pipe)
        self._log.close()
        code = out.decode(errors="replace").strip().splitlines()[-1:] or ["killed"]
        self.exit_reason = f"exited: {code[0]}"
        return self.exit_reason
