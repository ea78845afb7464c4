"""Trials: what is played, how often what is lost is begun again, and what becomes of its group.

Owns the keys `trial.…`, and which of them go together. Knows neither tasks nor agents but by name. An attempt is an agent
or a command, and a key about groups that would decide nothing is refused.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rollout_ft.config.base import Seconds, Settings
from rollout_ft.types import Recovery

MIN_GROUP_SIZE = 2
"""A trial alone has no baseline."""


class TrialConfig(Settings):
    recovery: Recovery = Recovery.RESUME
    max_restarts: int = Field(default=8, ge=0)
    """Attempts after the first that infrastructure faults may cost; then the outcome is `infra_exhausted`."""
    max_env_restarts: int = Field(default=3, ge=0)
    """How often a trial's environment may be lost and replaced, with its agent or under it; then the outcome is `env_failed`."""
    max_agent_restarts: int = Field(default=1, ge=0)
    """Attempts after the first that an agent gets that raised or was stuck, and nobody knows why; then it is `agent_failed`."""
    attempt_timeout_s: Seconds = 3600
    """How long an attempt may take, the time left out in which the trainer kept the engines still; then it is `truncated`."""
    turn_timeout_s: Seconds | None = None
    """How long a turn may be generated for; then the trial is `truncated`. Engines that stand still are found without it."""
    agent_idle_s: Seconds = 1800
    """An agent that waits for neither a turn nor a tool of its environment for so long is stuck."""
    environment: str = ""
    """`module:function`, from (task, trial_id, directory) to the environment that the agent's tools act on;
    `rollout_ft.trial.sandbox:local` is the one that comes with this."""
    sandbox_dir: str = ""
    """Where environments keep what outlives processes, in a directory of the run's name; else in `DIR/sandboxes`, or without a
    DIR in a temporary one."""
    record_tools: bool = True
    """Results of an environment's steps are committed, and an agent that replays gets them from there."""
    snapshot_every_steps: int = Field(default=1, ge=1)
    """Of environments that can be saved: steps behind the last snapshot are taken again."""
    tool_timeout_s: Seconds = 600
    """How long an environment may take for a step; then it is lost."""
    concurrency: int = Field(default=16, ge=1)
    agent: str = ""
    """`module:function`, called with (task, base_url, api_key) in a process of its own."""
    command: list[str] = []
    """Or a program with its arguments, each attempt in a process group of its own: see `rollout_ft.trial.commands`."""
    tasks: str = ""
    """A JSON-lines file: one task a line, each with a `task_id`."""
    max_version_restarts: int = Field(default=100, ge=0)
    """How often a trial starts from scratch for `session.version_policy` or `session.max_staleness`; more, and trials take
    longer than the trainer's updates leave them."""
    max_lost: int = Field(default=0, ge=0)
    """How many lost trials `run` tolerates before it exits with 1. One that was replaced is not counted."""
    on_divergence: Literal["branch", "fail", "serve"] = "branch"
    """What a request of a replay gets that is not the recorded one: `branch` goes on live behind the last turn in common;
    `fail` ends the trial, and its cause says what differs first; `serve` gives the recorded reply where only texts of tools or
    users differ, and the trajectory stays the record's, else it branches. `session.normalizers` come before."""
    group_size: int = Field(default=1, ge=1)
    """How often each task is played; more than 1, and its trials `{task_id}.0`, `{task_id}.1`, … are a group. A task that names its
    own `group_id` is a member of that group, and is played once."""
    on_lost_member: Literal["complete", "shrink", "drop"] = "shrink"
    """What becomes of a group of which a trial is lost to infrastructure or environment, or cancelled: another is played in its
    place; the others are the group; none of it counts, and those of it that wait are not begun."""
    max_replacements: int = Field(default=0, ge=0)
    """For `complete`, in a group: one lost trial more, and it is dropped."""
    min_group_size: int = Field(default=MIN_GROUP_SIZE, ge=1)
    """For `shrink`: with fewer trials left a group is dropped."""

    @model_validator(mode="after")
    def _groups_can_be_decided(self) -> TrialConfig:
        if self.on_lost_member == "complete" and not self.max_replacements:
            raise ValueError("trial.on_lost_member complete needs trial.max_replacements: how many trials of a group may be replaced")
        if self.on_lost_member != "complete" and self.max_replacements:
            raise ValueError(f"trial.max_replacements is for trial.on_lost_member complete, not {self.on_lost_member}")
        if self.on_lost_member != "shrink" and self.min_group_size != MIN_GROUP_SIZE:
            raise ValueError(f"trial.min_group_size is for trial.on_lost_member shrink, not {self.on_lost_member}")
        if self.min_group_size > self.group_size > 1:
            raise ValueError(f"trial.min_group_size {self.min_group_size} is more than trial.group_size {self.group_size}")
        return self

    @model_validator(mode="after")
    def _replays(self) -> TrialConfig:
        if self.on_divergence != "branch" and self.recovery is not Recovery.RESUME:
            raise ValueError(f"trial.on_divergence: with trial.recovery {self.recovery.value} nothing is replayed; leave one of them out")
        return self

    @model_validator(mode="after")
    def _one_agent(self) -> TrialConfig:
        if self.agent and self.command:
            raise ValueError("trial.agent and trial.command are both set, and an attempt is one of them; clear the other: trial.agent=")
        return self
