"""What an agent and a model said in a trial, attempt by attempt, where each reply came from, and what became of it.

Owns the shape of it, as an object and as text. Pure. A turn is shown where it was generated; an attempt that went on from
the checkpoint shows by its number which turns it was only given again. What is dropped is what no trajectory has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import orjson

from rollout_ft.samples.selection import Selection
from rollout_ft.session.divergence import words
from rollout_ft.session.entries import SessionEntry
from rollout_ft.telemetry.words import counted, shortened
from rollout_ft.types import JSON, Answered, Ended, Opened, Step, Turn

SHORT_CHARACTERS = 500
"""Of a step's result, for people: the request that follows has it whole."""


BEGAN_ANEW = "a later attempt began from nothing"
PHANTOM, RESAMPLED = "no client is known to have received it", "it was thrown away, and asked for again"


def transcript(entries: Sequence[SessionEntry], chosen: Selection | None = None) -> list[JSON]:
    """`{attempt, resume, created, reason, cause, turns: [{turn, how, …}]}` of each attempt. `chosen` says what the trajectory has
    by now; without it nothing is known of what is dropped, but for what attempts that began anew left behind."""
    attempts: list[JSON] = []
    numbers: dict[str, int] = {}
    left = max((i for i, entry in enumerate(entries) if isinstance(entry, Opened) and not entry.resume), default=0)
    for i, entry in enumerate(entries):
        match entry:
            case Opened():
                why = asdict(entry.why)
                attempts.append({"attempt": entry.attempt, "resume": entry.resume, "created": entry.created, **why, "turns": []})
                if not entry.resume:
                    numbers = {}
            case Turn():
                number = numbers[entry.key] = len(numbers) + 1
                dropped = BEGAN_ANEW if i < left else _dropped(entry.key, chosen)
                attempts[-1]["turns"].append(_turn(entry, number, numbers.get(entry.parent, 0), dropped))
            case Answered() if entry.turn_key:
                attempts[-1]["turns"].append({"turn": numbers[entry.turn_key], "how": "replayed"})
            case Answered() if entry.diverged:
                met = replace(entry.diverged, turn=numbers[entry.diverged.turn_key])
                attempts[-1]["turns"].append({"how": "diverged", "first_difference": words(met), **asdict(met)})
            case Answered() if entry.failed:
                attempts[-1]["turns"].append({"turn": 0, "how": "failed", "cause": entry.failed})
            case Step():
                attempts[-1]["turns"].append(_step(entry))
            case Answered() | Ended():
                pass
    return attempts


def _dropped(key: str, chosen: Selection | None) -> str:
    if chosen is None or key in chosen.keys:
        return ""
    return RESAMPLED if key in chosen.resampled else PHANTOM


def _turn(turn: Turn, number: int, after: int, dropped: str) -> JSON:
    how = "continued" if turn.tokens_reused else "regenerated" if turn.generations > 1 else "generated"
    return {
        "turn": number, "how": how, "after": after, "key": turn.key, "sample": turn.sample, "created": turn.created,
        "messages": orjson.loads(turn.messages or b"[]"), "reply": orjson.loads(turn.reply), "finish_reason": turn.finish_reason,
        "prompt_tokens": len(turn.prompt_ids) // 4, "tokens": len(turn.output_ids) // 4, "tokens_reused": turn.tokens_reused,
        "tokens_wasted": turn.tokens_wasted, "generations": turn.generations, "phantom": turn.unheard,
        "engine": turn.engine, "seconds": turn.seconds, "versions": list(dict.fromkeys(span.version for span in turn.version_spans)),
        "dropped": dropped,
    }  # fmt: skip


def _step(step: Step) -> JSON:
    action, result = orjson.loads(step.action), orjson.loads(step.result)
    return {"how": "step", "number": step.number, "action": action, "result": result, "snapshot": step.snapshot}


def text(attempts: Sequence[JSON]) -> Iterator[str]:
    """Lines for people."""
    for attempt in attempts:
        began = datetime.fromtimestamp(attempt["created"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        why = ": ".join(filter(None, (attempt["reason"], attempt["cause"])))
        begins = f"attempt {attempt['attempt']}, from {'its checkpoint' if attempt['resume'] else 'nothing'}, {began}"
        yield f"{begins}, for {why}" if why else begins
        previous = 0
        for turn in attempt["turns"]:
            if turn["how"] == "failed":
                yield f"  a request failed: {turn['cause']}"
            elif turn["how"] == "diverged":
                yield f"  the replay left the record{', and was served from it' if turn['served'] else ''}: {turn['first_difference']}"
                continue
            elif turn["how"] == "step":
                yield f"  step {turn['number']} of the environment: {_words(turn['action'])}{', saved' if turn['snapshot'] else ''}"
                yield f"    {shortened(_words(turn['result']), SHORT_CHARACTERS)}"
                continue
            elif turn["how"] == "replayed":
                yield f"  turn {turn['turn']}: replayed"
            else:
                yield from _shown(turn, previous)
            previous = turn["turn"] or previous


def _shown(turn: JSON, previous: int) -> Iterator[str]:
    branch = f"after turn {turn['after']}" if turn["after"] != previous else ""
    nobody = "nobody waited for it" if turn["phantom"] else ""
    yield f"  turn {turn['turn']}: {', '.join(filter(None, (turn['how'], made(turn), branch, nobody)))}"
    if turn["dropped"]:
        yield f"    dropped: {turn['dropped']}"
    if not turn["messages"]:
        yield f"    {turn['prompt_tokens']} tokens"
    for message in (*turn["messages"], turn["reply"]):
        yield from _message(message)


def made(turn: JSON) -> str:
    """How a turn was made: its tokens, where, with which weights, and what that took beside."""
    where = f" in {turn['seconds']:.3g} s at {turn['engine']}" if turn["engine"] else ""
    said = (
        counted(turn["tokens"], "token") + where,
        f"{turn['tokens_reused']} of them from before" if turn["tokens_reused"] else "",
        f"weights {' and '.join(turn['versions'])}" if any(turn["versions"]) else "",
        turn["finish_reason"],
        counted(turn["generations"], "generation") if turn["generations"] > 1 else "",
        f"{counted(turn['tokens_wasted'], 'token')} in vain" if turn["tokens_wasted"] else "",
    )
    return ", ".join(filter(None, said))


def _message(message: JSON) -> Iterator[str]:
    parts: list[str] = [_words(message.get(key)) for key in ("reasoning_content", "content") if message.get(key)]
    parts += [f"{call['function']['name']}({call['function']['arguments']})" for call in message.get("tool_calls") or ()]
    first, *others = "\n".join(parts).splitlines() or [""]
    yield f"    {message['role']}: {first}"
    yield from (f"      {line}" for line in others)


def _words(content: Any) -> str:
    return content if isinstance(content, str) else orjson.dumps(content).decode()
