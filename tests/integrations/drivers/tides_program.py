"""The program of a rollout: a tool loop of the `openai` client, which knows nothing of who serves it."""

from __future__ import annotations

import json
import sys
from typing import Any

import openai
from tool_agent import LOOK_UP, look_up


def main() -> int:
    asked = json.loads(sys.argv[1])
    turn_of_failure, code = asked["failing"]
    client = openai.OpenAI(base_url=asked["base_url"], api_key=asked["api_key"], timeout=60)
    messages: list[Any] = [{"role": "user", "content": asked["prompt"]}]
    for turn in range(1, asked["turns"] + 1):
        if turn == turn_of_failure:
            return code
        reply = client.chat.completions.create(model="default", messages=messages, tools=[LOOK_UP], max_tokens=64)
        message = reply.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or ():
            messages.append({"role": "tool", "tool_call_id": call.id, "content": look_up(call.function.arguments)})
        if not message.tool_calls:
            messages.append({"role": "user", "content": f"The notebook: {look_up(message.content or '')}. Go on."})
    return 0


if __name__ == "__main__":
    sys.exit(main())
