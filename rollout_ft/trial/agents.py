"""Agents: what runs an attempt, and how its end is told apart.

Owns the agent's process and its result. Knows nothing of trials' restarts. An agent that ends without a word was
killed; one that raises says what, and whether that is what a client raises when the infrastructure fails it. None
outlives the process that started it.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import multiprocessing
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, Protocol, cast

import orjson

from rollout_ft.errors import ConfigError
from rollout_ft.trial.client import Session
from rollout_ft.trial.policy import AttemptEnd, Blame, End
from rollout_ft.types import JSON

_TERMINATED = {-signal.SIGTERM, 128 + signal.SIGTERM, 255}
"""Exit codes of a process that was asked to end: by itself, below a shell, and when the one it was forked from was asked as well."""
_END_S = 1.0
_END_BYTES = 65_536
BLAME: dict[Blame, set[str]] = {
    Blame.INFRA: {"APIConnectionError", "APITimeoutError", "InternalServerError", "ServiceUnavailableError", "Timeout"},
    Blame.ENVIRONMENT: {"EnvironmentLost"},
    Blame.DATA: {"BadTask"},
}
"""By the names of what is raised; infrastructure: by the openai, anthropic and litellm clients after their own retries."""
_LIMITS = ("maximum context length", "(session.max_turns)", "(session.max_tokens)", "(session.max_steps)")
"""In what a client raises when a conversation may not go on."""


class Agent(Protocol):
    async def run(self, task: JSON, session: Session) -> AttemptEnd: ...


class InlineAgent:
    """An async function of (task, session), in this process. It returns the reward, `{"reward": …}`, or None."""

    def __init__(self, function: Callable[[JSON, Session], Awaitable[Any]]):
        self._function = function

    async def run(self, task: JSON, session: Session) -> AttemptEnd:
        try:
            return AttemptEnd(End.RETURNED, reward_of(await self._function(task, session)))
        except asyncio.CancelledError as e:
            task_of_ours = asyncio.current_task()
            if task_of_ours is not None and task_of_ours.cancelling():
                raise
            return raised(e)  # of something that the agent itself has cancelled
        except Exception as e:
            return raised(e)


class ProcessAgent:
    """A function `module:name` of (task, base_url, api_key), each attempt in a process of its own.

    The processes are forked from one that has imported the module already: an import of half a second is paid once.
    """

    def __init__(self, entrypoint: str):
        self._entrypoint = entrypoint
        module, _ = resolve(entrypoint)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([module.__name__, __name__, *_imported_by_main()])
        self._running: dict[str, Any] = {}

    async def run(self, task: JSON, session: Session) -> AttemptEnd:
        receive, send = self._context.Pipe(duplex=False)
        args = (send, self._entrypoint, task, variables(session))
        process = self._context.Process(target=_main, args=args, daemon=True)
        await asyncio.to_thread(process.start)
        send.close()
        self._running[session.trial_id] = process
        try:
            said = await _line(receive.fileno())
            if said:
                return _told(said)
            await asyncio.to_thread(process.join)
            return await died(process.exitcode)
        finally:
            self._running.pop(session.trial_id, None)
            process.kill()
            receive.close()
            await asyncio.shield(asyncio.to_thread(_reap, process))

    def close(self) -> None:
        """Ends the process that the agents are forked from."""
        forkserver._forkserver._stop()  # pyright: ignore - it would end only with this process

    def kill(self, trial_id: str) -> bool:
        """Kills the agent of a trial, as a node that goes away does; False when none runs."""
        process = self._running.get(trial_id)
        if process is None or process.pid is None:
            return False
        os.kill(process.pid, signal.SIGKILL)
        return True


def _imported_by_main() -> list[str]:
    """The modules behind the names in the parent's main module. Each child runs that one again, where it is a script or a module
    with a name of its own, and would import them again if the fork server had not."""
    main = sys.modules["__main__"]
    if main.__spec__ is not None and main.__spec__.name.endswith("__main__"):
        return []
    named = [getattr(each, "__module__", None) or getattr(each, "__name__", None) for each in vars(main).values()]
    return sorted({name for name in named if isinstance(name, str)} & sys.modules.keys() - {"__main__"})


def _reap(process: Any) -> None:
    process.join()
    process.close()


def resolve(entrypoint: str, key: str = "trial.agent") -> tuple[Any, Callable[..., Any]]:
    """The module and the function that `module:name` names, as the value of `key`. Raises ConfigError."""
    module_name, _, name = entrypoint.partition(":")
    try:
        module = importlib.import_module(module_name)
        return module, getattr(module, name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"{key}: {entrypoint!r} cannot be imported ({e}); write it as module:function") from None


def variables(session: Session) -> dict[str, str]:
    """Where the clients look for their server and their key. Anthropic's add `/v1` themselves."""
    base_url, api_key = session.base_url, session.api_key
    anthropic = base_url.removesuffix("/v1")
    return {
        "OPENAI_BASE_URL": base_url, "OPENAI_API_BASE": base_url, "OPENAI_API_KEY": api_key,
        "ANTHROPIC_BASE_URL": anthropic, "ANTHROPIC_API_KEY": api_key, "ANTHROPIC_AUTH_TOKEN": api_key,
        "ROLLOUT_FT_TRIAL_ID": session.trial_id, "ROLLOUT_FT_ATTEMPT": str(session.attempt),
        **({"ROLLOUT_FT_ENVIRONMENT_URL": session.environment_url} if session.environment_url else {}),
        **({"TRACEPARENT": session.traceparent} if session.traceparent else {}),
    }  # fmt: skip


