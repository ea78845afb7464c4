"""A sandbox of SWE-ReX as the environment of a trial: `trial.environment: rollout_ft.integrations.swe_rex:sandbox`.

Owns the deployment of one attempt, which is SWE-ReX's own (docker, modal, fargate, remote, local), and a shell in it. Its calls
block, some of them for as long as a command takes: each sandbox has a thread and an event loop of its own. None of the
deployments can save a state and go on with it elsewhere, so that it is `restart_only`: a new one takes the recorded steps again.

A task may have

    deployment     SWE-ReX's own config, such as {"type": "docker", "image": "…"}; a local one unless it is there
    files          path → text, from the directory in which the shell begins
    setup          a command that is run before anything else; a sandbox in which it fails is lost
"""

# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# SWE-ReX is in an environment of its own.

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar, get_args

import aiohttp
import orjson
import pexpect  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
from pydantic import ValidationError
from swerex.deployment.config import DeploymentConfig, LocalDeploymentConfig  # pyright: ignore[reportMissingImports]
from swerex.deployment.hooks.abstract import DeploymentHook  # pyright: ignore[reportMissingImports]
from swerex.exceptions import (  # pyright: ignore[reportMissingImports]
    BashIncorrectSyntaxError,
    CommandTimeoutError,
    DeploymentNotStartedError,
    DeploymentStartupError,
    SessionDoesNotExistError,
)
from swerex.runtime.abstract import (  # pyright: ignore[reportMissingImports]
    BashAction,
    BashInterruptAction,
    CloseBashSessionRequest,
    CreateBashSessionRequest,
    WriteFileRequest,
)

from rollout_ft.disk import remove_tree
from rollout_ft.errors import BadTask
from rollout_ft.trial.environment import Ability, EnvironmentLost
from rollout_ft.trial.sandbox import MAX_OUTPUT_BYTES
from rollout_ft.types import JSON

TIMEOUT_S, MAX_TIMEOUT_S = 60.0, 240.0
"""Of a command that names none, and at most: SWE-ReX's client gives up behind 300."""
SHELL_S, ALIVE_S, STOP_S = 15.0, 5.0, 20.0
_GONE = (aiohttp.ClientError, OSError, DeploymentNotStartedError, DeploymentStartupError)
_SHELL_ENDED = (pexpect.EOF, SessionDoesNotExistError)
T = TypeVar("T")


def sandbox(task: JSON, trial_id: str, directory: Path) -> SweRex:
    return SweRex(config_of(task.get("deployment") or {}), directory, task.get("files") or {}, task.get("setup") or "")


