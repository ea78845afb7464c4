"""Runs an engine so that it cannot outlive whoever started it: `python guard.py FD COMMAND…`.

Owns the engine's process group. FD is the read end of a pipe whose other end the engine's actor holds; when that end
closes, for whatever reason, the whole group is killed. Imports nothing but the standard library, and is run as a
file, so that it starts in milliseconds. A guard that is killed itself takes its engine along (PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
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
        code = os.waitstatus_to_exitcode(status)
        # Grandchildren of a crashed engine go with it; the guard is in the group too, so the code is written first.
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
