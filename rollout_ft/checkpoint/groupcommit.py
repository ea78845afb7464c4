"""Group commit: everything that waits for the disk goes into its next write.

Owns the one thread that writes, and who is told when. Knows nothing of records. A write is one fdatasync, however many
callers share it.

The subtle invariant: a caller is answered behind every write that was begun before it came, also when it has nothing
to write: what it found in memory may still be on its way to the disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rollout_ft.checkpoint.journal import Journal
from rollout_ft.checkpoint.records import Place, Record

T = TypeVar("T")


class GroupCommit:
    """A journal behind an event loop."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._waiting: list[tuple[Sequence[Record], asyncio.Future[list[Place]]]] = []
        self._writing: asyncio.Task[None] | None = None
        self.broken: Exception | None = None
        self.writes = 0

    async def commit(self, records: Sequence[Record]) -> list[Place]:
        """Where they are, now that they are on disk. Raises what the journal raised (OSError): from then on nothing is."""
        if self.broken is not None:
            raise self.broken
        idle = self._writing is None or self._writing.done()
        if idle and not records:
            return []
        done: asyncio.Future[list[Place]] = asyncio.get_running_loop().create_future()
        self._waiting.append((records, done))
        if idle:
            self._writing = asyncio.create_task(self._write())
        return await done

    async def read(self, places: Sequence[Place]) -> list[bytes]:
        """Payloads that are on disk, read by the thread that may delete their file. Raises JournalDamaged or OSError."""
        return await self._in_thread(lambda: self._journal.read(places))

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            records = [record for some, _ in batch for record in some]
            try:
                places = await self._in_thread(lambda records=records: self._journal.write(records)) if records else []
            except Exception as error:
                self.broken = error
                for _, done in [*batch, *self._waiting]:
                    _fail(done, error)
                self._waiting.clear()
                return
            self.writes += bool(records)
            at = 0
            for some, done in batch:
                if not done.done():
                    done.set_result(places[at : at + len(some)])
                at += len(some)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        self._thread.shutdown()
        self._journal.close()


def _fail(done: asyncio.Future[list[Place]], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
        done.exception()  # a caller that was cancelled does not look at it
