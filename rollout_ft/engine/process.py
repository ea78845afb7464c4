"""The engine's process: started under the guard, watched, killed whole.

Owns the child process, its pipe and its log. Knows nothing of what it serves. The pipe is never inherited by the
engine, so that it closes exactly when this process ends or `kill` is called.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

GUARD = str(Path(__file__).with_name("guard.py"))


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended. `code` is negative for a signal, and None when there was nobody to see it."""

    code: int | None
    ours: bool = False
    """We killed it."""


class EngineProcess:
    def __init__(self, process: asyncio.subprocess.Process, pipe: int, log: IO[bytes]):
        self._process, self._pipe, self._log = process, pipe, log
        self._killed = False
        self._exited = asyncio.create_task(self._watch())
        self._gone = asyncio.create_task(self._clean())

    @classmethod
    async def start(cls, command: Sequence[str], env: dict[str, str], output: str | int, pass_fds: tuple[int, ...] = ()) -> EngineProcess:
        """Starts `command` in a process group of its own, with these file descriptors. What it prints goes to `output`: a file's
        path, or a descriptor, which is closed when nothing is left of it."""
        log = open(output, "ab")  # noqa: SIM115, ASYNC230 - open for as long as the engine lives
        read, write = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", GUARD, str(read), *command,
                pass_fds=(read, *pass_fds), start_new_session=True, env=env,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=log,
            )  # fmt: skip
        except BaseException:
            os.close(write)
            log.close()
            raise
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
        """The engine's own pid, for a fault plan that stops it: the guard's only child while it lives."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(Path(f"/proc/{self.group}/task/{self.group}/children").read_text().split()[0])
        return None

    async def wait(self) -> Exit:
        """Returns how the engine ended, when it has; what is left of it may still be dying."""
        return await asyncio.shield(self._exited)

    def kill(self) -> None:
        """Ends all of it at once, stopped processes included: the guard does, and is woken for it."""
        if not self._killed:
            self._killed = True
            os.close(self._pipe)
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.group, signal.SIGCONT)

    async def aclose(self) -> None:
        """Kills it, and returns when nothing is left."""
        self.kill()
        await asyncio.shield(self._gone)

    async def _watch(self) -> Exit:
        code = (await self._output().readline()).strip()
        return Exit(int(code)) if code else Exit(None, ours=self._killed)

    async def _clean(self) -> None:
        await self._exited
        await self._output().read()
        await self._process.wait()
        with contextlib.suppress(ProcessLookupError):  # what a guard left behind that was killed itself
            os.killpg(self.group, signal.SIGKILL)
        self.kill()
        self._log.close()

    def _output(self) -> asyncio.StreamReader:
        assert self._process.stdout is not None
        return self._process.stdout
