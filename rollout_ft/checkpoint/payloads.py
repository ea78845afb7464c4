"""Large payloads beside the log: what a turn has that is too much for every replica's memory.

Owns where they are kept in a replica, within a limit, and how a writer brings and fetches them. Must not know what they
are. A payload is on `copies` replicas and is not journalled: with the last of them it is gone. That costs no turn,
because nothing that is acknowledged depends on it: it is named by its digest in the turn's record, and who reads finds it
missing.

The subtle invariant: a payload is brought before its turn is committed, and is fixed by the commit. Until then the
trial's owner may put another in its place; nobody else may, and later nobody at all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

from rollout_ft.checkpoint.replicas import Replicas
from rollout_ft.checkpoint.segments import Get, Put
from rollout_ft.types import Raw

_log = logging.getLogger(__name__)
FETCHES = 4
"""At a time: what is read is held in memory twice."""
BYTES_PER_S = 16 * 2**20
"""A replica that takes less does not answer."""
SHUN_S = 10.0
"""A replica that did not answer is passed over for so long: no turn waits where another has just waited in vain."""


@dataclass(frozen=True, slots=True)
class Label:
    """Whose payload it is: the owner that brings it, the entry it belongs to, and what it hashes to."""

    trial_id: str
    attempt: int
    owner_epoch: int
    key: str
    digest: str


def encode_label(label: Label) -> bytes:
    return msgspec.msgpack.encode(label)


def decode_label(data: Raw | memoryview) -> Label:
    return msgspec.msgpack.decode(data, type=Label)


@dataclass(slots=True, eq=False)
class _Kept:
    """`ref` is None while it is being put."""

    digest: str
    size: int
    ref: Any = None


class Shelf:
    """The payloads of one replica. Their objects are its own, and die with it."""

    def __init__(self, put: Put, get: Get, limit: int) -> None:
        self._put, self._get, self._limit = put, get, limit
        self._trials: dict[str, dict[str, _Kept]] = {}
        self.used = 0

    def has(self, trial_id: str, key: str, digest: str) -> bool:
        kept = self._trials.get(trial_id, {}).get(key)
        return kept is not None and kept.ref is not None and kept.digest == digest

    async def keep(self, label: Label, payload: bytes) -> bool:
        """Takes it, in the place of one that was there; False when there is no room, or another came meanwhile."""
        self._drop(label.trial_id, label.key)
        if self.used + len(payload) > self._limit:
            return False
        trial = self._trials.setdefault(label.trial_id, {})
        trial[label.key] = kept = _Kept(label.digest, len(payload))
        self.used += kept.size
        try:
            ref = await asyncio.to_thread(self._put, [payload])
        except Exception:
            _log.exception("a payload of %d bytes could not be kept", len(payload))
            if self._trials.get(label.trial_id, {}).get(label.key) is kept:
                self._drop(label.trial_id, label.key)
            return False
        kept.ref = ref
        return self._trials.get(label.trial_id, {}).get(label.key) is kept

    async def read(self, trial_id: str, key: str, digest: str) -> bytes | None:
        kept = self._trials.get(trial_id, {}).get(key)
        return (await self._get(kept.ref))[0] if kept is not None and self.has(trial_id, key, digest) else None

    def release(self, trial_id: str) -> None:
        for key in list(self._trials.get(trial_id, ())):
            self._drop(trial_id, key)
        self._trials.pop(trial_id, None)

    def _drop(self, trial_id: str, key: str) -> None:
        kept = self._trials.get(trial_id, {}).pop(key, None)
        if kept is not None:
            self.used -= kept.size


class Payloads:
    """A writer's and a reader's access to the payloads on the replicas."""

    def __init__(self, replicas: Replicas, copies: int, *, call_timeout_s: float, fetch_timeout_s: float) -> None:
        self._replicas, self._copies = replicas, copies
        self._call_timeout_s, self._fetch_timeout_s = call_timeout_s, fetch_timeout_s
        self._bringing: dict[str, asyncio.Lock] = {}
        self._shunned: dict[str, float] = {}

    async def put(self, label: Label, payload: bytes) -> int:
        """On how many replicas it is; none is no error. A view that changes meanwhile is another chance."""
        kept: set[str] = set()
        encoded = encode_label(label)
        for _ in range(2):
            view = self._replicas.view
            for name in _order(view.members, label.trial_id):
                if len(kept) < self._copies and name not in kept and await self._bring(name, encoded, payload):
                    kept.add(name)
            if len(kept) >= self._copies or self._replicas.view is view:
                break
        return len(kept)

    async def _bring(self, name: str, label: bytes, payload: bytes) -> bool:
        """One at a time, and the wait for that is not the replica's."""
        now = asyncio.get_running_loop().time
        async with self._bringing.setdefault(name, asyncio.Lock()):
            view = self._replicas.view
            if name not in view.members or now() < self._shunned.get(name, 0.0):
                return False
            timeout_s = self._call_timeout_s + len(payload) / BYTES_PER_S
            answer = (await self._replicas.call([name], lambda port: port.put_payload(label, payload), timeout_s=timeout_s))[name]
            if isinstance(answer, BaseException) and self._replicas.view is view:
                self._shunned[name] = now() + SHUN_S
            return answer is True

    async def fetch(self, trial_id: str, wanted: Mapping[str, str]) -> dict[str, bytes]:
        """What is left of the payloads named by key and digest. One replica that does not answer is asked once."""
        silent: set[str] = set()
        room = asyncio.Semaphore(FETCHES)

        async def one(key: str, digest: str) -> bytes | None:
            async with room:
                for name in _order(self._replicas.view.members, trial_id):
                    if name in silent:
                        continue
                    asked = self._replicas.call([name], lambda port: port.payload(trial_id, key, digest), timeout_s=self._fetch_timeout_s)
                    answer = (await asked)[name]
                    if isinstance(answer, bytes):
                        return answer
                    if answer is not None:
                        silent.add(name)
                return None

        found = await asyncio.gather(*(one(key, digest) for key, digest in wanted.items()))
        return {key: payload for key, payload in zip(wanted, found, strict=True) if payload is not None}


def _order(members: Sequence[str], trial_id: str) -> list[str]:
    """The replicas in the order in which this trial tries them: another one for every trial, and always the same."""
    return sorted(members, key=lambda name: blake2b(f"{name}|{trial_id}".encode(), digest_size=8).digest())
