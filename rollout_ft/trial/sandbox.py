"""A sandbox on this machine: commands in a directory of its own, under a process that ends all of them.

Owns the directory, the process and the snapshots, which are copies of the directory. Two directories make a trial's: `live`, which
is there while a sandbox is, and one per snapshot. It keeps trials apart and cleans up behind them; it is no wall against
code that wants out.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

import orjson

from rollout_ft.disk import remove_tree
from rollout_ft.engine.process import EngineProcess
from rollout_ft.errors import BadTask
from rollout_ft.trial.environment import Ability, EnvironmentLost
from rollout_ft.types import JSON

INIT = str(Path(__file__).with_name("sandbox_init.py"))
TIMEOUT_S, MAX_TIMEOUT_S = 60.0, 540.0
"""Of a command that names none, and at most: less than `trial.tool_timeout_s`, behind which the sandbox itself counts as lost."""
MAX_OUTPUT_BYTES = 65_536
_SNAPSHOT = re.compile(r"snapshot-[0-9a-f]{12}")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def local(task: JSON, trial_id: str, directory: Path) -> LocalSandbox:
    """What `trial.environment: rollout_ft.trial.sandbox:local` makes: the task's `files` (path → text) lie in it."""
    return LocalSandbox(directory, task.get("files") or {})


class LocalSandbox:
    """Actions: `{"command": …, "timeout_s"?: …}`. Results: `{output, exit_code, timed_out, truncated_bytes}`.

    What a command starts in the background lives until the sandbox ends, and is not in its snapshots. `ROLLOUT_FT_TOOL_KEY` is the
    step's idempotency key."""

    ability = Ability.EXPORT_RESTORE

    def __init__(
        self, directory: Path, files: Mapping[str, str], env: Mapping[str, str] | None = None, max_timeout_s: float = MAX_TIMEOUT_S
    ):
        self._directory, self._files, self._env, self._max_timeout_s = directory, files, dict(env or {}), max_timeout_s
        self._live = directory / f"live-{uuid.uuid4().hex[:8]}"
        self._process: EngineProcess | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    @property
    def path(self) -> Path:
        """Where its commands run."""
        return self._live / "work"

    def pid(self) -> int | None:
        return self._process.pid() if self._process else None

    async def start(self) -> None:
        await asyncio.to_thread(self._make, None)
        await self._begin()

    async def restore(self, snapshot: str) -> None:
        saved = self._saved(snapshot)
        if not saved.is_dir():
            raise EnvironmentLost(f"the snapshot {saved} is not there")
        await asyncio.to_thread(self._make, saved)
        await self._begin()

    async def snapshot(self) -> str:
        name = f"snapshot-{uuid.uuid4().hex[:12]}"
        await asyncio.to_thread(_copy, self.path, self._directory / name)
        return name

    async def forget(self, snapshot: str) -> None:
        await asyncio.to_thread(remove_tree, self._saved(snapshot))
        await asyncio.to_thread(_remove_if_empty, self._directory)

    def _saved(self, snapshot: str) -> Path:
        """Names come back from the checkpoint: none leads out of the directory."""
        if not _SNAPSHOT.fullmatch(snapshot):
            raise EnvironmentLost(f"{snapshot!r} is no snapshot of a local sandbox")
        return self._directory / snapshot

    async def step(self, action: JSON, key: str) -> JSON:
        command, timeout_s = action.get("command"), action.get("timeout_s", TIMEOUT_S)
        if not isinstance(command, str) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= self._max_timeout_s:
            return {"error": f"an action of this sandbox is an object with a command, and a timeout_s of at most {self._max_timeout_s:g}"}
        request = {
            "command": command, "directory": str(self.path), "env": self._environment(key), "timeout_s": timeout_s,
            "max_bytes": MAX_OUTPUT_BYTES,
        }  # fmt: skip
        assert self._writer is not None
        with contextlib.suppress(OSError):  # it cannot be heard either
            self._writer.write(orjson.dumps(request) + b"\n")
        return await self._answer()

    async def _answer(self) -> JSON:
        assert self._reader is not None
        try:
            answer = await self._reader.readline()
        except OSError as e:
            raise EnvironmentLost(f"the sandbox does not answer: {e}") from e
        if not answer.endswith(b"\n"):
            raise EnvironmentLost("the sandbox's process ended")
        return orjson.loads(answer)

    async def stop(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            await self._process.aclose()
        await asyncio.to_thread(remove_tree, self._live)
        await asyncio.to_thread(_remove_if_empty, self._directory)

    def _environment(self, key: str) -> dict[str, str]:
        home = str(self.path)
        return {"PATH": os.environ.get("PATH", PATH), "HOME": home, "LANG": "C.UTF-8", "ROLLOUT_FT_TOOL_KEY": key, **self._env}

    def _make(self, saved: Path | None) -> None:
        """The directory; what sandboxes of dead attempts have left is removed first."""
        for old in self._directory.glob("live-*"):
            remove_tree(old)
        self._live.mkdir(parents=True)
        if saved is not None:
            return _copy(saved, self.path)
        self.path.mkdir()
        for name, text in self._files.items():
            path = (self.path / name).resolve()
            if not path.is_relative_to(self.path.resolve()):
                raise BadTask(f"files: {name!r} lies outside the sandbox")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    async def _begin(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-I", "-S", INIT, str(theirs.fileno())]
            log, fds = str(self._live / "log"), (theirs.fileno(),)
            self._process = await EngineProcess.start(command, {"PATH": PATH}, log, pass_fds=fds)
        self._reader, self._writer = await asyncio.open_connection(sock=ours, limit=2**24)
        await self._answer()


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all."""
    temporary = target.with_name(target.name + ".tmp")
    remove_tree(temporary)
    try:
        subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(temporary)], check=True, capture_output=True)
    except subprocess.CalledProcessError as e:
        remove_tree(temporary)
        raise OSError(f"{source} could not be copied: {e.stderr.decode(errors='replace').strip()[:500]}") from None
    os.replace(temporary, target)


def _remove_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