def reward_of(result: Any) -> float | None:
    if isinstance(result, dict):
        result = cast(JSON, result).get("reward")
    return None if result is None else float(result)


async def died(code: int | None) -> AttemptEnd:
    """The end of an attempt whose process ended without a word."""
    if code in _TERMINATED:
        await asyncio.sleep(_END_S)  # `ray job stop` asks every process of a run to end: that is no fault of the trial
    how = "was killed" if code is None else f"ended with exit code {code}"
    return AttemptEnd(End.DIED, cause=f"the agent's process {how}")


def raised(e: BaseException) -> AttemptEnd:
    """The end of an attempt whose agent raised."""
    words = f"{type(e).__name__}: {e}"
    return ended_by({c.__name__ for c in type(e).__mro__}, words, words[:500])


def ended_by(names: set[str], words: str, cause: str) -> AttemptEnd:
    """The end of an attempt whose agent raised what has these names, and said these words."""
    limited = "ContextWindowExceededError" in names or any(limit in words for limit in _LIMITS)
    blame = next((blame for blame, known in BLAME.items() if known & names), Blame.AGENT)
    return AttemptEnd(End.LIMITED if limited else End.RAISED, cause=cause, blame=blame)


def _main(send: Connection, entrypoint: str, task: JSON, env: dict[str, str]) -> None:
    """The agent's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_reader, args=(send.fileno(),), daemon=True).start()
    os.environ |= env
    try:
        _, function = resolve(entrypoint)
        result = function(task, env["OPENAI_BASE_URL"], env["OPENAI_API_KEY"])
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
        end = AttemptEnd(End.RETURNED, reward_of(result))
    except Exception as e:
        if os.environ.get("ROLLOUT_FT_AGENT_TRACEBACK"):
            traceback.print_exc(file=sys.stderr)
        end = raised(e)
    with open(send.fileno(), "wb", closefd=False) as told:
        told.write(orjson.dumps(end) + b"\n")
    send.close()


def _end_with_reader(fd: int) -> None:
    """Ends this process when nobody is left who waits for what it sends."""
    poll = select.poll()
    poll.register(fd, 0)  # an error is always reported
    poll.poll()
    os._exit(1)


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _told(line: bytes) -> AttemptEnd:
    """The end that an agent's process tells of, if it is one."""
    try:
        told: JSON = orjson.loads(line)
        return AttemptEnd(End(told["end"]), reward_of(told), str(told["cause"]), Blame(told["blame"]))
    except (ValueError, TypeError, KeyError) as e:
        return AttemptEnd(End.RAISED, cause=f"what the agent's process said of its end is nothing that one says: {e!r}"[:500])


async def _line(fd: int) -> bytes:
    """What is written to a pipe before a newline; nothing where it ends without one. Whoever writes may be hostile: no part of it
    is waited for with the loop, and no more is taken than an end has."""
    loop, said = asyncio.get_running_loop(), bytearray()
    ended: asyncio.Future[None] = loop.create_future()

    def read() -> None:
        try:
            chunk = os.read(fd, _END_BYTES)
        except BlockingIOError:
            return
        said.extend(chunk)
        if (not chunk or b"\n" in chunk or len(said) > _END_BYTES) and not ended.done():
            ended.set_result(None)

    os.set_blocking(fd, False)
    loop.add_reader(fd, read)
    try:
        await ended
    finally:
        loop.remove_reader(fd)
    line, newline, _ = said.partition(b"\n")
    return bytes(line) if newline else b""
