"""What a run's events tell of trials: a moment for each event that concerns one.

Owns which events concern a trial, and the sentence for each. Pure. An engine that is lost concerns the trials whose session is there
at that time, which the events of sessions tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rollout_ft.telemetry.history import ordered
from rollout_ft.telemetry.moments import SHOWN_CHARACTERS, Kind, Moment, ended
from rollout_ft.telemetry.words import counted, shortened
from rollout_ft.types import JSON, split_session_id

AROUND = {
    "gateway.lost": "a gateway was lost", "store.lost": "a replica of the store was lost", "store.data_lost": "the stores lost their data",
    "supervisor.rebuilt": "the supervisor was started again", "fleet.pause_overdue": "a pause is overdue",
    "fleet.ordered": "the trainer's order", "run.resumed": "another process goes on with the run",
}  # fmt: skip
_SAID_ELSEWHERE = {"session.adopted", "trial.released"}


def concerning(trial_id: str) -> tuple[bytes, ...]:
    """What the line of an event has in it that may concern this trial: of millions the others need not be read."""
    return (trial_id.encode(), b"engine.", *(name.encode() for name in AROUND))


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
                float(event.get("time", 0)), kind, shortened(text, SHOWN_CHARACTERS), self._attempt.get(trial_id, 1),
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
            kind, text, bad = ended(str(event.get("outcome", "")), event.get("reward"), str(event.get("cause", "")))
            return kind, "; ".join(filter(None, (text, _spent(event)))), bad
        case "turn.replayed" | "turn.attached" | "turn.continued" | "turn.regenerated":
            return _of_turn(name, event, where)
        case _:
            return Kind.OTHER, ": ".join(filter(None, (name, _why(event)))), False


def _of_turn(name: str, event: JSON, where: str) -> tuple[Kind, str, bool]:
    """What befell a turn; one that went well is told by its checkpoint or its trajectory alone."""
    turn, tokens = f"turn {event.get('turn')}", counted(event.get("tokens", 0), "token")
    match name:
        case "turn.replayed":
            return Kind.REPLAYED, f"{turn} went out again{where}, as it was committed: {tokens}", False
        case "turn.attached":
            return Kind.REPLAYED, f"{turn} was asked for again{where} while it was generated, and went out as one: {tokens}", False
        case "turn.continued":
            return Kind.CONTINUED, f"{turn} went on{where}: {event.get('tokens_reused', 0):,} of its {tokens} are from before", False
        case _:
            vain = f", {counted(event['tokens_wasted'], 'token')} in vain" if event.get("tokens_wasted") else ""
            return Kind.REGENERATED, f"{turn} was sampled again from its beginning{where}: {tokens}{vain}", False


def _spent(event: JSON) -> str:
    """What of a trial that has ended is in no trajectory, and what its restarts did not have to sample again."""
    wasted = +Counter[str](event.get("tokens_wasted_by") or {})
    dropped = f"{counted(wasted.total(), 'token')} dropped ({', '.join(f'{n:,} {why}' for why, n in wasted.items())})"
    replayed = f"{counted(event['replayed'], 'turn')} replayed" if event.get("replayed") else ""
    return ", ".join(filter(None, (replayed, dropped if wasted else "")))


def _why(event: JSON) -> str:
    """What an event says beside the ids that its moment has anyway."""
    said = [str(event[key]) for key in ("reason", "cause") if event.get(key)]
    return ": ".join(said) or next((str(event[key]) for key in ("message", "warning", "text", "op") if event.get(key)), "")
