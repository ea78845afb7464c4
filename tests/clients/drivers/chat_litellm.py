"""`litellm.completion`, with and without `num_retries`: replies kept as litellm's own messages, extra fields included."""

from __future__ import annotations

from typing import Any

import litellm
import talk


class LitellmChat:
    def __init__(self, task: dict[str, Any]):
        self._messages: list[Any] = talk.opening(task)
        self._task = task

    def ask(self, headers: dict[str, str]) -> talk.Said:
        task = self._task
        request: dict[str, Any] = {
            "model": "openai/default", "api_base": task["base_url"], "api_key": task["api_key"], "messages": self._messages,
            "max_tokens": task["max_tokens"], "timeout": task["timeout_s"],
        }  # fmt: skip
        if task["retries"] is not None:
            request["num_retries"] = task["retries"]
        if task["tools"]:
            request["tools"] = [talk.LOOK_UP]
        if headers:
            request["extra_headers"] = headers
        response: Any = litellm.completion(**request, stream=task["stream"])
        if task["stream"]:
            response = litellm.stream_chunk_builder(list(response), messages=self._messages)
        self._messages.append(talk.kept(response.choices[0].message, task["history"]))
        return talk.said_of(response)

    def hear_results(self, results: list[tuple[str, str]]) -> None:
        self._messages += [{"role": "tool", "tool_call_id": i, "content": text} for i, text in results]

    def hear(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})


if __name__ == "__main__":
    talk.main(LitellmChat)
