"""`examples/openai-tool-loop/agent.py` as it is, with points around its model's call and its tool at which it may be killed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import kill_points
from openai.resources.chat.completions import Completions

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "openai-tool-loop"))
import agent

create, note = Completions.create, agent.note
turn = 0


def killed_around_create(*args: Any, **kwargs: Any) -> Any:
    global turn
    turn += 1
    kill_points.reach("before", turn)
    response = create(*args, **kwargs)
    kill_points.reach("reply", turn)
    return response


def killed_around_note(notebook: Path, line: str) -> str:
    kill_points.ran(turn)
    if kill_points.armed("tool", turn).exists():
        with notebook.open("a") as file:
            file.write('"half a li')
        kill_points.reach("tool", turn)
    result = note(notebook, line)
    kill_points.reach("after", turn)
    return result


Completions.create, agent.note = killed_around_create, killed_around_note  # type: ignore[method-assign]
agent.main()
