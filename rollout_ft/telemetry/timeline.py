"""One trial's moments, in order: what its run's events tell of it, and what its checkpoint or its trajectory has.

Owns which events concern a trial, and the sentence for each. Pure; knows nothing of who shows it. An engine that is lost concerns
the trials whose session is there at that time, which the events of sessions tell; what both sources know is there once.

    timeline("q07", events)                                   # of a ring of recent events, or of events.jsonl
    timeline("q07", events, of_entries(checkpoint_entries))   # of a trial that the stores or a journal have
    timeline("q07", events, of_paths(trajectory["paths"]))    # of one that was collected
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import groupby

import orjson

from rollout_ft.session.entries import FAULT, SessionEntry
from rollout_ft.telemetry.history import ordered
from rollout_ft.telemetry.words import counted, listed, shortened
from rollout_ft.trial.groups import LOST
from rollout_ft.types import JSON, Answered, Ended, Opened, Step, Turn, split_session_id


class Kind(StrEnum):
    OPENED = "opened"
    TURN = "turn"
    REPLAYED = "replayed"
    STEP = "step"
    FAULT = "fault"
    DOUBTED = "doubted"
    """Its engine is, which may come to nothing."""
    MOVED = "moved"
    RESUMED = "resumed"
    RESTARTED = "restarted"
    DIVERGED = "diverged"
    ENDED = "ended"
    AROUND = "around"
    """What befell the run while the trial ran."""
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Moment:
    """`time` is what clocks on walls show; 0 where only its place among the others is known. `text` is for people."""

    time: float
    kind: Kind
    text: str
    attempt: int = 0
    turn: int = 0
    engine: str = ""
    tokens: int = 0
    """Of a turn; of a resumed session those that it goes on from."""
    seconds: float = 0.0
    bad: bool = False

    def line(self) -> JSON:
        return asdict(self)


AROUND = {
    "gateway.lost": "a gateway was lost", "store.lost": "a replica of the store was lost", "store.data_lost": "the stores lost their data",
    "supervisor.rebuilt": "the supervisor was started again", "fleet.pause_overdue": "a pause is overdue",
    "fleet.ordered": "the trainer's order", "run.resumed": "another process goes on with the run",
}  # fmt: skip
_SAID_ELSEWHERE = {"session.adopted", "trial.released"}
_SHOWN_CHARACTERS = 300


def timeline(trial_id: str, events: Sequence[JSON], made: Sequence[Moment] = ()) -> list[Moment]:
    """All moments of a trial. `made`: those that its checkpoint has (`of_entries`), or its trajectory (`of_paths`)."""
    return merged(of_events([trial_id], events)[trial_id], made)


def merged(told: Sequence[Moment], made: Sequence[Moment]) -> list[Moment]:
    """Both in the order of their time; what both have is there as an event tells it. Of what is made the order holds,
    and a moment without a time stands behind the one before it."""
    known = {_identity(moment): moment for moment in told if _identity(moment)}
    clock, placed = min((m.time for m in (*told, *made) if m.time), default=0.0), list[Moment]()
    for moment in made:
        same = known.get(_identity(moment))
        clock = max(clock, same.time if same else moment.time)
        if same is None:
            placed.append(replace(moment, time=clock))
    return sorted((*told, *placed), key=lambda moment: moment.time)


def _identity(moment: Moment) -> tuple[object, ...]:
    match moment.kind:
        case Kind.OPENED | Kind.ENDED:
            return (moment.kind,)
        case Kind.RESTARTED | Kind.DIVERGED:
            return (moment.kind, moment.attempt, moment.turn)
        case _:
            return ()


# -- what events tell -------------------------------------------------------------------------------------------------


def of_events(trial_ids: Iterable[str], events: Sequence[JSON]) -> dict[str, list[Moment]]:
    """Of each of these trials, in one pass."""
    events = ordered(events)
    fold = _Fold(dict.fromkeys(trial_ids), events)
    for event in events:
        fold.take(event)
    return fold.found


class _Fold:
    def __init__(self, trial_ids: Iterable[str], events: Sequence[JSON]):
        self.found: dict[str, list[Moment]] = {trial_id: [] for trial_id in trial_ids}
        self._at: dict[str, str] = {}
        self._attempt: dict[str, int] = {}
        self._first = {e["session"]: e.get("source_engine", "") for e in reversed(events) if e.get("event") == "session.moved"}

    def take(self, event: JSON) -> None:
        name = str(event.get("event", ""))
        if name in ("engine.dead", "engine.doubted"):
            for trial_id in [trial_id for trial_id, engine in self._at.items() if engine and engine == event.get("engine")]:
                self._add(trial_id, event, *_of_engine(event))
                if name == "engine.dead":
                    self._at[trial_id] = ""
        elif name in AROUND:
            for trial_id in self._at:
                self._add(trial_id, event, Kind.AROUND, ": ".join(filter(None, (AROUND[name], _why(event)))), bad=name.endswith("lost"))
        else:
            for trial_id in _named(event) & self.found.keys():
                self._of_trial(trial_id, name, event)

    def _of_trial(self, trial_id: str, name: str, event: JSON) -> None:
        if trial_id not in self._attempt or "attempt" in event:
            self._attempt[trial_id] = int(event.get("attempt", 1))
        attempt = self._attempt[trial_id]
        if name == "trial.ended":
            self._at.pop(trial_id, None)
        elif event.get("engine") or name in ("trial.opened", "trial.restarted"):
            self._at[trial_id] = str(event.get("engine") or self._first.get(f"{trial_id}~{attempt}", ""))
        if name not in _SAID_ELSEWHERE:
            self._add(trial_id, event, *_words(name, event, self._at.get(trial_id, "")))

    def _add(self, trial_id: str, event: JSON, kind: Kind, text: str, bad: bool = False) -> None:
        self.found[trial_id].append(
            Moment(
                float(event.get("time", 0)), kind, shortened(text, _SHOWN_CHARACTERS), self._attempt.get(trial_id, 1),
                turn=int(event.get("turn", 0)), engine=str(event.get("engine", "")) or self._at.get(trial_id, ""),
                tokens=int(event.get("tokens", 0)), seconds=float(event.get("seconds", 0)), bad=bad,
            )
        )  # fmt: skip


def _named(event: JSON) -> set[str]:
    named = (
        {str(each) for each in event.get("trials", ()) if isinstance(each, str)} if isinstance(event.get("trials"), list) else set[str]()
    )
    if "trial" in event:
        named.add(str(event["trial"]))
    if "session" in event:
        named.add((split_session_id(str(event["session"])) or ("", 0))[0])
    return named


def _of_engine(event: JSON) -> tuple[Kind, str, bool]:
    if event["event"] == "engine.dead":
        return Kind.FAULT, f"its engine {event.get('engine')} was lost: {event.get('reason', '')}", True
    return Kind.DOUBTED, f"its engine {event.get('engine')} is doubted: {event.get('reason', '')}", True


def _words(name: str, event: JSON, at: str) -> tuple[Kind, str, bool]:
    where = f" at {at}" if at else ""
    match name:
        case "trial.opened":
            return Kind.OPENED, f"opened{where}", False
        case "trial.restarted":
            checkpoint = f"its checkpoint of {counted(event.get('turns', 0), 'turn')}"
            why = _why(event)
            begins = f"attempt {event.get('attempt')} begins{where} from {checkpoint if event.get('checkpoint') else 'nothing'}"
            return Kind.RESTARTED, f"{begins}: {why}" if why else begins, False
        case "session.moved":
            source = event.get("source_engine")
            return Kind.MOVED, f"its session went{f' from {source}' if source else ''} to {event.get('engine')}", False
        case "session.resumed":
            behind = f", behind {counted(event['tokens'], 'token')} of before" if event.get("tokens") else ""
            return Kind.RESUMED, f"next token{where} after {event.get('seconds', 0):.3g} s{behind}", False
        case "trial.diverged":
            served = ", and was served from it" if event.get("served") else ""
            differs = f"{event.get('recorded', '')!r} was recorded, {event.get('sent', '')!r} came"
            return Kind.DIVERGED, f"the replay left the record at turn {event.get('turn')}{served}: {differs}", True
        case "trial.ended":
            return _ended(str(event.get("outcome", "")), event.get("reward"), str(event.get("cause", "")))
        case _:
            return Kind.OTHER, ": ".join(filter(None, (name, _why(event)))), False


def _ended(outcome: str, reward: float | None, cause: str) -> tuple[Kind, str, bool]:
    return Kind.ENDED, f"{outcome}, reward {reward if reward is not None else 'none'}{f': {cause}' if cause else ''}", outcome in LOST


def _why(event: JSON) -> str:
    """What an event says beside the ids that its moment has anyway."""
    said = [str(event[key]) for key in ("reason", "cause") if event.get(key)]
    return ": ".join(said) or next((str(event[key]) for key in ("message", "warning", "text", "op") if event.get(key)), "")


# -- what the checkpoint has ------------------------------------------------------------------------------------------


def of_entries(entries: Iterable[SessionEntry]) -> list[Moment]:
    """Of a checkpoint: every turn, replay, step, divergence and failure of every attempt."""
    made: list[Moment] = []
    numbers: dict[str, int] = {}
    attempt = 0
    for entry in entries:
        match entry:
            case Opened():
                attempt, numbers = entry.attempt, numbers if entry.resume else {}
                why = ": ".join(filter(None, (entry.why.reason, entry.why.cause)))
                again = f"attempt {attempt} begins from {'its checkpoint' if entry.resume else 'nothing'}{f': {why}' if why else ''}"
                first = Moment(entry.created, Kind.OPENED, "opened", attempt)
                made.append(replace(first, kind=Kind.RESTARTED, text=again) if made else first)
            case Turn():
                number = numbers[entry.key] = len(numbers) + 1
                made.append(_of_turn(entry, number, attempt))
            case Answered() if entry.turn_key:
                made.append(Moment(0, Kind.REPLAYED, "", attempt, numbers.get(entry.turn_key, 0)))
            case Answered() if entry.diverged:
                text = f"the replay left the record{', and was served from it' if entry.diverged.served else ''}"
                made.append(Moment(0, Kind.DIVERGED, text, attempt, entry.diverged.turn, bad=True))
            case Answered() if entry.failed:
                fault = entry.failed.removeprefix(FAULT) if entry.failed.startswith(FAULT) else "a request got no reply (5xx)"
                made.append(Moment(0, Kind.FAULT, fault, attempt, bad=True))
            case Step():
                text = f"step {entry.number} of its environment: {shortened(_said(entry.action), 80)}"
                made.append(Moment(0, Kind.STEP, text, attempt))
            case Ended():
                kind, text, bad = _ended(entry.outcome.value, entry.reward, entry.cause)
                made.append(Moment(entry.created, kind, shortened(text, _SHOWN_CHARACTERS), attempt, bad=bad))
            case Answered():
                pass
    return _folded(made)


def _of_turn(turn: Turn, number: int, attempt: int) -> Moment:
    facts = {"finish_reason": turn.finish_reason, "generations": turn.generations, "tokens_reused": turn.tokens_reused}
    facts |= {"tokens_wasted": turn.tokens_wasted, "unheard": turn.unheard, "seconds": turn.seconds, "engine": turn.engine}
    return _turn(turn.created, number, attempt, len(turn.output_ids) // 4, facts)


def of_paths(paths: Iterable[JSON]) -> list[Moment]:
    """Of a trajectory: the turns that are trained on, without their attempts."""
    turns: dict[str, JSON] = {}
    for path in paths:
        for turn in path["turns"]:
            turns.setdefault(turn["turn"], turn)
    ordered = sorted(turns.values(), key=lambda turn: turn.get("created", 0))
    return [_turn(turn.get("created", 0), i, 0, turn["end"] - turn["start"], turn) for i, turn in enumerate(ordered, start=1)]


def _turn(time: float, number: int, attempt: int, tokens: int, facts: JSON) -> Moment:
    seconds, engine = facts.get("seconds", 0.0), facts.get("engine", "")
    said = [
        counted(tokens, "token") + (f" in {seconds:.3g} s" if seconds else "") + (f" at {engine}" if engine else ""),
        facts["finish_reason"],
        f"{facts['tokens_reused']:,} of them from before a fault" if facts.get("tokens_reused") else "",
        f"{facts['generations']} generations" if facts["generations"] > 1 else "",
        f"{counted(facts['tokens_wasted'], 'token')} in vain" if facts.get("tokens_wasted") else "",
        "nobody waited for it" if facts.get("unheard") else "",
    ]
    text = f"turn {number}: {', '.join(filter(None, said))}"
    return Moment(time, Kind.TURN, text, attempt, number, engine, tokens, seconds)


def _folded(made: Iterable[Moment]) -> list[Moment]:
    """A replay is one moment, however many turns it has."""
    folded: list[Moment] = []
    for kind, run in groupby(made, key=lambda moment: moment.kind):
        moments = list(run)
        if kind is not Kind.REPLAYED:
            folded += moments
            continue
        turns = sorted({moment.turn for moment in moments})
        text = f"{'turns' if len(turns) > 1 else 'turn'} {listed(turns)} replayed from the checkpoint"
        folded.append(replace(moments[-1], text=text))
    return folded


def _said(action: bytes) -> str:
    said = orjson.loads(action)
    return orjson.dumps(said).decode()
