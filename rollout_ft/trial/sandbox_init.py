"""The first process of a local sandbox: `python sandbox_init.py FD`.

Owns the commands that run in it, one at a time, and what they leave running. FD is a socket: a JSON line says what to run, a
JSON line says what came of it. Imports nothing but the standard library, and is run as a file under `engine.guard`, which ends
everything below it when the sandbox is stopped or its owner dies.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    channel.sendall(b"{}\n")  # it is up
    for line in channel.makefile("r"):
        try:
            said = run(**json.loads(line))
        except (OSError, ValueError, OverflowError) as e:  # of what a command says nothing ends the sandbox
            said = {"error": f"the command cannot be run: {e}"}
        channel.sendall(json.dumps(said).encode() + b"\n")


def run(command: str, directory: str, env: dict[str, str], timeout_s: float, max_bytes: int) -> dict[str, Any]:
    """Runs a shell command; ends when its shell does, whatever it left in the background."""
    os.makedirs(directory, exist_ok=True)  # a command may have removed it
    read, write = os.pipe()
    try:
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=directory, env=env, stdin=subprocess.DEVNULL, stdout=write, stderr=write, start_new_session=True
        )
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    until, output, total, timed_out, open_ends = time.monotonic() + timeout_s, bytearray(), 0, False, [read]
    ended = os.pidfd_open(process.pid)
    while True:
        left_s = until - time.monotonic()
        if left_s <= 0 and not timed_out:
            timed_out = True
            os.killpg(process.pid, signal.SIGKILL)
        ready, _, _ = select.select([*open_ends, ended], [], [], None if timed_out else left_s)
        data = os.read(read, 65536) if read in ready else b""
        if read in ready and not data:
            open_ends = []
        total += len(data)
        output += data[: max(0, max_bytes - len(output))]
        if ended in ready and (not data or total > max_bytes):
            break
    os.close(read)
    os.close(ended)
    text = output.decode(errors="replace")
    return {"output": text, "exit_code": process.wait(), "timed_out": timed_out, "truncated_bytes": total - len(output)}


if __name__ == "__main__":
    main()
