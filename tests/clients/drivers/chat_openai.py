"""`openai`, any version: the SDK's own timeouts and retries, replies kept as the SDK's message objects or their dumps."""

from __future__ import annotations

from typing import Any

import openai
import talk
from openai.types.chat import ChatCompletionMessage


class OpenAIChat:
    def __init__(self, task: dict[str, Any]):
        own: dict[str, Any] = {} if task["retries"] is None else {"max_retries": task["retries"]}
        self._client = openai.OpenAI(base_url=task["base_url"], api_key=task["api_key"], timeout=task["timeout_s"], **own)
        self._messages: list[Any] = talk.opening(task)
        self._task = task

    def ask(self, headers: dict[str, str]) -> talk.Said:
        task, create = self._task, self._client.chat.completions.create
        request: dict[str, Any] = {
            "model": "default",
            "messages": self._messages,
            "max_tokens": task["max_tokens"],
            "extra_headers": headers,
        }
        if task["tools"]:
            request["tools"] = [talk.LOOK_UP]
        if task["stream"]:
            said = gathered(create(**request, stream=True, stream_options={"include_usage": True}))
            self._messages.append(talk.kept(message_of(said), task["history"]))
            return said
        response = create(**request)
        self._messages.append(talk.kept(response.choices[0].message, task["history"]))
        return talk.said_of(response)

    def hear_results(self, results: list[tuple[str, str]]) -> None:
        self._messages += [{"role": "tool", "tool_call_id": i, "content": text} for i, text in results]

    def hear(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})


def gathered(stream: Any) -> talk.Said:
    """Chunks to a reply, as every harness writes it for itself. A stream without an end is an error."""
    said: talk.Said = {"id": "", "content": "", "tool_calls": [], "finish": None}
    for chunk in stream:
        said["id"] = chunk.id
        for choice in chunk.choices:
            said["content"] += choice.delta.content or ""
            said["finish"] = choice.finish_reason or said["finish"]
            for call in choice.delta.tool_calls or ():
                if call.index == len(said["tool_calls"]):
                    said["tool_calls"].append({"id": call.id, "name": call.function.name, "arguments": ""})
                said["tool_calls"][call.index]["arguments"] += call.function.arguments or ""
    if said["finish"] is None:
        raise EOFError("the stream ended before the reply did")
    return said


def message_of(said: talk.Said) -> ChatCompletionMessage:
    calls: Any = [
        {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in said["tool_calls"]
    ]
    return ChatCompletionMessage.model_validate({"role": "assistant", "content": said["content"], "tool_calls": calls or None})


if __name__ == "__main__":
    talk.main(OpenAIChat)
