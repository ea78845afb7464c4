"""An agent in a process of its own whose tools act on its trial's environment: an `openai` client and `trial.remote`.

`task["die"]` says where it kills itself in its first attempt: `before:N` its N-th request, `between:N` the result of its N-th tool
and the next request. What it does follows from what it was told, so that the same replies make the same trial.
"""

from __future__ import annotations

import hashlib
import os
import signal
from typing import Any

import openai

from rollout_ft.trial import remote


def run(task: dict[str, Any], base_url: str, api_key: str) -> float:
    client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=60)
    messages = remote.messages() if task.get("from_messages") else []
    turn = sum(message["role"] == "assistant" for message in messages)
    messages = messages or [{"role": "user", "content": task["prompt"]}]
    result = use(messages[-1]["content"], turn) if turn else ""
    if turn:
        messages.append({"role": "user", "content": result})
    for number in range(turn + 1, task["turns"] + 1):
        die(task, f"before:{number}")
        create: Any = client.chat.completions.create
        said = create(model="default", messages=messages, max_tokens=task["max_tokens"]).choices[0].message.content or ""
        messages.append({"role": "assistant", "content": said})
        result = use(said, number)
        messages.append({"role": "user", "content": result})
        die(task, f"between:{number}")
    return int(hashlib.sha256(result.encode()).hexdigest()[:4], 16) / 0xFFFF


def use(said: str, number: int) -> str:
    """A tool that changes the sandbox, and tells all that was done in it."""
    word = hashlib.sha256(said.encode()).hexdigest()[:8]
    return remote.step({"command": f"echo {number} {word} >> log; cat log", "number": number})["output"]


def die(task: dict[str, Any], where: str) -> None:
    if task.get("die") == where and os.environ["ROLLOUT_FT_ATTEMPT"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
