"""Agents that are a program: whatever can be started, in whatever language, and reads its server from its environment.

Owns what an attempt's program is given and how its end is read. Knows nothing of trials' restarts. The program finds

    OPENAI_BASE_URL, OPENAI_API_BASE, OPENAI_API_KEY               its session, for OpenAI's clients and litellm
    ANTHROPIC_BASE_URL, ANTHROPIC_API_KEY, ANTHROPIC_AUTH_TOKEN    the same, for Anthropic's
    ROLLOUT_FT_TRIAL_ID, ROLLOUT_FT_ATTEMPT                        who it is; the trial's id stays, the attempt counts from 1
    ROLLOUT_FT_TASK                                                a JSON file with its task
    ROLLOUT_FT_RESULT                                              where it may write {"reward": 0.5} or {"error": "…"}
    ROLLOUT_FT_DIR                                                 a directory of its own
    ROLLOUT_FT_ENVIRONMENT_URL                                     where its tools are asked, if the run has environments

That directory is empty when an attempt begins and gone when it has ended, and every attempt of a trial finds it at the same
path: a sandbox in there starts anew, and what its tools print of it does not differ when an agent's replay runs them again.

It runs under the engines' guard: when it ends, or whoever started it does, all that descends from it is killed before
anything follows.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import orjson

from rollout_ft.config import TrialConfig
from rollout_ft.disk import remove_tree
from rollout_ft.engine.process import EngineProcess
from rollout_ft.errors import ConfigError
from rollout_ft.trial.agents import BLAME, ProcessAgent, died, ended_by, reward_of, variables
from rollout_ft.trial.client import Session
from rollout_ft.trial.policy import AttemptEnd, End
from rollout_ft.types import JSON

TAIL_BYTES = 16 * 2**10
"""How much of what it prints is kept."""
RESULT_BYTES = 2**20
CAUSE_CHARACTERS = 500
_KILLED = {137, 143}
"""What a shell, or docker, makes of a program that was killed or asked to end."""
_NAMES = "|".join(sorted(name for names in BLAME.values() for name in names))
_RAISED = re.compile(rf"^(?:[\w.]+\.)?({_NAMES})(?::|\s*$)", re.MULTILINE)
_TRACEBACK = "Traceback (most recent call last)"


class CommandAgent:
    """A program and its arguments; each attempt is a process group of its own.

    `directory` is where attempts have theirs, for this agent alone: one that is removed with it, unless it is given.
    """

    def __init__(self, argv: Sequence[str], directory: Path | None = None):
        if not argv or shutil.which(argv[0]) is None:
            raise ConfigError(f"trial.command: there is no program {argv[0] if argv else ''!r} that can be run")
        self._argv = list(argv)
        self._made = None if directory else tempfile.TemporaryDirectory(prefix="rollout-ft-attempts-", ignore_cleanup_errors=True)
        self._directory = directory or Path(cast(Any, self._made).name)
        self._running: dict[str, EngineProcess] = {}

    async def run(self, task: JSON, session: Session) -> AttemptEnd:
        files = Files(self._directory / session.trial_id)
        try:
            await asyncio.to_thread(files.make, task)
            code, output = await self._ran(session, files)
            return await _end(code, files, output)
        finally:
            await asyncio.shield(asyncio.to_thread(files.remove))

    async def _ran(self, session: Session, files: Files) -> tuple[int | None, str]:
        """Its exit code, None when it was killed whole, and the end of what it printed; nothing of it is left then."""
        read, write = os.pipe()
        printed = asyncio.create_task(_tail(read))
        try:
            process = await EngineProcess.start(self._argv, {**os.environ, **files.environment(session)}, write)
            self._running[session.trial_id] = process
            try:
                code = (await process.wait()).code
            finally:
                self._running.pop(session.trial_id, None)
                await process.aclose()
        finally:
            output = await asyncio.shield(printed)
        return code, output

    def kill(self, trial_id: str) -> bool:
        """Kills all of a trial's attempt, as a node that goes away does; False when none runs."""
        process = self._running.get(trial_id)
        if process is None:
            return False
        process.kill()
        return True

    def close(self) -> None:
        """Removes what it made for all attempts."""
        if self._made:
            self._made.cleanup()


class Files:
    """What an attempt reads and writes: all under one path, which is that of the trial's other attempts as well."""

    def __init__(self, path: Path):
        self._path, self._own = path, path / "own"
        self.task, self.result = path / "task.json", path / "result.json"

    def make(self, task: JSON) -> None:
        self.remove()  # a process that was killed left it
        self._path.mkdir(parents=True, mode=0o700)
        self._own.mkdir()
        self.task.write_bytes(orjson.dumps(task))

    def remove(self) -> None:
        remove_tree(self._path)

    def environment(self, session: Session) -> dict[str, str]:
        files = {"ROLLOUT_FT_TASK": str(self.task), "ROLLOUT_FT_RESULT": str(self.result), "ROLLOUT_FT_DIR": str(self._own)}
        return variables(session) | files

    def read(self) -> JSON:
        """What it said. Raises ValueError for what is no result."""
        if not os.path.lexists(self.result):
            return {}
        if not self.result.is_file():  # a named pipe would never end
            raise ValueError("it is no file")
        with self.result.open("rb") as file:
            data = file.read(RESULT_BYTES + 1)
        if len(data) > RESULT_BYTES:
            raise ValueError(f"it has more than {RESULT_BYTES} bytes")
        result: Any = orjson.loads(data)
        if not isinstance(result, dict) or not isinstance(result.get("reward"), (int, float, type(None))):  # pyright: ignore[reportUnknownMemberType]
            raise ValueError('it has to be an object such as {"reward": 0.5}')
        return result  # pyright: ignore[reportUnknownVariableType]


async def _end(code: int | None, files: Files, output: str) -> AttemptEnd:
    if code is None or code < 0 or code in _KILLED:
        return await died(code)
    if code > 0:
        return failed(f"exit code {code}: ", output)
    try:
        result = files.read()
    except (ValueError, OSError) as e:
        return failed("", f"what it wrote to ROLLOUT_FT_RESULT is no result: {e}")
    if result.get("error"):
        return failed("", str(result["error"]))
    return AttemptEnd(End.RETURNED, reward_of(result))


def failed(how: str, words: str) -> AttemptEnd:
    """The end of an attempt whose program says that it failed. Of several tracebacks the last is what it ended with: an
    error that was caught, and told of, is not."""
    words = words.strip()
    raised = _RAISED.search(words.rpartition(_TRACEBACK)[2])
    return ended_by({raised[1]} if raised else set(), words, how + words[-CAUSE_CHARACTERS:])


async def _tail(descriptor: int) -> str:
    """The end of what is written to a pipe, which is read to its end so that nobody who writes has to wait."""
    reader = asyncio.StreamReader()
    with os.fdopen(descriptor, "rb") as pipe:
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
        try:
            kept = b""
            while chunk := await reader.read(2**16):
                kept = (kept + chunk)[-TAIL_BYTES:]
            return kept.decode(errors="replace")
        finally:
            transport.close()


def agent_of(config: TrialConfig, directory: Path) -> ProcessAgent | CommandAgent:
    """What runs the attempts of a run, which has this directory. Raises ConfigError where nothing can."""
    return CommandAgent(config.command, directory / "attempts") if config.command else ProcessAgent(config.agent)
