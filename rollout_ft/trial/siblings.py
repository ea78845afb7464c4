"""Which trials the tasks of a run make, and which of them are siblings.

Owns their names and their seeds. Pure. A name says all that there is to know of a trial's place in its group, so that whoever
goes on with a run names the same trials.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from rollout_ft.config import TrialConfig
from rollout_ft.errors import ConfigError
from rollout_ft.types import JSON, TRIAL_ID

_REPLACEMENT = re.compile(r"(?P<place>.+)\.r(?P<number>[1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Play:
    """One trial of a task. `group_id` is empty for a trial that has no siblings; `replaces` is whose place it takes."""

    trial_id: str
    group_id: str
    task: JSON
    replaces: str = ""


def plays(tasks: Sequence[JSON], config: TrialConfig, prefix: str = "") -> list[Play]:
    """All trials, siblings one after the other. Raises ConfigError where two would have one name, or two groups one id."""
    made = [play for task in tasks for play in _of_task(task, config.group_size, prefix)]
    names = {play.trial_id for play in made}
    if len(names) < len(made):
        raise ConfigError(
            f"two trials would be called {Counter(play.trial_id for play in made).most_common(1)[0][0]}; choose another task_id"
        )
    longest = max(names, key=len, default="x")
    if config.max_replacements:
        longest = replacement_id(longest, config.max_replacements)
        if taken := [name for name in names if place_of(name)[0] in names and place_of(name)[1]]:
            raise ConfigError(f"task_id {taken[0]} is what a trial in place of {place_of(taken[0])[0]} is called; choose another")
    if not TRIAL_ID.fullmatch(longest):
        raise ConfigError(f"{longest} would be the name of a trial, and does not match {TRIAL_ID.pattern}; choose a shorter task_id")
    ours = {prefix + str(task["task_id"]) for task in tasks if config.group_size > 1 and not task.get("group_id")}
    if theirs := ours & {str(task["group_id"]) for task in tasks if task.get("group_id")}:
        raise ConfigError(f"group_id {min(theirs)} is a task_id too, and trial.group_size makes a group of it; choose another group_id")
    return made


def replacement_id(place: str, number: int) -> str:
    """What the trial is called that is played in the place of one that was lost, the `number`th there."""
    return f"{place}.r{number}"


def place_of(trial_id: str) -> tuple[str, int]:
    """The place that a trial is named after, and the how manyth in it this one is; 0 for the one that had it first."""
    found = _REPLACEMENT.fullmatch(trial_id)
    return (found["place"], int(found["number"])) if found else (trial_id, 0)


def replacement(first: Play, number: int, replaces: str) -> Play:
    """Another trial in the place of `first`."""
    return replace(first, trial_id=replacement_id(first.trial_id, number), task=_sown(first.task, f"r{number}"), replaces=replaces)


def _of_task(task: JSON, group_size: int, prefix: str) -> list[Play]:
    name, group_id = prefix + str(task["task_id"]), str(task.get("group_id") or "")
    if group_size == 1 or group_id:
        return [Play(name, group_id, task)]
    return [Play(f"{name}.{k}", name, {**_sown(task, str(k)), "group_id": name}) for k in range(group_size)]


def _sown(task: JSON, which: str) -> JSON:
    """Siblings that share a seed are one sample many times: of a task with a seed each has its own, made of it."""
    if task.get("seed") is None:
        return task
    digest = blake2b(f"{task['seed']}|{which}".encode(), digest_size=8).digest()
    return {**task, "seed": int.from_bytes(digest, signed=True)}
