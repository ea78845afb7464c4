"""A store that commits, releases and says what was acknowledged, until it is killed; run by the journal's kill tests.

`python journal_child.py FOLDER SEED [POINT NUMBER]`: ends itself with SIGKILL when the journal reaches POINT (or, with
`any`, some point) for the NUMBERth time; with `torn`, in the middle of the NUMBERth write to a file, at a byte that the
seed chooses. Every line that it prints was acknowledged before.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Callable

from rollout_ft import disk
from rollout_ft.checkpoint import journal, manifest, wire
from rollout_ft.checkpoint.log import Append, Entry
from rollout_ft.checkpoint.store import Store
from rollout_ft.checkpoint.view import View

SEGMENT_BYTES = 30_000
TRIALS = 4


def payload(trial_id: str, seq: int) -> bytes:
    """What entry `seq` of a trial is, whoever asks."""
    rng = random.Random(f"{trial_id}/{seq}")
    return rng.randbytes(rng.randint(0, 3000))


def say(*words: object) -> None:
    """One write: a line is there whole or not at all."""
    os.write(1, " ".join(map(str, words)).encode() + b"\n")


class Killer:
    """Ends the process at a point of the journal."""

    def __init__(self, point: str, number: int) -> None:
        self._point, self._left = point, number

    def __call__(self, point: str) -> None:
        if self._point in (point, "any"):
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


def tear(rng: random.Random, number: int) -> Callable[[int, bytes], None]:
    """Writes whole, but for the one in whose middle the process ends."""
    left = number

    def write_all(file: int, data: bytes) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.write(file, data[: rng.randrange(len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        disk.write_all(file, data)

    return write_all


async def live(store: Store, rng: random.Random, name: int) -> None:
    """One trial after the other: a few entries each, and most of them collected."""
    number = 0
    while True:
        trial_id, number = f"{name}-{number}", number + 1
        turns = rng.randint(1, 12)
        for seq in range(turns):
            entry = Entry("turn", f"key-{seq}", payload(trial_id, seq))
            batch = wire.join([wire.encode_append(Append(trial_id, 1, 1, seq, entry))])
            if wire.decode_results(await store.append_many(1, batch)) != [None]:
                raise AssertionError(f"{trial_id} {seq} was refused")
            say("kept", trial_id, seq)
        if rng.random() < 0.8:
            await store.release(trial_id, trial_id.encode())
            say("released", trial_id)


async def main(folder: str, seed: int) -> None:
    store = Store("a", View(1, ("a",), 1), folder)
    async with asyncio.TaskGroup() as group:
        for name in range(TRIALS):
            group.create_task(live(store, random.Random(seed * 1000 + name), name))


if __name__ == "__main__":
    journal.SEGMENT_BYTES = SEGMENT_BYTES
    if len(sys.argv) > 3:
        point, number = sys.argv[3], int(sys.argv[4])
        journal.Journal.reached = staticmethod(Killer(point, number))
        if point == "torn":
            journal.write_all = manifest.write_all = tear(random.Random(int(sys.argv[2])), number)
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
