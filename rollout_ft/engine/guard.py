"""Runs an engine so that it cannot outlive whoever started it: `python guard.py FD COMMAND…`.

Owns everything that descends from the engine, whatever process groups and sessions it makes: orphans come to the guard,
and it ends when none is left. FD is the read end of a pipe whose other end the engine's actor holds; when that end closes,
for whatever reason, all are killed. Imports nothing but the standard library, and is run as a file, so that it starts in
milliseconds. A guard that is killed itself takes its engine along (PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import select
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
LOOK_S = 0.005


def main() -> None:
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if child == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(pipe)
        os.dup2(2, 1)  # the guard's own output is for the exit code alone
        os.execvp(command[0], command)
    exited = os.pidfd_open(child)
    ready, _, _ = select.select([pipe, exited], [], [])
    if exited in ready:
        _, status = os.waitpid(child, 0)
        # What is left of a crashed engine may take long to die: the news does not wait for it.
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    end()


def end() -> None:
    """Kills all that descend from this process, until there are none: one may begin another meanwhile."""
    while left := below(os.getpid()):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(LOOK_S)


def below(pid: int) -> list[int]:
    """Everything that descends from a process."""
    found: list[int] = []
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError), open(path) as f:
            found += [int(word) for word in f.read().split()]
    return [each for child in found for each in (child, *below(child))]


if __name__ == "__main__":
    main()
