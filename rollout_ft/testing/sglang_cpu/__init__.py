"""The real SGLang on a CPU, for tests and for trying things out without a GPU.

Owns the command that starts it from an environment that has it (tests/sglang/requirements.txt says what that takes;
`make .venvs/sglang/.installed` makes one). `launch.py` is `sglang.launch_server` with stand-ins for the two packages
that have no CPU build; `models.py` writes model folders from packages alone. Both are run by their path, in that
environment, and know nothing of this package.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["CPU_ARGS", "launch_command", "models_command"]

CPU_ARGS = (
    "--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32", "--mem-fraction-static", "0.3",
    "--max-total-tokens", "65536", "--skip-server-warmup", "--sleep-on-idle",
)  # fmt: skip
"""Server arguments that a CPU needs; float32, so that a continuation repeats the tokens of the whole. An
idle scheduler would take a whole core to look for work."""


def launch_command(python: str) -> list[str]:
    """The program that `engine.command` names: to be followed by arguments of `sglang.launch_server`."""
    return [python, str(Path(__file__).with_name("launch.py"))]


def models_command(python: str, kind: str, directory: Path) -> list[str]:
    """Writes the model folder `directory`; `kind` is `tiny` or `smollm2`."""
    return [python, str(Path(__file__).with_name("models.py")), kind, str(directory)]
