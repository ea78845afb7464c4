"""What a trial's checkpoint or its trajectory has of it: a moment for each turn, replay, step and end.

Owns the sentence for each. Pure. A moment without a time is behind the one before it: only turns, attempts and ends have one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby

import orjson

from rollout_ft.session.entries import FAULT, SessionEntry
from rollout_ft.telemetry.moments import SHOWN_CHARACTERS, Kind, Moment, ended
from rollout_ft.telemetry.words import counted, listed, shortened
from rollout_ft.types import JSON, Answered, Ended, Opened, Step, Turn


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
                kind, text, bad = ended(entry.outcome.value, entry.reward, entry.cause)
                made.append(Moment(entry.created, kind, shortened(text, SHOWN_CHARACTERS), attempt, bad=bad))
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
