"""Whether the SGLang that is installed can be started with a command line, asked of itself.

Owns where the engine's interpreter is found in `engine.command`, and what its answer means. sglang and torch are imported
by that interpreter, in a process that ends; never here. What a command is that starts no Python of this machine is not
guessed: that it could not be asked is an answer.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from rollout_ft.config import Config
from rollout_ft.engine import arguments
from rollout_ft.engine.launch import environment, server_args, user_args
from rollout_ft.engine.ports import FIRSTS, Ports
from rollout_ft.errors import ConfigError

WORKER = Path(__file__).with_name("installed_worker.py")
MINIMUM = (0, 5, 20)
WHY_MINIMUM = "before it abandoned requests run on for minutes, and /ready, by which an engine is seen to serve, does not exist"
ANSWER_S = 120.0
_HARMLESS = frozenset({"env", "numactl", "taskset", "nice", "ionice", "chrt", "stdbuf", "setarch"})
"""Programs that run another in their place and leave nothing behind."""
_PYTHON = re.compile(r"^python(\d+(\.\d+)?)?$")


async def check(config: Config, *, here: bool) -> str:
    """Asks whether an engine of this config can be started; returns why nobody could be asked, else nothing.

    Raises ConfigError when the version or an argument is wrong. `here`: it is on this node that it will be started, so that
    an SGLang that is not there is an error too.
    """
    if config.engine.kind != "sglang":
        return ""
    env, own = environment(config), user_args(config, "engine-0")
    program = config.engine.command or [sys.executable]
    python = interpreter(program, env)
    if not python:
        return f"engine.command: {program[0]} is no Python of this machine, so that nobody can be asked about engine.args"
    answer = await _ask([*python, "-c", WORKER.read_text(), *server_args(config, "engine-0", Ports(FIRSTS[0]))], env)
    if unasked := answer.get("unasked"):
        if here and not config.engine.command:
            raise ConfigError(f"engine.kind sglang: {unasked} (by {sys.executable}); set engine.command to a Python that has it")
        return f"engine.command: SGLang cannot be asked about engine.args by {' '.join(python)}: {unasked}"
    judge(answer, own)
    return ""


def judge(answer: dict[str, Any], user_args: Sequence[str]) -> None:
    """Raises ConfigError unless the version that answered can be used so."""
    version = str(answer["version"])
    if numbers(version) < MINIMUM and any(numbers(version)):  # a checkout has no number
        raise ConfigError(f"engine.kind sglang: SGLang {version} is installed, {'.'.join(map(str, MINIMUM))} is needed: {WHY_MINIMUM}")
    if "wrong" in answer:
        raise ConfigError(f"engine.args: SGLang {version}: {answer['wrong']}")
    given = [str(option) for option in answer["given"]]
    for word in (word.partition("=")[0] for word in user_args if word.startswith("--")):
        if word not in given and word not in arguments.SHORT:
            meant = next((option for option in given if option.startswith(word)), "as SGLang's help has it")
            raise ConfigError(f"engine.args: write {word} in full: {meant}")


def numbers(version: str) -> tuple[int, ...]:
    """`0.5.20.post1` → (0, 5, 20)."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(part or 0) for part in found.groups()) if found else (0, 0, 0)


def interpreter(command: Sequence[str], env: dict[str, str]) -> list[str]:
    """What starts the Python of a command: itself, the one a script names, one behind a harmless program; empty when unknown."""
    first = os.path.basename(command[0])
    if _PYTHON.match(first):
        return [command[0]]
    if first in _HARMLESS:
        at = next((i for i, word in enumerate(command) if _PYTHON.match(os.path.basename(word))), 0)
        return list(command[: at + 1]) if at else []
    path = shutil.which(command[0], path=env.get("PATH"))
    return _named_by(Path(path)) if path else []


def _named_by(script: Path) -> list[str]:
    with script.open("rb") as f:
        head = f.readline(1024).decode(errors="replace")
    words = head[2:].split() if head.startswith("#!") else []
    return words if words and any(_PYTHON.match(os.path.basename(word)) for word in words[:2]) else []


async def _ask(command: list[str], env: dict[str, str]) -> dict[str, Any]:
    try:
        process = await asyncio.create_subprocess_exec(
            *command, env=env, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
    except OSError as e:
        return {"unasked": f"{command[0]}: {e.strerror}"}
    try:
        async with asyncio.timeout(ANSWER_S):
            out, _ = await process.communicate()
        return orjson.loads(out)
    except TimeoutError:
        return {"unasked": f"no answer within {ANSWER_S:g} s"}
    except orjson.JSONDecodeError:
        return {"unasked": f"{command[0]} ended with {process.returncode} and no answer"}
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
