"""The trials of a journal, read without a store, a cluster or a lock.

Owns nothing on disk: it changes nothing, so that it reads what a run left, or beside one. Payloads stay in the files
until they are asked for.
"""

from __future__ import annotations

from pathlib import Path

from rollout_ft.checkpoint import frames, manifest
from rollout_ft.checkpoint.log import Entry, Head
from rollout_ft.checkpoint.reading import Reading, journal_path
from rollout_ft.checkpoint.records import Damage, JournalDamaged, Opened, Place, Torn
from rollout_ft.checkpoint.replay import Replay
from rollout_ft.checkpoint.state import StoreState
from rollout_ft.checkpoint.view import View

_TRIES = 3


class Trials:
    """What the journal of store `name` in `journal_dir` holds; empty when there is none. Raises JournalDamaged.

    `damage` and `torn` say what could not be read, `refused` (trial → reason) which trials that costs.
    """

    def __init__(self, journal_dir: str | Path, name: str) -> None:
        self.folder = journal_path(journal_dir, name)
        for _ in range(_TRIES):
            before = _manifest_bytes(self.folder)
            self._read(name)
            if not self.damage or _manifest_bytes(self.folder) == before:
                break  # else a writer beside us deleted a segment, which looks like damage

    def _read(self, name: str) -> None:
        self._state = StoreState(name)
        self._places: dict[str, list[Place]] = {}
        reading = Reading(self.folder)
        Replay(self._state, self._keep, self._drop).run(reading)
        self.damage: list[Damage] = reading.damage
        self.torn: Torn | None = reading.torn
        self.refused = {trial_id: log.damaged for trial_id, log in self._state.trials.items() if log.damaged}

    def _keep(self, trial_id: str, entry: Entry, place: Place) -> None:
        self._places.setdefault(trial_id, []).append(place)

    def _drop(self, trial_id: str) -> None:
        self._places.pop(trial_id, None)

    @property
    def view(self) -> View | None:
        """The last view that the store was a member of."""
        return self._state.view

    def heads(self) -> dict[str, Head]:
        """Every trial that is known, refused and released ones too."""
        return self._state.heads()

    def note(self, trial_id: str) -> bytes | None:
        """What was said of a trial when it was released (its summary, as JSON); None for one that was not."""
        return self._state.note(trial_id)

    def entries(self, trial_id: str) -> list[Entry]:
        """The log of a trial: empty when it is unknown or released. Raises JournalDamaged when it is refused."""
        log = self._state.trials.get(trial_id)
        if log is None:
            return []
        if log.damaged:
            raise JournalDamaged(log.damaged)
        places = self._places.get(trial_id, [])
        return [Entry(mark.kind, mark.key, self._payload(place)) for mark, place in zip(log.marks(), places, strict=True)]

    def _payload(self, place: Place) -> bytes:
        path = self.folder / manifest.segment_name(place.segment)
        with path.open("rb") as file:
            file.seek(place.offset)
            payload = file.read(place.length)
        if len(payload) != place.length or not frames.intact(payload, place.check):
            raise JournalDamaged(f"{path}: the {place.length} bytes at byte {place.offset} are not what was written there")
        return payload


def last_view(journal_dir: str | Path, name: str) -> View | None:
    """The last view that the store was a member of, without reading its trials. Raises JournalDamaged."""
    kept = manifest.read(journal_path(journal_dir, name))
    opened = [each.record for each in kept.carried if isinstance(each.record, Opened)] if kept else []
    return View(opened[-1].number, opened[-1].members, opened[-1].min_replicas) if opened else None


def _manifest_bytes(folder: Path) -> bytes:
    file = folder / manifest.NAME
    return file.read_bytes() if file.exists() else b""
