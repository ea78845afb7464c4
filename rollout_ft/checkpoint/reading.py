"""A journal read from its files: every record in order, and what cannot be read.

Owns the judgement of bad bytes: a torn tail, or damage and whose. Takes no lock and changes nothing, so that it can
read beside a writer or where there is no right to write. Must not know what records mean together; `replay` does.

The subtle invariant: a torn tail was never acknowledged. Bad bytes are taken for one only in the last segment and only
when nothing that another write put there is good behind them; everything else was acknowledged once, and is damage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

import msgspec

from rollout_ft.checkpoint import frames, manifest
from rollout_ft.checkpoint.frames import Frame
from rollout_ft.checkpoint.manifest import Manifest, SegmentFile
from rollout_ft.checkpoint.records import Appended, Damage, JournalDamaged, Located, Place, Torn, trial_of

NOWHERE = Place(0, 0, 0, 0)


def journal_path(journal_dir: str | Path, name: str) -> Path:
    """The folder of the store `name`."""
    return Path(journal_dir) / f"{quote(name, safe='')}.journal"


def journal_names(journal_dir: str | Path) -> list[str]:
    """The stores that have a journal in `journal_dir`: start each under its old name, then `recover_view`."""
    return sorted(unquote(path.stem) for path in Path(journal_dir).glob("*.journal"))


@dataclass(slots=True)
class _Bad:
    """A bad stretch; `known`: the trial of each of its records that something names; `last` once that is clear."""

    file: Path
    offset: int
    end: int
    first: int
    last: int | None = None
    known: dict[int, str] = field(default_factory=dict[int, str])


class Reading:
    """Iterate once: records and damage in the order of their numbers. The rest is known at the end of it."""

    def __init__(self, folder: Path) -> None:
        """Raises JournalDamaged when there is no telling what belongs to the journal."""
        self.folder = folder
        self.manifest: Manifest | None = manifest.read(folder)
        self.damage: list[Damage] = []
        self.torn: Torn | None = None
        self.next_number = 1
        self.last_trial = ""
        self._bad: list[_Bad] = []
        self._recovered = {each.number for each in self.manifest.carried} if self.manifest else set[int]()

    def __iter__(self) -> Iterator[Located | Damage]:
        if self.manifest is None:
            return
        carried = list(self.manifest.carried)
        for item in self._read(self.manifest):
            number = item.number if isinstance(item, Located) else item.first
            while carried and carried[0].number <= number:
                first = carried.pop(0)
                yield Located(first.record, first.number, NOWHERE)
            if not (isinstance(item, Located) and item.number in self._recovered):
                yield item
        for each in carried:
            yield Located(each.record, each.number, NOWHERE)
            self.next_number = max(self.next_number, each.number + 1)

    def _read(self, kept: Manifest) -> Iterator[Located | Damage]:
        for segment in kept.segments:
            path = self.folder / segment.name
            self.next_number = max(self.next_number, segment.first)
            size = path.stat().st_size if path.exists() else None
            if size is None:
                self._note(path, 0, 0)
                if not segment.end:  # nobody knows how much it held: one record more than is known from elsewhere
                    self.next_number = max(self._recovered | {self.next_number}) + 2
            elif size:
                # Not mapped: a writer that starts meanwhile may cut the file, and a mapped page that is gone kills the process.
                yield from self._segment(segment, path, path.read_bytes(), kept.mark)
            if segment.end > self.next_number:
                self._note(path, size or 0, size or 0)
                self.next_number = segment.end
            self._close()
        yield from self._judged()

    def _segment(self, segment: SegmentFile, path: Path, data: bytes, mark: bytes) -> Iterator[Located | Damage]:
        try:
            items = list(frames.scan(data, mark))
        except msgspec.DecodeError as error:
            raise JournalDamaged(f"{path}: a record makes no sense: {error}") from error
        last_batch = next((item.meta.batch for item in reversed(items) if isinstance(item, Frame)), 0)
        for item in items:
            number = item.meta.number if isinstance(item, Frame) else self.next_number
            if number < self.next_number:
                raise JournalDamaged(f"{path}: the record at byte {item.offset} is number {number}, which was there before")
            whole = isinstance(item, Frame) and item.whole
            if not segment.end and not whole and number >= last_batch:
                self.next_number = number
                self.torn = Torn(path, item.offset, len(data) - item.offset)
                return
            if isinstance(item, Frame):
                if number > self.next_number:
                    self._note(path, item.offset, item.offset)
                if self._bad and item.meta.echo:
                    self._bad[-1].known[number - 1] = item.meta.echo
                self.next_number = number
            if isinstance(item, Frame) and item.whole:
                yield from self._judged()
                yield self._located(segment, item, data)
                continue
            self._note(path, item.offset, item.end)
            if isinstance(item, Frame):
                self._bad[-1].known[number] = trial_of(item.meta.record)
                self.next_number = number + 1

    def _note(self, path: Path, offset: int, end: int) -> None:
        """A bad stretch, or more of the one that is not over yet."""
        if not (self._bad and self._bad[-1].file == path and self._bad[-1].last is None):
            self._bad.append(_Bad(path, offset, end, self.next_number))
        self._bad[-1].end = max(self._bad[-1].end, end)

    def _close(self) -> None:
        """The stretches so far are over: the next record's number says how many they held."""
        for bad in self._bad:
            if bad.last is None:
                bad.last = self.next_number - 1

    def _judged(self) -> Iterator[Damage]:
        self._close()
        found, self._bad = self._bad, []
        for bad in found:
            lost = [number for number in range(bad.first, (bad.last or 0) + 1) if number not in self._recovered]
            if not lost:
                continue  # the manifest has all of it
            trials = frozenset(trial for number in lost if (trial := bad.known.get(number)))
            attributed = all(number in bad.known for number in lost)
            damage = Damage(bad.file, bad.offset, bad.end - bad.offset, lost[0], lost[-1], trials, attributed)
            self.damage.append(damage)
            yield damage

    def _located(self, segment: SegmentFile, frame: Frame, data: bytes) -> Located:
        record, at = frame.meta.record, frame.payload_at
        self.next_number, self.last_trial = frame.meta.number + 1, trial_of(record)
        if isinstance(record, Appended):
            record = msgspec.structs.replace(record, payload=data[at : frame.end])
        return Located(record, frame.meta.number, Place(segment.segment, at, frame.end - at, frame.check))
