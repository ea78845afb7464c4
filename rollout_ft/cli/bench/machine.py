"""What a figure depends on beside our code: the machine, and the libraries that do the work.

Owns nothing that is measured.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from rollout_ft.types import JSON

_LIBRARIES = ("ray", "uvloop", "httptools", "uvicorn", "aiohttp", "orjson", "msgspec")
"""uvloop runs the gateways, and Ray's asynchronous actors as soon as it is installed."""


def machine() -> JSON:
    """`load`: how many others wanted a core in the last minute; CPU times of a busy machine are a little higher."""
    libraries = {name: version(name) for name in _LIBRARIES}
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **libraries,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
