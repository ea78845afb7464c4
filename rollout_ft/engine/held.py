"""One session that an engine's actor owns: the end of its log, and what runs for it.

Owns the commits of one owner epoch. Knows nothing of requests or engines. Anything but a success ends the ownership:
another owner may write by then, so that nothing more is committed from here, and what runs is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rollout_ft.checkpoint.log import Append, Entry
from rollout_ft.checkpoint.mirror import Mirror
from rollout_ft.clock import monotonic
from rollout_ft.engine.generation import Generation
from rollout_ft.errors import CommitRefused, Fenced, SessionClosed, SessionMoved, StoreUnavailable
from rollout_ft.session.entries import SessionEntry, encode_entry
from rollout_ft.session.session import Session
from rollout_ft.session.tree import Node
from rollout_ft.telemetry import metrics
from rollout_ft.telemetry.losses import Loss
from rollout_ft.telemetry.metrics import Counts, whose
from rollout_ft.types import JSON, Answered, Opened, Partial, Turn


@dataclass(slots=True, eq=False)
class Held:
    """`next_seq` is the length of the log, `log` orders its commits; `left` is told once, when this ownership ends."""

    session: Session
    epoch: int
    next_seq: int
    mirror: Mirror
    left: Callable[[Held], None]
    counts: Counts
    gone: bool = False
    ending: bool = False
    waiting: int = 0
    """Requests that are not answered yet."""
    changed: float = field(default_factory=monotonic)
    """When one of them began or ended, or a step was recorded; at the latest when it was taken over."""
    taken: float = field(default_factory=monotonic)
    """When it was taken over."""
    excused: bool = False
    """It was let go of on purpose: what was in flight goes on elsewhere, and nobody failed."""
    loss: Loss | None = None
    """Why it came from another owner; none once a token was sampled here."""
    log: asyncio.Lock = field(default_factory=asyncio.Lock)
    failing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of those who record a failure or a divergence: a second of the same would take no place in the log, and leave a gap."""
    stepping: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of those who record a step: the second of the same gets what the first recorded."""
    tasks: dict[str, asyncio.Task[Node]] = field(default_factory=dict[str, "asyncio.Task[Node]"])
    generations: dict[str, Generation] = field(default_factory=dict[str, Generation])
    graces: dict[str, asyncio.TimerHandle] = field(default_factory=dict[str, asyncio.TimerHandle])

    async def commit(self, key: str, entry: SessionEntry) -> None:
        """One entry of the trial's log, on every replica. Raises SessionMoved or SessionClosed.

        A caller that leaves while it is on its way leaves the session as it is: the entry arrives without it.
        """
        task = asyncio.create_task(self._commit(key, entry, asyncio.current_task()))
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
        await asyncio.shield(task)

    async def _commit(self, key: str, entry: SessionEntry, spare: asyncio.Task[Any] | None) -> None:
        kind, payload = encode_entry(entry)
        trial_id, attempt = self.session.spec.trial_id, entry.attempt if isinstance(entry, Opened) else self.session.attempt
        async with self.log:
            if self.gone:
                raise SessionMoved(self.session.id)
            began = monotonic()
            try:
                await self.mirror.commit(Append(trial_id, attempt, self.epoch, self.next_seq, Entry(kind, key, payload)))
            except Fenced as e:
                self.counts.add(metrics.COMMITS_REFUSED, e.reason)
                self.let_go(spare)
                if e.reason == "stale_attempt":
                    raise SessionClosed(f"attempt {attempt} of trial {trial_id} was replaced by {e.current}") from e
                raise SessionMoved(self.session.id, in_flight=True) from e
            except (StoreUnavailable, CommitRefused) as e:
                self.counts.add(metrics.COMMITS_REFUSED, "unavailable" if isinstance(e, StoreUnavailable) else "refused")
                self.let_go(spare)
                raise SessionMoved(self.session.id, in_flight=True) from e
            self.counts.observe(metrics.COMMIT_SECONDS, monotonic() - began)
            self.next_seq += 1
        self._count(kind, entry)

    def _count(self, kind: str, entry: SessionEntry) -> None:
        """One whose answer was lost is not counted: whoever reads it from the store did not commit it."""
        counts, mine = self.counts, whose(self.session.spec)
        counts.add(metrics.COMMITS, kind)
        if isinstance(entry, Turn):
            counts.add(metrics.TURNS_COMMITTED, *mine)
            counts.add(metrics.TOKENS_GENERATED, *mine, by=len(entry.output_ids) // 4 + entry.tokens_wasted)
            counts.add(metrics.TOKENS_REUSED, *mine, by=entry.tokens_reused)
        if isinstance(entry, Turn | Answered):
            counts.add(metrics.TURNS_ACKNOWLEDGED, *mine, by=len(entry.acknowledged))

    async def save_evidence(self) -> None:
        acks, deliveries = self.session.evidence.take_unsaved()
        if acks or deliveries:
            await self.commit(f"evidence/{self.session.attempt}/{self.next_seq}", Answered(acknowledged=acks, delivered=deliveries))

    def activity(self) -> JSON:
        """What its agent is at: `trial.deadlines`."""
        now, began = monotonic(), [g.began for g in self.generations.values()]
        turn_s, turns = round(now - min(began), 1) if began else 0.0, len(self.session.evidence.asked)
        return {"waiting": self.waiting, "turn_s": turn_s, "quiet_s": round(now - self.changed, 1), "turns": turns}

    def partials(self) -> list[tuple[str, int, int, Partial]]:
        """What its unfinished generations have so far, as the store takes it."""
        if not self.session.survives:
            return []
        trial_id, attempt = self.session.spec.trial_id, self.session.attempt
        kept = {**self.session.partials, **{k: g.partial() for k, g in self.generations.items() if g.calls or g.ids or g.wasted}}
        return [(trial_id, attempt, self.epoch, partial) for partial in kept.values()]

    def let_go(self, *spare: asyncio.Task[Any] | None) -> None:
        """Ends the ownership; the task that does so and `spare` see to their own end."""
        self.gone = True
        self.left(self)
        self.stop_flights(asyncio.current_task(), *spare)

    def stop_flights(self, *spare: asyncio.Task[Any] | None) -> None:
        """Cancels what runs; the caller decides whether the session itself is gone."""
        for grace in self.graces.values():
            grace.cancel()
        for task in list(self.tasks.values()):
            if task not in spare:
                task.cancel()
