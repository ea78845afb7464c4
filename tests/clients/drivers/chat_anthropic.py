"""`anthropic`, any version: `messages.create` and `messages.stream`, replies kept as the SDK's content blocks."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import talk

LOOK_UP: Any = {"name": "look_up", "description": talk.DESCRIPTION, "input_schema": talk.PARAMETERS}


class AnthropicChat:
    def __init__(self, task: dict[str, Any]):
        own: dict[str, Any] = {} if task["retries"] is None else {"max_retries": task["retries"]}
        base = task["base_url"].removesuffix("/v1")  # the SDK adds it
        self._client = anthropic.Anthropic(base_url=base, api_key=task["api_key"], timeout=task["timeout_s"], **own)
        self._messages: list[Any] = [{"role": "user", "content": task["prompt"]}]
        self._task = task

    def ask(self, headers: dict[str, str]) -> talk.Said:
        task = self._task
        request: dict[str, Any] = {
            "model": "default", "system": talk.SYSTEM, "messages": self._messages, "max_tokens": task["max_tokens"],
            "extra_headers": headers,
        }  # fmt: skip
        if task["tools"]:
            request["tools"] = [LOOK_UP]
        if task["stream"]:
            with self._client.messages.stream(**request) as stream:
                response = stream.get_final_message()
        else:
            response = self._client.messages.create(**request)
        content: Any = response.content if task["history"] == "object" else [talk.kept(b, task["history"]) for b in response.content]
        self._messages.append({"role": "assistant", "content": content})
        return said_of(response)

    def hear_results(self, results: list[tuple[str, str]]) -> None:
        blocks = [{"type": "tool_result", "tool_use_id": i, "content": text} for i, text in results]
        self._messages.append({"role": "user", "content": blocks})

    def hear(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})


def said_of(response: Any) -> talk.Said:
    text = "".join(block.text for block in response.content if block.type == "text")
    calls = [{"id": b.id, "name": b.name, "arguments": json.dumps(b.input)} for b in response.content if b.type == "tool_use"]
    return {"id": response.id, "content": text, "tool_calls": calls, "finish": response.stop_reason}


if __name__ == "__main__":
    talk.main(AnthropicChat)
