"""The load of `bench store`: sessions that commit turns, into our store and into what one would write without it.

Owns the turns, the writers and the two things that are compared with. Knows nothing of tables. It runs in an actor of
its own, as an engine's sessions do, and the replicas have theirs.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import orjson

from rollout_ft.checkpoint import wire
from rollout_ft.checkpoint.log import Append, Entry
from rollout_ft.checkpoint.mirror import Mirror
from rollout_ft.checkpoint.ports import resolve
from rollout_ft.checkpoint.view import View
from rollout_ft.rayapi import ray
from rollout_ft.session.entries import encode_entry
from rollout_ft.types import Turn, VersionSpan

TEXT_BYTES_PER_TOKEN = 4
TAKEOVERS_AT_ONCE = 16
Commit = Callable[[str, int], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Size:
    """A turn: new tokens of its request, tokens of its reply."""

    tokens_in: int
    tokens_out: int

    @property
    def tokens(self) -> int:
        return self.tokens_in + self.tokens_out


@dataclass(frozen=True, slots=True)
class Taken:
    """`sent` bytes of all commits, to one replica."""

    seconds: float
    latencies_ms: list[float]
    sent: int


def turn(size: Size) -> tuple[Turn, int]:
    """A turn of noise, and how many bytes of it are data: tokens, logprobs, texts."""
    said = [os.urandom(n * TEXT_BYTES_PER_TOKEN // 2).hex() for n in (size.tokens_in, size.tokens_out)]
    messages, reply = orjson.dumps([{"role": "user", "content": said[0]}]), orjson.dumps({"role": "assistant", "content": said[1]})
    ids = [os.urandom(4 * n) for n in (size.tokens_in, size.tokens_out, size.tokens_out)]
    made = Turn(
        key=os.urandom(16).hex(), parent=os.urandom(16).hex(), sample=0, depth=1, request_id=os.urandom(16).hex(),
        messages=messages, tools=b"", prompt_ids=ids[0], output_ids=ids[1], logprobs=ids[2],
        version_spans=(VersionSpan("v0", 0, size.tokens_out),), sampling=orjson.dumps({"max_new_tokens": 8192, "temperature": 1.0}),
        finish_reason="stop", reply=reply, created=1, generations=1,
    )  # fmt: skip
    return made, len(messages) + len(reply) + sum(map(len, ids))


class Dictionary:
    """What one writes first: an actor with a dictionary. A call a turn, one copy, nobody is fenced."""

    def __init__(self) -> None:
        self._trials: dict[str, list[bytes]] = {}

    async def append(self, trial_id: str, payload: bytes) -> int:
        self._trials.setdefault(trial_id, []).append(payload)
        return len(self._trials[trial_id])

    async def put(self, trial_id: str, snapshot: bytes) -> None:
        self._trials[trial_id] = [snapshot]


class Writer:
    """Sessions, as one engine actor holds them: `turns` turns of `size` a trial, then the next trial."""

    def __init__(self, namespace: str, size: Size, turns: int) -> None:
        self._namespace, self._turns = namespace, turns
        made = [turn(size) for _ in range(turns)]
        self._entries = [encode_entry(each)[1] for each, _ in made]
        self._raw = sum(raw for _, raw in made) // turns
        self._mirror: Mirror | None = None

    async def raw_bytes(self) -> int:
        """Data of a turn, the mean."""
        return self._raw

    async def join(self, view: View) -> None:
        """Writes to this view from now on."""

        async def current() -> View:
            return view

        if self._mirror is not None:
            await self._mirror.aclose()
        self._mirror = Mirror(
            view, lambda name: resolve(name, self._namespace), current, commit_timeout_s=60, call_timeout_s=30
        )  # fmt: skip

    def _append(self, trial_id: str, seq: int) -> Append:
        return Append(trial_id, 1, 1, seq, Entry("turn", f"{trial_id}/{seq:032}", self._entries[seq]))

    async def commits(self, label: str, sessions: int, seconds: float) -> Taken:
        assert self._mirror is not None
        mirror = self._mirror
        taken = await self._load(label, sessions, seconds, lambda trial_id, seq: mirror.commit(self._append(trial_id, seq)))
        sent = [len(wire.join([wire.encode_append(self._append(label, seq))])) for seq in range(self._turns)]
        return Taken(taken.seconds, taken.latencies_ms, len(taken.latencies_ms) * sum(sent) // len(sent))

    async def calls(self, label: str, sessions: int, seconds: float, actor: Any) -> Taken:
        """Into a plain dictionary."""
        return await self._load(label, sessions, seconds, lambda t, seq: actor.append.remote(t, self._entries[seq]))

    async def snapshots(self, label: str, sessions: int, seconds: float, actor: Any) -> Taken:
        """All that the session has so far, with every turn; sessions are of every length at any time."""
        whole = [b"".join(self._entries[: seq + 1]) for seq in range(self._turns)]
        return await self._load(label, sessions, seconds, lambda t, seq: actor.put.remote(t, whole[seq]), whole, spread=True)

    async def _load(
        self, label: str, sessions: int, seconds: float, commit: Commit, sizes: list[bytes] | None = None, *, spread: bool = False
    ) -> Taken:
        latencies: list[float] = []
        sent = 0
        began = perf_counter()

        async def session(number: int) -> None:
            nonlocal sent
            life, seq = 0, number * 13 % self._turns if spread else 0
            while (now := perf_counter()) - began < seconds:
                await commit(f"{label}-{number}-{life}", seq)
                latencies.append(1e3 * (perf_counter() - now))
                sent += len((sizes or self._entries)[seq])
                seq = (seq + 1) % self._turns
                life += not seq

        await asyncio.gather(*(session(number) for number in range(sessions)))
        return Taken(perf_counter() - began, latencies, sent)

    async def fill(self, label: str, sessions: int, at_once: int) -> float:
        """Whole trials, every turn of them; the seconds that it took."""
        assert self._mirror is not None
        mirror, slots, began = self._mirror, asyncio.Semaphore(at_once), perf_counter()

        async def session(number: int) -> None:
            async with slots:
                for seq in range(self._turns):
                    await mirror.commit(self._append(f"{label}-{number}", seq))

        await asyncio.gather(*(session(number) for number in range(sessions)))
        return perf_counter() - began

    async def takeovers(self, label: str, sessions: int, epoch: int) -> Taken:
        """Every trial that `fill` wrote becomes another owner's, who reads and verifies all of it."""
        assert self._mirror is not None
        mirror, slots, began, latencies = self._mirror, asyncio.Semaphore(TAKEOVERS_AT_ONCE), perf_counter(), list[float]()

        async def one(number: int) -> int:
            async with slots:
                now = perf_counter()
                adopted = await mirror.takeover(f"{label}-{number}", 1, epoch)
                latencies.append(1e3 * (perf_counter() - now))
            if [entry.payload for entry in adopted.entries] != self._entries:
                raise AssertionError(f"{label}-{number} came back as something else")
            return sum(map(len, self._entries))

        read = await asyncio.gather(*(one(number) for number in range(sessions)))
        return Taken(perf_counter() - began, latencies, sum(read))


def writer(namespace: str, size: Size, turns: int) -> Any:
    return ray.remote(num_cpus=0, max_concurrency=1000)(Writer).remote(namespace, size, turns)


def dictionary() -> Any:
    return ray.remote(num_cpus=0, max_concurrency=1000)(Dictionary).remote()
