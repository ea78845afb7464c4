"""What a journal does with bytes that were never written so: no acknowledged entry of another trial is lost, or any in silence."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollout_ft.checkpoint.journal import Journal
from rollout_ft.checkpoint.log import GENESIS
from rollout_ft.checkpoint.manifest import NAME
from rollout_ft.checkpoint.offline import Trials
from rollout_ft.checkpoint.records import Appended, JournalDamaged, Located, Opened, Promised, Raised, Record, Released

pytestmark = pytest.mark.timeout(300)

TRIALS = [f"trial-{n}" for n in range(6)]
Kept = dict[str, list[bytes]]


class Written:
    """A journal of several segments, and what was acknowledged of it. `spans`: (file, from, to) of every record."""

    def __init__(self, folder: Path, seed: int = 1, writes: int = 40) -> None:
        self.folder, self.kept = folder, Kept()
        self.spans: list[tuple[str, int, int, Record]] = []
        rng = random.Random(seed)
        self.journal = Journal(folder, "a", segment_bytes=2500)
        assert list(self.journal.replay()) == []
        self.write([Opened(1, ("a",), 1)])
        for _ in range(writes):
            self.write([self.entry(rng) for _ in range(rng.randint(1, 3))])
            if rng.random() < 0.2:
                self.write([Raised(rng.choice(list(self.kept)), 1, 1)])
        self.write([Promised(2)])
        self.write([self.entry(rng)])
        self.journal.close()
        self.path = self.journal.path

    def entry(self, rng: random.Random) -> Appended:
        trial_id = rng.choice(TRIALS)
        kept = self.kept.setdefault(trial_id, [])
        kept.append(rng.randbytes(rng.randint(0, 200)))
        return Appended(trial_id, 1, 1, len(kept) - 1, "turn", f"key-{len(kept) - 1}", kept[-1])

    def write(self, records: list[Record]) -> None:
        ends = self.journal.write(records)
        name = sorted(self.journal.path.glob("*.segment"))[-1].name
        at = next((to for file, _, to, _ in reversed(self.spans) if file == name), 0)
        for place, record in zip(ends, records, strict=True):
            self.spans.append((name, at, place.offset + place.length, record))
            at = place.offset + place.length

    @property
    def last_batch_from(self) -> tuple[str, int]:
        return self.spans[-1][0], self.spans[-1][1]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    made = Written(tmp_path_factory.mktemp("written"))
    assert len(list(made.path.glob("*.segment"))) > 3
    return made


def copy_of(written: Written, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(written.folder, to)
    return to / "a.journal"


def refused_and_whole(folder: Path, kept: Kept, torn_trial: str = "") -> set[str]:
    """The refused trials, named; every other one is there byte for byte, but for the torn tail of `torn_trial`."""
    trials = Trials(folder, "a")
    for trial_id, payloads in kept.items():
        if trial_id in trials.refused:
            with pytest.raises(JournalDamaged, match=r"\d{8}\.segment: \d+ bytes at byte \d+"):
                trials.entries(trial_id)
            continue
        found = [entry.payload for entry in trials.entries(trial_id)]
        if trial_id == torn_trial and trials.torn is not None:
            payloads = payloads[:-1]
        assert found == payloads, trial_id
    return set(trials.refused)


def test_what_was_written_is_read_back_by_whoever_does_not_own_it(written: Written) -> None:
    trials = Trials(written.folder, "a")
    assert {each: [entry.payload for entry in trials.entries(each)] for each in written.kept} == written.kept
    assert (trials.damage, trials.torn, trials.refused) == ([], None, {})
    assert trials.view is not None
    assert trials.view.number == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=400)
@given(data=st.data())
def test_a_flipped_bit_costs_the_trial_whose_record_it_is_in_and_no_other(written: Written, tmp_path: Path, data: st.DataObject) -> None:
    file, begin, end, record = data.draw(st.sampled_from(written.spans))
    place, bit = data.draw(st.integers(begin, end - 1)), data.draw(st.integers(0, 7))
    path = copy_of(written, tmp_path / "hurt") / file
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
    last = record is written.spans[-1][3]
    whose = "" if isinstance(record, (Opened, Promised)) else record.trial_id
    refused = refused_and_whole(tmp_path / "hurt", written.kept, torn_trial=whose if last else "")
    assert refused <= {whose} - ({whose} if last else set())
    if isinstance(record, Appended) and not last:
        assert refused == {whose}
    assert path.read_bytes() == bytes(content), "reading changes nothing"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(data=st.data())
def test_a_stretch_of_zeros_or_noise_loses_nothing_in_silence(written: Written, tmp_path: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted({span[0] for span in written.spans})))
    path = copy_of(written, tmp_path / "hurt") / file
    content = bytearray(path.read_bytes())
    begin = data.draw(st.integers(0, len(content) - 1))
    size = data.draw(st.integers(1, 1200))
    noise = random.Random(begin).randbytes(size) if data.draw(st.booleans()) else bytes(size)
    content[begin : begin + size] = noise[: len(content) - begin]
    path.write_bytes(content)
    trials = Trials(tmp_path / "hurt", "a")
    torn_from = (trials.torn.file.name, trials.torn.offset) if trials.torn else ("~", 0)
    lost = {record.trial_id for name, at, _, record in written.spans if (name, at) >= torn_from and isinstance(record, Appended)}
    for trial_id, payloads in written.kept.items():
        if trial_id not in trials.refused and trial_id not in lost:
            assert [entry.payload for entry in trials.entries(trial_id)] == payloads


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(data=st.data())
def test_a_file_that_ends_too_early_is_damage_unless_it_is_the_last(written: Written, tmp_path: Path, data: st.DataObject) -> None:
    files = sorted({span[0] for span in written.spans})
    file = data.draw(st.sampled_from(files))
    path = copy_of(written, tmp_path / "hurt") / file
    whole = path.stat().st_size
    kept = data.draw(st.integers(0, whole - 1))
    with path.open("r+b") as opened:
        opened.truncate(kept)
    trials = Trials(tmp_path / "hurt", "a")
    gone = {r.trial_id for name, _, end, r in written.spans if name == file and end > kept and isinstance(r, Appended)}
    for trial_id, payloads in written.kept.items():
        if file != files[-1] and trial_id in gone:
            assert trial_id in trials.refused
        elif trial_id not in trials.refused:
            found = [entry.payload for entry in trials.entries(trial_id)]
            assert found == payloads[: len(found)]
            assert trial_id in gone or found == payloads
    if file == files[-1]:
        boundaries = {0, *(end for name, _, end, _ in written.spans if name == file)}
        assert trials.refused == {}
        assert (trials.torn is None) == (kept in boundaries)


def test_a_segment_that_is_missing_is_damage(written: Written, tmp_path: Path) -> None:
    for file in sorted({span[0] for span in written.spans}):
        (copy_of(written, tmp_path / "hurt") / file).unlink()
        trials = Trials(tmp_path / "hurt", "a")
        assert str(trials.damage[0].file).endswith(file)
        lost = {r.trial_id for name, _, _, r in written.spans if name == file and isinstance(r, Appended)}
        assert lost <= trials.refused.keys()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_manifest_costs_nothing(written: Written, tmp_path: Path, place: int, bit: int) -> None:
    path = copy_of(written, tmp_path / "hurt") / NAME
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << bit
    path.write_bytes(content)
    assert refused_and_whole(tmp_path / "hurt", written.kept) == set()


def test_a_manifest_that_is_gone_or_noise_is_an_error_that_names_it(written: Written, tmp_path: Path) -> None:
    path = copy_of(written, tmp_path / "hurt") / NAME
    path.write_bytes(b"something else altogether, and long enough to be one")
    with pytest.raises(JournalDamaged, match=NAME):
        Trials(tmp_path / "hurt", "a")
    path.unlink()
    with pytest.raises(JournalDamaged, match=NAME):
        Trials(tmp_path / "hurt", "a")


def test_a_view_or_a_promise_survives_the_loss_of_its_record(written: Written, tmp_path: Path) -> None:
    file, begin, end, _ = next(span for span in written.spans if isinstance(span[3], Promised))
    path = copy_of(written, tmp_path / "hurt") / file
    content = bytearray(path.read_bytes())
    content[begin:end] = bytes(end - begin)
    path.write_bytes(content)
    journal = Journal(tmp_path / "hurt", "a")
    records = [item.record for item in journal.replay() if isinstance(item, Located)]
    journal.close()
    assert [record.number for record in records if isinstance(record, Promised)] == [2]


def test_a_write_of_which_the_disk_kept_the_end_and_not_the_beginning_is_a_torn_tail(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "a")
    list(journal.replay())
    journal.write([Appended("t", 1, 1, 0, "turn", "k", b"acknowledged")])
    places = journal.write([Appended("t", 1, 1, n, "turn", f"k{n}", bytes(100)) for n in (1, 2, 3)])
    journal.close()
    path = next(journal.path.glob("*.segment"))
    content = bytearray(path.read_bytes())
    content[places[0].offset] ^= 1
    path.write_bytes(content)
    trials = Trials(tmp_path, "a")
    assert [entry.payload for entry in trials.entries("t")] == [b"acknowledged"]
    assert trials.torn is not None
    assert trials.damage == []
    assert path.read_bytes() == bytes(content)
    journal = Journal(tmp_path, "a")
    list(journal.replay())
    assert journal.torn == trials.torn
    journal.write([Appended("t", 1, 1, 1, "turn", "again", b"again")])
    journal.close()
    assert [entry.payload for entry in Trials(tmp_path, "a").entries("t")] == [b"acknowledged", b"again"]


def test_a_released_trial_stays_released_when_the_segment_that_says_so_is_deleted(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "a", segment_bytes=300)
    list(journal.replay())
    journal.write([Appended("lives", 1, 1, 0, "turn", "k", bytes(100)), Appended("done", 1, 1, 0, "turn", "k", bytes(200))])
    journal.write([Released("done", 1, 1, 1, GENESIS, b"how it ended")])
    for seq in range(10):
        journal.write([Appended(f"other-{seq}", 1, 1, 0, "turn", "k", bytes(300))])
        journal.write([Released(f"other-{seq}", 1, 1, 1, GENESIS)])
    files = sorted(file.name for file in journal.path.glob("*.segment"))
    assert files[0] == "00000001.segment"
    assert len(files) <= 3
    journal.close()
    trials = Trials(tmp_path, "a")
    assert trials.note("done") == b"how it ended"
    assert trials.entries("done") == []
    assert [entry.payload for entry in trials.entries("lives")] == [bytes(100)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(kept=st.lists(st.booleans(), min_size=16, max_size=16), cut=st.integers(0, 1024))
def test_whatever_the_disk_kept_of_an_unfinished_write_is_no_damage(written: Written, tmp_path: Path, kept: list[bool], cut: int) -> None:
    folder = tmp_path / "hurt"
    copy_of(written, folder)
    journal = Journal(folder, "a")
    list(journal.replay())
    last = sorted(journal.path.glob("*.segment"))[-1]
    acknowledged = last.stat().st_size
    journal.write([Appended("late", 1, 1, seq, "turn", f"k{seq}", bytes([seq]) * 100) for seq in range(6)])
    journal.close()
    content = bytearray(last.read_bytes())
    page = -(-(len(content) - acknowledged) // len(kept))
    for number, there in enumerate(kept):
        begin = acknowledged + number * page
        if not there:
            content[begin : begin + page] = bytes(len(content[begin : begin + page]))
    last.write_bytes(content[: max(acknowledged, len(content) - cut)])
    trials = Trials(folder, "a")
    assert (trials.damage, trials.refused) == ([], {})
    assert {each: [entry.payload for entry in trials.entries(each)] for each in written.kept} == written.kept
