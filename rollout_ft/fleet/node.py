"""The process that an actor is, and where it runs.

Owns what Ray knows of its own node, two lookups without a public name in a worker among them: its address (not the one
that a route to the outside would have) and its log directory; and how a process that serves for weeks keeps its memory
and its core.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
from collections.abc import Callable
from typing import Any

from rollout_ft.rayapi import ray


def node_ip(loopback: bool) -> str:
    """The address under which the other actors of the run reach this node."""
    return "127.0.0.1" if loopback else str(ray._private.worker.global_worker.node_ip_address)


def node_id() -> str:
    """Ray's id of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def assigned_gpus() -> tuple[str, ...]:
    """The GPUs of this node that Ray assigned to this process."""
    assigned: Any = ray.get_runtime_context().get_accelerator_ids()
    return tuple(str(gpu) for gpu in assigned.get("GPU", ()))


def logs_dir() -> str:
    """Where Ray's dashboard looks for logs."""
    return str(ray._private.worker._global_node.get_logs_dir_path())


TRIM_S = 5.0
_trimming: set[asyncio.Task[None]] = set()


def settle() -> None:
    """Called on the thread that serves, once everything is imported and made: what is here now stays, and is never
    looked through again.

    By default every 700 new objects begin a collection, which is an eighth of the CPU of a turn. Bodies and prompts of
    hundreds of kB leave holes that the allocator keeps, more than twice what a session needs; it is asked for them.
    Where cores are scarce, a thread that is woken would interrupt another of ours in the middle of a turn, and both go on
    with cold caches, which costs an eighth of the CPU: as a batch it waits for the other's end. A container may forbid to
    say so, and a system may not know it.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        task = asyncio.create_task(_trim(trim))
        _trimming.add(task)
        task.add_done_callback(_trimming.discard)


async def _trim(trim: Callable[[int], int]) -> None:
    while True:
        await asyncio.sleep(TRIM_S)
        await asyncio.to_thread(trim, 0)
