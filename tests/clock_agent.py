"""An agent whose observations have the time in them, and that is killed once, half-way: between a reply and the next request."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import openai
import orjson

from rollout_ft.telemetry.lines import Lines, read_lines


def run(task: dict[str, Any], base_url: str, api_key: str) -> float:
    """Plays `turns` turns; is killed behind turn `kill_at` of its first life. `clocks`: what the time is said to be."""
    client, notes = openai.OpenAI(base_url=base_url, api_key=api_key), Path(task["notes"])
    first, clocks, said = not notes.exists(), Lines(notes), ""
    messages: list[Any] = [{"role": "user", "content": "begin"}]
    for turn in range(task["turns"]):
        create: Any = client.chat.completions.create
        reply = create(model="default", messages=messages, max_tokens=24).choices[0].message.model_dump(exclude_none=True)
        said += reply["content"]
        clock = task["clocks"][turn] if task.get("clocks") else f"{time.time():.6f}"
        clocks.append({"first": first, "clock": clock})
        if first and turn == task["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        messages += [reply, {"role": "user", "content": f"at {clock} the notebook says {hashlib.sha256(said.encode()).hexdigest()}"}]
    client.close()
    return int(hashlib.sha256(said.encode()).hexdigest()[:4], 16) / 0xFFFF


def clocks_of(notes: Path) -> tuple[list[str], list[str]]:
    """What the first life read, and what the second did."""
    found: list[Any] = [orjson.loads(orjson.dumps(line)) for line in read_lines(notes)]
    return [n["clock"] for n in found if n["first"]], [n["clock"] for n in found if not n["first"]]
