"""A tool loop as people write it, on the `openai` package and nothing else.

Where the model is and who it is comes from the environment, which the client reads by itself. Its tool has a side effect: it
writes to a notebook, in the directory that every attempt finds empty.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import openai

SYSTEM = "Work in small steps. Write what you find into the notebook."
NOTE: Any = {
    "type": "function",
    "function": {
        "name": "note",
        "description": "Writes a line into the notebook and says what is in it",
        "parameters": {"type": "object", "properties": {"line": {"type": "string"}}, "required": ["line"]},
    },
}


def note(notebook: Path, line: str) -> str:
    """The tool."""
    with notebook.open("a") as file:
        file.write(json.dumps(line) + "\n")
    lines = notebook.read_text().splitlines()
    return f"the notebook has {len(lines)} lines, the last of {len(line)} characters"


def play(task: dict[str, Any], notebook: Path) -> float:
    """One attempt; returns the reward."""
    client = openai.OpenAI()
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": task["prompt"]}]
    for _ in range(task["turns"]):
        reply = client.chat.completions.create(
            model="default", messages=messages, tools=[NOTE], max_tokens=task.get("max_tokens", 64)
        ).choices[0].message  # fmt: skip
        messages.append(reply)
        for call in reply.tool_calls or ():
            messages.append({"role": "tool", "tool_call_id": call.id, "content": note(notebook, call.function.arguments)})
        if not reply.tool_calls:
            messages.append({"role": "user", "content": f"{note(notebook, reply.content or '')}. Go on."})
    return grade(notebook.read_text())


def grade(notebook: str) -> float:
    """Between 0 and 1, and of every line: a stand-in for tests that pass or do not."""
    return int(hashlib.sha256(notebook.encode()).hexdigest()[:4], 16) / 0xFFFF


def main() -> None:
    task = json.loads(Path(os.environ["ROLLOUT_FT_TASK"]).read_text())
    reward = play(task, Path(os.environ["ROLLOUT_FT_DIR"]) / "notebook")
    Path(os.environ["ROLLOUT_FT_RESULT"]).write_text(json.dumps({"reward": reward}))


if __name__ == "__main__":
    main()
