"""The agent of `rollout-ft bench trial`: a plain `openai` loop that ends itself once, at its last turn but one.

Owns the note of when it came there, and of what the engines had sampled by then. Knows nothing of how it is restarted: each of
its lives does the same, but for a clock in its messages where the task wants one.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import openai
import orjson

from rollout_ft.cli.demo import sampled
from rollout_ft.clock import monotonic
from rollout_ft.telemetry.lines import Lines, read_lines


def run(task: dict[str, Any], base_url: str, api_key: str) -> float:
    """Plays `turns` turns with `text` between them."""
    notes, client = Path(task["notes"]), openai.OpenAI(base_url=base_url, api_key=api_key)
    messages: list[Any] = []
    for turn in range(task["turns"]):
        if turn == task["turns"] - 1:
            lives = len(read_lines(notes))
            Lines(notes).append({"at": monotonic(), "tokens": sampled(notes.parent)})
            if not lives:
                os.kill(os.getpid(), signal.SIGKILL)
        clock = f"{time.time():.6f} " if task["clock"] else ""
        messages.append({"role": "user", "content": f"{clock}{turn} {task['text']}"})
        create: Any = client.chat.completions.create
        messages.append(create(model="default", messages=messages).choices[0].message.model_dump(exclude_none=True))
    client.close()
    return 1.0


def lives(notes: Path) -> list[tuple[float, int]]:
    """When each life came to its last turn but one, and the tokens that had been sampled by then."""
    return [(orjson.loads(line)["at"], orjson.loads(line)["tokens"]) for line in notes.read_bytes().splitlines()]
