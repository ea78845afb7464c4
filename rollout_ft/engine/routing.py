"""The routed experts of turns: kept beside the log before a turn is committed, and fetched when a trainer asks.

Owns the way between a generation's rows and the store. Decides nothing about rows: `capture` does, and `samples.routed`.
Whatever goes wrong here costs rows and no turn: a turn without them says so in its record, and its path is partial.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from rollout_ft.checkpoint.payloads import Label, Payloads
from rollout_ft.engine.capture import Capture, Shape, digest_of
from rollout_ft.session.session import Session
from rollout_ft.telemetry.events import Events
from rollout_ft.types import RoutedExperts

_log = logging.getLogger("rollout_ft")


class Routing:
    """`shape` is that of a row."""

    def __init__(self, shape: Shape, payloads: Payloads, events: Events):
        self.shape, self._payloads, self._events = shape, payloads, events
        self._told: set[str] = set()

    async def keep(self, session: Session, epoch: int, key: str, capture: Capture) -> RoutedExperts | None:
        """What the turn's record says of its rows; None when they are nowhere."""
        try:
            packed = await asyncio.to_thread(capture.packed)
            if packed.trouble:
                self._tell("engine", packed.trouble)
            if packed.routed is None:
                return None
            spec, entry = session.spec, session.entry_key(key)
            label = Label(spec.trial_id, session.attempt, epoch, entry, packed.routed.digest)
            if await self._payloads.put(label, packed.payload):
                return packed.routed
            self._tell("store", "no replica keeps them: none answers in time, or store.payload_bytes is reached")
        except Exception:
            _log.exception("the routed experts of turn %s are lost", key)
        return None

    async def fetch(self, session: Session, wanted: Mapping[str, RoutedExperts]) -> dict[str, bytes]:
        """The payloads of turns that are left, by turn."""
        keys = {session.entry_key(turn): routed.digest for turn, routed in wanted.items()}
        found = await self._payloads.fetch(session.spec.trial_id, keys)
        good = await asyncio.to_thread(lambda: {key for key, payload in found.items() if digest_of(payload) == keys[key]})
        return {turn: found[key] for turn, key in zip(wanted, keys, strict=True) if key in good}

    def _tell(self, who: str, reason: str) -> None:
        """Once for each who lost some, not for every turn."""
        if who not in self._told:
            self._told.add(who)
            self._events.emit("routed_experts.lost", at=who, reason=reason)
