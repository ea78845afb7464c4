"""The agent of the quickstart: an `openai` client, a loop, and a tool whose result depends on what the model wrote.

Owns nothing of rollout_ft: it is what a user brings, with the SDK's own timeouts and retries, and knows only a base
URL. The same task and the same replies give the same tool results and the same reward.
"""

from __future__ import annotations

import hashlib
from typing import Any

import openai
from openai import Omit

LOOK_UP: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up in the notebook",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}


def look_up(query: str) -> str:
    """What the notebook says: a function of the query alone."""
    digest = hashlib.sha256(query.encode()).hexdigest()
    return f"page {int(digest[:4], 16) % 900} says {digest[4:12]}"


def run(task: dict[str, Any], base_url: str, api_key: str) -> float:
    """Plays one trial; returns a reward between 0 and 1 that depends on every reply."""
    hidden: Any = {"X-Stainless-Read-Timeout": Omit()} if task.get("hide_timeout") else {}
    client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=task.get("timeout_s", 60.0), default_headers=hidden)
    messages: list[Any] = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": task["prompt"]}]
    said: list[str] = []
    for _ in range(task["turns"]):
        reply = ask(client, messages, task)
        messages.append(reply)
        said.append((reply.get("content") or "") + "".join(c["function"]["arguments"] for c in reply.get("tool_calls") or ()))
        if reply.get("tool_calls"):
            for call in reply["tool_calls"]:
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": look_up(call["function"]["arguments"])})
        else:
            messages.append({"role": "user", "content": f"The notebook: {look_up(said[-1])}. Go on."})
    client.close()
    return int(hashlib.sha256("".join(said).encode()).hexdigest()[:4], 16) / 0xFFFF


def ask(client: openai.OpenAI, messages: list[Any], task: dict[str, Any]) -> dict[str, Any]:
    """One turn, streamed where the task says so."""
    create: Any = client.chat.completions.create
    common: Any = {"model": "default", "messages": messages, "max_tokens": task.get("max_tokens", 64)}
    common |= {} if task.get("no_tools") else {"tools": [LOOK_UP]}
    if not task.get("stream"):
        return create(**common).choices[0].message.model_dump(exclude_none=True)
    reply: dict[str, Any] = {"role": "assistant", "content": ""}
    for chunk in create(**common, stream=True):
        delta = chunk.choices[0].delta
        reply["content"] += delta.content or ""
        for call in delta.tool_calls or ():
            reply.setdefault("tool_calls", []).append(call.model_dump(exclude={"index"}))
    return reply
