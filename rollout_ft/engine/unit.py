"""What stands behind an engine: something with an address, that ends, and that may be ours to end.

Owns the port between an engine's actor and what computes for it: a process that we started, or a server of somebody
else. What is not ours to kill ignores `kill`; it is let go of.
"""

from __future__ import annotations

from typing import Protocol


class Unit(Protocol):
    @property
    def url(self) -> str: ...

    @property
    def ours(self) -> bool:
        """Whether it is ours to kill, pause and probe with generations."""
        ...

    def pid(self) -> int | None:
        """Its process on this node, when it is ours and there is one."""
        ...

    async def wait(self) -> str:
        """Returns why it ended, when it has."""
        ...

    def kill(self) -> None:
        """Ends all of it at once; does nothing to what is not ours."""
        ...

    async def aclose(self) -> None:
        """Ends what is ours, and returns when it is gone. Twice is once."""
        ...