def config_of(deployment: JSON) -> Any:
    """SWE-ReX's own. Raises BadTask."""
    kinds: dict[str, Any] = {each.__name__.removesuffix("DeploymentConfig").lower(): each for each in get_args(DeploymentConfig)}
    kind = deployment.get("type", "local")
    if kind not in kinds:
        raise BadTask(f"deployment: there is no type {kind!r}; SWE-ReX has {', '.join(sorted(kinds))}")
    try:
        return kinds[kind](**{k: v for k, v in deployment.items() if k != "type"})
    except ValidationError as e:
        first = e.errors()[0]
        raise BadTask(f"deployment: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


class SweRex:
    """Actions: `{"command": …, "timeout_s"?: …}`, in one shell. Results: `{output, exit_code, timed_out, shell_ended, truncated_bytes}`.

    Behind a command that ends its shell, or takes too long and is stopped, there is another shell in the same sandbox, where the
    first began. `ROLLOUT_FT_TOOL_KEY` is the step's idempotency key."""

    ability = Ability.RESTART_ONLY

    def __init__(self, config: Any, directory: Path, files: dict[str, str], setup: str):
        self._config, self._directory, self._files, self._setup = config, directory, files, setup
        self._deployment: Any = None
        self._thread: _Thread | None = None
        self._mine = uuid.uuid4().hex[:8]
        self._live = directory / f"live-{self._mine}"
        self._note = directory / f"container-{self._mine}"

    async def start(self) -> None:
        self._thread = _Thread()
        await self._on_thread(self._start())

    async def step(self, action: JSON, key: str) -> JSON:
        command, timeout_s = action.get("command"), action.get("timeout_s", TIMEOUT_S)
        if not isinstance(command, str) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= MAX_TIMEOUT_S:
            return {"error": f"an action of this sandbox is an object with a command, and a timeout_s of at most {MAX_TIMEOUT_S:g}"}
        return await self._on_thread(self._run(f"export ROLLOUT_FT_TOOL_KEY={key}\n{command}", timeout_s))

    async def stop(self) -> None:
        thread, self._thread = self._thread, None
        try:
            if thread is not None:
                await thread.run(self._stop())
        finally:
            if thread is not None:
                thread.end()
            await asyncio.to_thread(self._clean, mine=True)

    async def snapshot(self) -> str:
        raise NotImplementedError("no deployment of SWE-ReX can save a state")

    async def restore(self, snapshot: str) -> None:
        raise EnvironmentLost(f"there is no snapshot {snapshot!r}: no deployment of SWE-ReX can save a state")

    async def forget(self, snapshot: str) -> None:
        return None

    async def _on_thread(self, work: Coroutine[Any, Any, T]) -> T:
        """What says that the sandbox does not answer any more becomes EnvironmentLost."""
        if self._thread is None:
            work.close()
            raise EnvironmentLost("the sandbox was stopped")
        try:
            return await self._thread.run(work)
        except _GONE as e:
            raise EnvironmentLost(f"SWE-ReX: {type(e).__name__}: {e}"[:500]) from e

    # -- on its own thread ----------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._clean(mine=False)
        deployment = self._deployment = self._config.get_deployment()
        deployment.add_hook(_Hook(self))
        try:
            await deployment.start()
        except RuntimeError as e:  # so it says that the container has ended
            raise EnvironmentLost(f"SWE-ReX: {e}"[:500]) from e
        await self._open_shell()
        for path, text in self._files.items():
            await deployment.runtime.write_file(WriteFileRequest(path=f"{self._home}/{path}", content=text))
        if self._setup:
            done = await self._run(self._setup, MAX_TIMEOUT_S)
            if done["exit_code"] != 0:
                raise EnvironmentLost(f"setup: exit code {done['exit_code']}: {done['output'][-400:]}")

    async def _open_shell(self) -> None:
        await self._deployment.runtime.create_session(CreateBashSessionRequest(startup_timeout=SHELL_S))
        if isinstance(self._config, LocalDeploymentConfig):
            self._live.mkdir(parents=True, exist_ok=True)
            await self._deployment.runtime.run_in_session(BashAction(command=f"cd '{self._live.resolve()}'", timeout=SHELL_S))
        self._home = (await self._deployment.runtime.run_in_session(BashAction(command="pwd", timeout=SHELL_S))).output.strip()

    async def _run(self, command: str, timeout_s: float) -> JSON:
        try:
            ran = await self._deployment.runtime.run_in_session(BashAction(command=command, timeout=timeout_s, check="silent"))
            return _said(ran.output, ran.exit_code)
        except CommandTimeoutError:
            return await self._interrupt()
        except BashIncorrectSyntaxError as e:
            return _said(str(e.extra_info.get("bash_stderr") or e), 2)  # as a shell that is given a file says it
        except _SHELL_ENDED:
            return await self._next_shell("", timed_out=False)

    async def _interrupt(self) -> JSON:
        """What the shell says of it would be part of the next command's output, were there no other shell."""
        output = ""
        with contextlib.suppress(pexpect.TIMEOUT, *_SHELL_ENDED):
            output = (await self._deployment.runtime.run_in_session(BashInterruptAction())).output.removesuffix("^")
        return await self._next_shell(output, timed_out=True)

    async def _next_shell(self, output: str, *, timed_out: bool) -> JSON:
        """Raises EnvironmentLost where it was not the shell alone that ended."""
        try:
            alive = await self._deployment.is_alive(timeout=ALIVE_S)
        except RuntimeError as e:  # so it says that the container has ended
            raise EnvironmentLost(f"SWE-ReX: {e}"[:500]) from e
        if not alive:
            raise EnvironmentLost(f"SWE-ReX: {alive.message}"[:500])
        with contextlib.suppress(*_SHELL_ENDED):
            await self._deployment.runtime.close_session(CloseBashSessionRequest())
        await self._open_shell()
        return _said(output, None, timed_out=timed_out, shell_ended=True)

    async def _stop(self) -> None:
        """A runtime that does not answer must not keep its container: that has its own end in `_clean`."""
        deployment, self._deployment = self._deployment, None
        if deployment is not None:
            with contextlib.suppress(*_GONE):
                async with asyncio.timeout(STOP_S):
                    await deployment.stop()
            deployment.stop = _nothing  # it would be stopped again when it is collected, on whatever loop runs then

    # -- what is left ---------------------------------------------------------------------------------------------

    def noted(self) -> None:
        """A container is being started: whoever comes later must be able to end it."""
        name = getattr(self._deployment, "container_name", None)
        if name and not self._note.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            self._note.write_bytes(orjson.dumps([self._config.container_runtime, name]))

    def _clean(self, *, mine: bool) -> None:
        """Ends and removes what this sandbox has left, or what those of dead attempts have."""
        for note in [self._note] if mine else list(self._directory.glob("container-*")):
            if note.exists():
                with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):  # a torn note is none
                    runtime, name = orjson.loads(note.read_bytes())
                    subprocess.run([runtime, "rm", "--force", name], capture_output=True, timeout=STOP_S, check=False)
                note.unlink(missing_ok=True)
        for live in [self._live] if mine else list(self._directory.glob("live-*")):
            remove_tree(live)
        with contextlib.suppress(OSError):
            self._directory.rmdir()


async def _nothing() -> None:
    return None


class _Hook(DeploymentHook):  # pyright: ignore[reportUntypedBaseClass]
    def __init__(self, sandbox: SweRex):
        self._sandbox = sandbox

    def on_custom_step(self, message: str) -> None:
        self._sandbox.noted()


class _Thread:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, daemon=True, name="swe-rex").start()

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)


def _said(output: str, exit_code: int | None, *, timed_out: bool = False, shell_ended: bool = False) -> JSON:
    """Without what a terminal puts around it, which is not always the same."""
    raw = output.replace("\r", "").strip("\n").encode(errors="replace")
    text = raw[:MAX_OUTPUT_BYTES].decode(errors="ignore")
    cut = max(0, len(raw) - MAX_OUTPUT_BYTES)
    return {"output": text, "exit_code": exit_code, "timed_out": timed_out, "shell_ended": shell_ended, "truncated_bytes": cut}
