"""Why an engine ended, in one line: how its process ended, the cause that its log shows, the lines that tell of it.

Owns the reading of a log. Pure. A server that kills itself because a part of it failed ends by SIGKILL just as one that
the kernel kills: only the log and the kernel's count tell them apart.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

from rollout_ft.engine.process import Exit

MAX_LINES = 3
MAX_LINE_CHARS = 300
_UP = "The server is fired up"
_STAMP = re.compile(r"^\[[^\]]*\] ")
_TELLS = re.compile(
    r"^[A-Za-z_][\w.]*(?:Error|Exception|Failure|Interrupt|Exit)\b(?::|$)"  # the end of a traceback
    r"|crashed with exit code|out of memory|\berror: |\[Errno \d+\]|^ERROR:|Watchdog .*timeout|Segmentation fault|Fatal Python error"
    r"|^Killed$|NCCL error|CUDA error|: No such file or directory"
)
_QUIET = re.compile(r"Ignore import error|init failed \(ModuleNotFoundError|/freeze_gc|^INFO:|^requests\.exceptions|" + _UP)
_CHILD = re.compile(r"Subprocess (\S+) \(pid=\d+\) crashed with exit code (-?\d+)")
_PORT = re.compile(r"address already in use|EADDRINUSE|port_base at \d+ is not available|[Pp]ort \d+ is (?:already )?in use", re.IGNORECASE)
_CAUSES = [
    ("out of memory for the KV cache", re.compile(r"KV cache.*(?:out of memory|not enough)|Not enough memory|retract.*memory", re.I)),
    ("out of memory on the GPU", re.compile(r"CUDA out of memory|OutOfMemoryError|CUDA error: out of memory|HIP out of memory", re.I)),
    ("out of memory", re.compile(r"can't allocate memory|Cannot allocate memory|MemoryError|std::bad_alloc", re.I)),
    ("a port was taken", _PORT),
]  # fmt: skip


def describe(ended: Exit, log: str, oom: str = "") -> str:
    """`oom`: whose memory the kernel killed a process of this node for while the engine lived, in words."""
    if ended.ours:
        return "ended: we killed it"
    lines = telling(log, quiet=ended.code is None or ended.code < 0)
    how, cause = _how(ended.code), _cause(lines, ended.code, oom)
    return f"{how}{f' ({cause})' if cause else ''}{': ' if lines else ''}{' | '.join(lines)}"


def port_taken(log: str) -> bool:
    """Whether somebody else had one of its ports: no fault of the engine."""
    return bool(_PORT.search(log))


def telling(log: str, *, quiet: bool = False) -> list[str]:
    """The last lines that say what went wrong; where none does, the last ones, unless `quiet`: a signal explains itself."""
    lines = [_STAMP.sub("", line).strip()[:MAX_LINE_CHARS] for line in log.splitlines() if line and not line[0].isspace()]
    up = max((i for i, line in enumerate(lines) if line.startswith(_UP)), default=0)
    found = [i for i, line in enumerate(lines) if _TELLS.search(line) and not _QUIET.search(line)]
    found = [i for i in found if i > up] or found  # what it met on its way up did not end it, if anything after that did
    if found or quiet:
        return _last([lines[i] for i in found])
    return _last([line for line in lines if line and not _QUIET.search(line)])


def _last(lines: Sequence[str]) -> list[str]:
    once = list(dict.fromkeys(reversed(lines)))
    return list(reversed(once[:MAX_LINES]))


def _how(code: int | None) -> str:
    if code is None:
        return "ended: its guard was killed"
    return f"exited: {code}" if code >= 0 else f"killed by {_signal(-code)}"


def _cause(lines: Sequence[str], code: int | None, oom: str) -> str:
    text = "\n".join(lines)
    child = _CHILD.search(text)
    killed = code == -signal.SIGKILL or (child and int(child[2]) == -signal.SIGKILL)
    if oom and killed:
        return oom
    named = next((cause for cause, pattern in _CAUSES if pattern.search(text)), "")
    if named or not child:
        return named
    return f"its {child[1]} {_how(int(child[2]))}".replace("exited: ", "exited with ")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
