"""How many processes the kernel has killed for want of memory, as it counts them itself.

Owns where the counts are: in the memory cgroup of this process, and for the whole machine. A process that was killed so
says nothing, and its exit looks like anybody's SIGKILL.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class OomKills:
    group: int
    machine: int

    def since(self, earlier: OomKills) -> str:
        """Whose memory ended since then, in words; empty when nobody was killed."""
        if self.group > earlier.group:
            return "out of memory: the kernel killed it at the memory limit of its container"
        if self.machine > earlier.machine:
            return "out of memory: the kernel killed it, the machine has none left"
        return ""


def oom_kills(root: Path = Path("/")) -> OomKills:
    """0 where nobody counts."""
    group = next((n for path in _groups(root) if (n := _count(path)) is not None), 0)
    return OomKills(group, _count(root / "proc/vmstat") or 0)


def _groups(root: Path) -> Iterator[Path]:
    """Where this process's own group counts; inside of a container its path may be that of the host, and its root is here."""
    mounted = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield mounted / path.lstrip("/") / "memory.events"
                yield mounted / "memory.events"
            elif "memory" in controllers.split(","):
                yield mounted / "memory" / path.lstrip("/") / "memory.oom_control"
                yield mounted / "memory" / "memory.oom_control"


def _count(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None
