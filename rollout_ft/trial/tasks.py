"""Task files: JSON lines, one task a line.

Owns reading them. A broken line is named by its number, before anything is started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import orjson

from rollout_ft.errors import ConfigError
from rollout_ft.types import JSON, TRIAL_ID

MAX_GROUP_ID = 256
QUICKSTART = "examples/tasks/quickstart.jsonl"


def read_tasks(path: str | Path) -> list[JSON]:
    """All tasks of a file. Raises ConfigError with the line's number."""
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise ConfigError(f"trial.tasks: {path}: {e.strerror}") from None
    tasks: list[JSON] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        task = _task(line, f"{path}, line {number}")
        first = seen.setdefault(task["task_id"], number)
        if first != number:
            raise ConfigError(f"{path}, line {number}: task_id {task['task_id']!r} is that of line {first} too")
        tasks.append(task)
    if not tasks:
        raise ConfigError(f"trial.tasks: {path} has no task")
    return tasks


def _task(line: bytes, where: str) -> JSON:
    try:
        value: Any = orjson.loads(line)
    except orjson.JSONDecodeError as e:
        raise ConfigError(f"{where} is not JSON: {e}") from None
    task_id = cast(JSON, value).get("task_id") if isinstance(value, dict) else None
    if not isinstance(task_id, str) or not TRIAL_ID.fullmatch(task_id):
        raise ConfigError(
            f"{where}: a task is an object with a task_id of at most 128 letters, digits and . _ : -, which begins with a letter or digit"
        )
    group_id = cast(JSON, value).get("group_id", "")
    if not isinstance(group_id, str) or len(group_id) > MAX_GROUP_ID:
        raise ConfigError(f"{where}: group_id is text of at most {MAX_GROUP_ID} characters")
    return cast(JSON, value)


def quickstart() -> Path:
    """The shipped tasks: in a checkout where they stand, else where the package has its copy."""
    package = Path(__file__).parent.parent
    packed = package / "testing" / "quickstart.jsonl"
    return packed if packed.exists() else package.parent / QUICKSTART
