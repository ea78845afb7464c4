"""Agents whose processes say what they like to whoever waits for their end."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from typing import Any


def run(task: dict[str, Any], base_url: str, api_key: str) -> None:
    for fd in range(3, 256):
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.write(fd, bytes.fromhex(task["say"]))
    time.sleep(task.get("then_s", 0))
    os._exit(0)
