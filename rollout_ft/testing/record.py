"""A history from a run's journals: what every store took, stores that are gone included.

Owns the translation of journals to what `history` judges, and of a stored turn to the bytes that a client gets for it.
Opens the journals, so that the run must have ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from rollout_ft.checkpoint.journal import Journal, journal_names
from rollout_ft.checkpoint.log import Entry
from rollout_ft.checkpoint.records import Appended, Damage, JournalDamaged, JournalInUse, Opened, Raised
from rollout_ft.clock import monotonic
from rollout_ft.config import Config
from rollout_ft.gateway.dialects.openai_reply import ChatRequest, reply_body
from rollout_ft.session.drift import load_renderer
from rollout_ft.session.entries import decode_entry
from rollout_ft.session.request import TurnRequest
from rollout_ft.session.session import Session
from rollout_ft.testing.history import Bodies, History, Received, Written
from rollout_ft.types import Opened as OpenedAttempt
from rollout_ft.types import Turn

RELEASE_S = 20.0
"""For the last process of a run to let go of its journal."""


async def history_of(journal_dir: Path, received: Sequence[Received]) -> History:
    """What the journals say, and which stores the last view had."""
    written: dict[str, list[Written]] = {}
    views: dict[int, tuple[str, ...]] = {}
    for name in journal_names(journal_dir):
        written[name] = []
        journal = await _open(journal_dir, name)
        for item in journal.replay():
            if isinstance(item, Damage):
                raise JournalDamaged(f"{item.file} at byte {item.offset}: what was written there cannot be read")
            match item.record:
                case Appended(trial_id, attempt, epoch, _, kind, key, payload):
                    written[name].append(Written(trial_id, attempt, epoch, Entry(kind, key, payload)))
                case Raised(trial_id, attempt, epoch):
                    written[name].append(Written(trial_id, attempt, epoch))
                case Opened(number, members, _):
                    views[number] = members
                case _:
                    pass
        journal.close()
    return History(received, written, views[max(views)] if views else ())


async def _open(journal_dir: Path, name: str) -> Journal:
    until = monotonic() + RELEASE_S
    while True:
        try:
            return Journal(journal_dir, name)
        except JournalInUse:
            if monotonic() > until:
                raise
        await asyncio.sleep(0.05)


def chat_bodies(config: Config) -> Bodies:
    """How the turns of a trial's log look to a client of the chat completions route."""
    renderer = load_renderer(config)

    def bodies(log: Sequence[Entry]) -> Mapping[str, bytes]:
        entries = [decode_entry(e.kind, e.payload) for e in log]
        first = next((e for e in entries if isinstance(e, OpenedAttempt)), None)
        if first is None:
            return {}
        tokens = config.model.usable_tokens
        session = Session(first.spec, first.attempt, renderer, config.session, run_seed=config.seed, context_tokens=tokens)
        session.restore(entries, [])
        nodes = {e.key: session.tree.nodes[e.key] for e in entries if isinstance(e, Turn) and e.key in session.tree.nodes}
        asked = ChatRequest(TurnRequest("", [], [], b"", None, {}))
        return {key: reply_body(node, asked, renderer) for key, node in nodes.items()}

    return bodies
