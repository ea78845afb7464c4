"""A script in the environment of another package, as a process that is asked in JSON lines.

Owns the process: what it inherits, what it is asked and what it says. Knows nothing of what the lines mean. It ends with
`aclose`, or when its stdin does; a driver that reads nothing from there has to be closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "MSWEA_SILENT_STARTUP": "1", "PYTHONUNBUFFERED": "1"}


def python_of(environment: str) -> Path:
    """The interpreter of an environment that `make` has made."""
    python = ROOT / ".venvs" / environment / "bin" / "python"
    assert python.exists(), f"{python} is not there: `make test-clients` and `make test-integrations` make it"
    return python


class Driver:
    """`script` in `.venvs/{environment}`, with the package rollout_ft importable and this process's environment."""

    def __init__(self, name: str, process: asyncio.subprocess.Process):
        self.name, self.process = name, process

    @staticmethod
    async def start(environment: str, script: Path, *args: str, **env: str) -> Driver:
        inherited = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), **env}
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            python_of(environment), script, *args, stdin=pipe, stdout=pipe, env=inherited, limit=2**24
        )  # fmt: skip
        return Driver(environment, process)

    async def tell(self, what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        await self.process.stdin.drain()

    async def hear(self) -> dict[str, Any]:
        """The next object that it says. Raises EOFError when it has ended."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if line.startswith(b"{"):  # libraries print what they like
                return json.loads(line)
        raise EOFError(f"the driver of {self.name} ended; its words are above")

    async def ask(self, what: Any) -> dict[str, Any]:
        """One object there, one back."""
        await self.tell(what)
        return await self.hear()

    async def converse(self, what: Any) -> AsyncGenerator[dict[str, Any]]:
        """All that it says to this, up to an empty object."""
        await self.tell(what)
        while said := await self.hear():
            yield said

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def aclose(self) -> None:
        self.kill()
        await self.process.wait()
