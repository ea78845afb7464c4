"""An agent that works in its trial's sandbox: an `openai` client, and `rollout_ft.trial.remote` for its commands.

What the model writes is put down in a file of the sandbox; the reward is what a command finds there in the end.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import openai

from rollout_ft.trial import remote


def play(task: dict[str, Any]) -> float:
    client = openai.OpenAI()
    messages: list[Any] = [{"role": "user", "content": task["prompt"]}]
    for turn in range(task["turns"]):
        reply = client.chat.completions.create(model="default", messages=messages, max_tokens=task.get("max_tokens", 64))
        said = reply.choices[0].message.content or ""
        # A side effect, and a result that is another each time it is had: it is had once.
        command = f"printf %s {shlex.quote(said)} > page-{turn}; date +%s.%N >> dates; wc -c page-*; tail -n1 dates"
        messages.append({"role": "assistant", "content": said})
        messages.append({"role": "user", "content": remote.step({"command": command})["output"]})
    return float(remote.step({"command": "cat page-* | tr -cd aeiou | wc -c; wc -l < dates"})["output"].split()[0])


if __name__ == "__main__":
    with Path(os.environ["ROLLOUT_FT_TASK"]).open() as file:
        reward = play(json.load(file))
    Path(os.environ["ROLLOUT_FT_RESULT"]).write_text(json.dumps({"reward": reward}))
