"""The agent that the drivers of trainers give to our adapters: a tool loop of the `openai` client, and the ways it can fail.

Owns nothing of rollout_ft. The same replies give the same tool results and the same reward. `fail` in a row's fields:
`[kind, turn, times]`: at that turn it raises what a client raises that gave up (`infra`) or an error of its own (`bug`), that
many times in this process. `compact`: at that turn it goes on from a summary instead of the conversation.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import httpx
import openai

LOOK_UP: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up in the notebook",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]},
    },
}
calls: Counter[str] = Counter()
"""How often the agent was started, by trial."""
_failed: Counter[str] = Counter()


def look_up(query: str) -> str:
    """What the notebook says: a function of the query alone."""
    digest = hashlib.sha256(query.encode()).hexdigest()
    return f"page {int(digest[:4], 16) % 900} says {digest[4:12]}"


async def run(task: dict[str, Any], session: Any) -> float | None:
    fields, trial_id = task["fields"], session.trial_id
    calls[trial_id] += 1
    kind, failing, times = fields.get("fail") or ("", 0, 0)
    messages, said = [dict(message) for message in task["messages"]], ""
    async with openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, timeout=60) as client:
        for turn in range(1, int(fields.get("turns", 3)) + 1):
            if turn == failing and _failed[trial_id] < times:
                _failed[trial_id] += 1
                raise openai.APIConnectionError(request=httpx.Request("POST", session.base_url)) if kind == "infra" else ValueError(kind)
            if turn == fields.get("compact"):
                messages = [dict(message) for message in task["messages"]] + [{"role": "user", "content": f"So far: {look_up(said)}."}]
            reply = await client.chat.completions.create(model="default", messages=messages, tools=[LOOK_UP], max_tokens=64)
            message = reply.choices[0].message
            messages.append(message.model_dump(exclude_none=True))
            said += (message.content or "") + "".join(call.function.arguments for call in message.tool_calls or ())
            for call in message.tool_calls or ():
                messages.append({"role": "tool", "tool_call_id": call.id, "content": look_up(call.function.arguments)})
            if not message.tool_calls:
                messages.append({"role": "user", "content": f"The notebook: {look_up(said)}. Go on."})
    return None if fields.get("unscored") else int(hashlib.sha256(said.encode()).hexdigest()[:4], 16) / 0xFFFF
