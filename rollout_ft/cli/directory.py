"""The directory of a run: what makes it this run, whichever process goes on with it.

Owns `DIR/config.json` (what the run was started with), `DIR/tasks.jsonl` (its tasks as they were), `DIR/secret` (what its
keys are derived from, for its user's eyes alone) and the lock. Knows nothing of trials. `config.json` is written last:
a directory without one has no run in it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import orjson

from rollout_ft.checkpoint.journal import journal_names
from rollout_ft.config import Config, known_keys, load
from rollout_ft.errors import ConfigError
from rollout_ft.trial.tasks import read_tasks
from rollout_ft.types import JSON

SAMPLED_BY = (
    "run", "seed", "model", "engine.kind", "session.on_concurrent", "session.on_repeat", "session.matcher",
    "session.normalizers", "session.max_output_tokens", "session.special_tokens_in_text", "sampling", "samples", "store.journal_dir",
    "trial.agent", "trial.command", "trial.recovery", "trial.on_divergence", "trial.environment", "trial.record_tools",
    "trial.group_size", "trial.on_lost_member", "trial.max_replacements", "trial.min_group_size",
)  # fmt: skip
"""What makes the data, or says where it is: the same for the whole of a run."""
LOCK_TRIES, LOCK_AGAIN_S = 3, 0.05
DOUBTFUL = ("engine.args", "engine.env")
"""What may make the data: only who starts the engines knows."""


@dataclass(frozen=True, slots=True)
class Directory:
    """A run's directory, locked by this process until it ends. `resumed`: the run was started by an earlier one."""

    path: Path
    config: Config
    tasks: list[JSON]
    secret: str
    resumed: bool
    warnings: tuple[str, ...] = ()

    @property
    def effective(self) -> Config:
        """The config with the journal where this run has it."""
        return with_journal(self.config, self.path)


def with_journal(config: Config, directory: Path) -> Config:
    """`store.journal_dir` as an absolute path, so that it means the same on every node; `DIR/journal` unless it is set."""
    named = config.store.journal_dir or str(directory / "journal")
    where = named if named == "none" else str(Path(named).absolute())
    return config.model_copy(update={"store": config.store.model_copy(update={"journal_dir": where})})


def saved_config(directory: Path, overrides: list[str] | None = None) -> Config:
    """What the run in `directory` was started with. Raises ConfigError where there is none."""
    if not (directory / "config.json").exists():
        raise ConfigError(f"{directory} has no run in it (no config.json)")
    return load(directory / "config.json", overrides)


def tasks_of(directory: Path) -> list[JSON]:
    """The tasks of the run as they were; none where somebody else has them. Raises ConfigError."""
    file = directory / "tasks.jsonl"
    return read_tasks(file) if not file.exists() or file.stat().st_size else []


def has_run(directory: Path) -> bool:
    return (directory / "config.json").exists()


def create(path: Path, config: Config, tasks: list[JSON]) -> Directory:
    """Makes a run of an empty directory. Raises ConfigError where it is not."""
    path.mkdir(parents=True, exist_ok=True)
    _lock(path)
    if (path / "trials.jsonl").exists():
        raise ConfigError(f"--output: {path} has results and no config.json: no run can go on there; choose an empty directory")
    where = with_journal(config, path).store.journal_dir
    if any(name.startswith(f"{config.run}/") for name in journal_names(where)):
        raise ConfigError(f"store.journal_dir: {where} has the journal of a run called {config.run}; choose another, or another `run`")
    _write(path / "tasks.jsonl", b"".join(orjson.dumps(task) + b"\n" for task in tasks))
    secret = secrets.token_hex(32)
    _write(path / "secret", secret.encode())
    _write(path / "config.json", _dump(config))
    return Directory(path, config, tasks, secret, resumed=False)


def reopen(path: Path, config: Config) -> Directory:
    """The run that is in a directory, under `config`. Raises ConfigError naming the key that may not change."""
    _lock(path)
    saved = saved_config(path)
    tasks = tasks_of(path)
    changed = differences(saved, config)
    for key in changed:
        if _within(key, SAMPLED_BY):
            raise ConfigError(f"{key}: the run in {path} was started with another; leave it, or choose an empty directory")
    if "trial.tasks" in changed and read_tasks(config.trial.tasks) != tasks:
        raise ConfigError(f"trial.tasks: {config.trial.tasks} has other tasks than the run in {path}; choose an empty directory")
    warnings = [f"{key} is not what the run was started with: both have to sample alike" for key in changed if _within(key, DOUBTFUL)]
    if changed:
        _write(path / "config.json", _dump(config))
    return Directory(path, config, tasks, secret_of(path), resumed=True, warnings=tuple(warnings))


def differences(one: Config, other: Config) -> list[str]:
    """The keys, dotted, whose values differ; a section is its keys."""
    keys = known_keys()
    sections = {key.rpartition(".")[0] for key in keys}
    return [key for key in keys if key not in sections and attrgetter(key)(one) != attrgetter(key)(other)]


def _within(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def secret_of(path: Path) -> str:
    """What the keys of the run in `path` are derived from. Raises ConfigError."""
    file = path / "secret"
    try:
        if file.stat().st_mode & 0o077:
            raise ConfigError(f"{file} can be read by others than its user, and opens every session: chmod 600 {file}")
        return file.read_text()
    except OSError as e:
        raise ConfigError(f"{file}: {e.strerror}; without it the keys of this run cannot be made again") from None


def held(path: Path) -> bool:
    """Whether a process that lives has the run in `path`."""
    try:
        lock = os.open(path / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _lock(path: Path) -> None:
    """Until this process ends: the file descriptor is let go of by nothing else. Tries again, as who only asks (`held`) has it for
    an instant."""
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for tries_left in reversed(range(LOCK_TRIES)):
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if tries_left:
                time.sleep(LOCK_AGAIN_S)
    os.close(lock)
    raise ConfigError(f"another process runs the run in {path}; stop it first")


def _dump(config: Config) -> bytes:
    return orjson.dumps(config.model_dump(mode="json"), option=orjson.OPT_INDENT_2)


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, and for its user alone: a config may hold what engines need to be started with."""
    temporary = path.with_name(path.name + ".tmp")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(file, "wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(file)
    os.replace(temporary, path)
