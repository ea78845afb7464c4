"""What all drivers share: conversations asked for on stdin, what was got on stdout, one JSON object a line each.

Owns the conversation: who says what when, and what a harness of its own does about an error (`repeats`). Runs in a
client library's environment, so it knows nothing but the standard library. A task's fields:

    base_url, api_key, prompt, turns, max_tokens, stream, tools, timeout_s
    retries       what the library is told (`max_retries`, `num_retries`), null: its own default
    repeats       how often the harness itself asks again when a turn ended in an error of the network or of the server
    history       how replies are kept: `object`, `dump` or `exclude_none`
    idempotency   whether each turn is sent with an Idempotency-Key, the same whenever it is repeated
"""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Protocol

DESCRIPTION = "Look a word up in the notebook"
PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
LOOK_UP = {"type": "function", "function": {"name": "look_up", "description": DESCRIPTION, "parameters": PARAMETERS}}
SYSTEM = "Answer briefly."

Said = dict[str, Any]
"""One reply: `id`, `content`, `tool_calls` (`{id, name, arguments}`), `finish`, and `rejected` where the library did
not take it for an answer."""


class Chat(Protocol):
    """One conversation, its history in the library's own form."""

    def ask(self, headers: dict[str, str]) -> Said: ...
    def hear_results(self, results: list[tuple[str, str]]) -> None: ...
    def hear(self, text: str) -> None: ...


def main(begin: Callable[[dict[str, Any]], Chat]) -> None:
    for line in sys.stdin:
        task = json.loads(line)
        for said in converse(begin(task), task):
            print(json.dumps(said), flush=True)
        print("{}", flush=True)


def converse(chat: Chat, task: dict[str, Any]) -> Iterator[Said]:
    """What was got, turn by turn; an error is the last."""
    for _ in range(task["turns"]):
        errors: list[Said] = []
        said = ask(chat, task, errors)
        yield {**said, "errors": errors} if said else {"error": errors[-1], "errors": errors}
        if not said:
            return
        if said.get("rejected"):
            continue
        if said["tool_calls"]:
            chat.hear_results([(call["id"], look_up(call["arguments"])) for call in said["tool_calls"]])
        else:
            chat.hear(f"The notebook: {look_up(said['content'])}. Go on.")


def ask(chat: Chat, task: dict[str, Any], errors: list[Said]) -> Said | None:
    """One turn, as often as the harness asks for it; None when it gives up."""
    headers = {"Idempotency-Key": uuid.uuid4().hex} if task["idempotency"] else {}
    while True:
        try:
            return chat.ask(headers)
        except Exception as e:
            errors.append(described(e))
            if 400 <= (errors[-1]["status"] or 500) < 500 or len(errors) > task["repeats"]:
                return None


def described(e: Exception) -> Said:
    status = getattr(e, "status_code", None)
    return {"class": type(e).__name__, "status": status, "code": getattr(e, "code", None), "message": str(e)}


def look_up(query: str) -> str:
    """What the notebook says: a function of the query alone."""
    digest = hashlib.sha256(query.encode()).hexdigest()
    return f"page {int(digest[:4], 16) % 900} says {digest[4:12]}"


def opening(task: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task["prompt"]}]


def kept(message: Any, history: str) -> Any:
    """A reply as harnesses keep it."""
    match history:
        case "object":
            return message
        case "dump":
            return message.model_dump()
        case "exclude_none":
            return message.model_dump(exclude_none=True)
        case _:
            raise ValueError(history)


def said_of(response: Any) -> Said:
    """A `chat.completion`, of whichever library."""
    choice = response.choices[0]
    calls = [{"id": c.id, "name": c.function.name, "arguments": c.function.arguments} for c in choice.message.tool_calls or ()]
    return {"id": response.id, "content": choice.message.content or "", "tool_calls": calls, "finish": choice.finish_reason}
