"""A command's work, from its start to its end or its interruption.

Owns the signals while it goes on, and where the output of others goes then. Does not know what is done. An interruption is a
cancellation: the work ends what it started, and this returns after that.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import typer


def run(work: Coroutine[Any, Any, Any], json: bool = False, loop: Callable[[], asyncio.AbstractEventLoop] | None = None) -> Any:
    """Runs it to its end; SIGINT and SIGTERM cancel it, so that everything it started is ended, and make it None. With `json` what Ray
    says on the way does not go where the result does."""

    async def cancellable() -> Any:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            return await task
        return None

    aside = contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext()
    with aside, asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(cancellable())


def result(work: Coroutine[Any, Any, Any], json: bool = False, loop: Callable[[], asyncio.AbstractEventLoop] | None = None) -> Any:
    """Of work that has one; without one, which is after a signal, the command exits with 1."""
    made = run(work, json, loop)
    if made is None:
        raise typer.Exit(1)
    return made
