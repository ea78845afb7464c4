"""mini-swe-agent's `LitellmModel`, queried as its `DefaultAgent` does.

Its messages are its own (`extra` beside litellm's dump), and a reply without a usable action is a FormatError: the
agent keeps the error and drops the reply. The model here calls `look_up`, which stands where `bash` does. Of the waits
between its ten tries (4 to 60 s, no setting) a hundredth is slept.
"""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import Any

import minisweagent.models.litellm_model as library
import talk
import tenacity.nap
from minisweagent.exceptions import FormatError

tenacity.nap.time = SimpleNamespace(sleep=lambda s: time.sleep(s / 100))  # type: ignore[assignment]
library.BASH_TOOL = talk.LOOK_UP


class Model(library.LitellmModel):
    def _parse_actions(self, response: Any) -> list[dict[str, Any]]:
        for call in response.choices[0].message.tool_calls or ():
            if call.function.name == "look_up":
                call = SimpleNamespace(id=call.id, function=SimpleNamespace(name="bash", arguments=call.function.arguments))
                call.function.arguments = json.dumps({"command": json.loads(call.function.arguments)["query"]})
                return library.parse_toolcall_actions([call], format_error_template=self.config.format_error_template)
        return super()._parse_actions(response)


class MiniSweAgentChat:
    def __init__(self, task: dict[str, Any]):
        kwargs = {
            "api_base": task["base_url"], "api_key": task["api_key"], "timeout": task["timeout_s"],
            "max_tokens": task["max_tokens"], "drop_params": True,
        }  # fmt: skip
        if task["retries"] is not None:
            kwargs["num_retries"] = task["retries"]
        self._model = Model(model_name="openai/default", model_kwargs=kwargs, cost_tracking="ignore_errors")
        self._messages = [self._model.format_message(**message) for message in talk.opening(task)]

    def ask(self, headers: dict[str, str]) -> talk.Said:
        try:
            message = self._model.query(self._messages, **({"extra_headers": headers} if headers else {}))
        except FormatError as e:
            self._messages += e.messages
            return {**said_of(e.messages[0]["extra"]["response"]), "rejected": True}
        self._messages.append(message)
        return said_of(message["extra"]["response"])

    def hear_results(self, results: list[tuple[str, str]]) -> None:
        outputs = [{"output": text, "returncode": 0, "exception_info": ""} for _, text in results]
        self._messages += self._model.format_observation_messages(self._messages[-1], outputs)

    def hear(self, text: str) -> None:
        raise AssertionError("a reply without an action is a FormatError")


def said_of(response: dict[str, Any]) -> talk.Said:
    choice = response["choices"][0]
    calls = [{"id": c["id"], **c["function"]} for c in choice["message"].get("tool_calls") or ()]
    return {"id": response["id"], "content": choice["message"]["content"] or "", "tool_calls": calls, "finish": choice["finish_reason"]}


if __name__ == "__main__":
    talk.main(MiniSweAgentChat)
