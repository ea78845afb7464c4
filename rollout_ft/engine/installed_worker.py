"""The program that asks an installed SGLang about a command line: its text is run with the engine's own interpreter.

Owns the import of sglang, of which only the argument parser is loaded. Knows nothing of this package, prints one line of
JSON, and has to be understood by every Python that SGLang runs on.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import types
from typing import Any, NoReturn


class _Wrong(Exception):
    pass


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Wrong(message)


def parser() -> Any:
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("sglang is not installed")
    package = types.ModuleType("sglang")  # its own __init__ imports everything
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["sglang"] = package
    server_args: Any = importlib.import_module("sglang.srt.server_args")
    made = _Parser(prog="sglang", add_help=False)
    server_args.ServerArgs.add_cli_args(made)
    return made


def version() -> str:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "of no version"


def judge(made: Any, words: list[str]) -> dict[str, Any]:
    """`wrong`: what is wrong with them; `given`: the full name of every option, as it is known."""
    for action in made._actions:
        action.default = argparse.SUPPRESS
    try:
        found, unknown = made.parse_known_args(words)
    except _Wrong as e:
        return {"wrong": str(e)}
    if options := [word.partition("=")[0] for word in unknown if word.startswith("-")]:
        known = [option for action in made._actions for option in action.option_strings]
        near = difflib.get_close_matches(options[0], known, n=1, cutoff=0.0)
        return {"wrong": f"{options[0]} is not known; did you mean {near[0]}?"}
    if unknown:
        return {"wrong": f"{unknown[0]} belongs to no argument"}
    given = [action.option_strings for action in made._actions if hasattr(found, action.dest)]
    return {"given": [option for options in given for option in options]}


def main(words: list[str]) -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what is printed meanwhile is no answer
    try:
        answer = judge(parser(), words)
        answer["version"] = version()
    except BaseException as e:
        answer = {"unasked": f"{type(e).__name__}: {e}"[:500]}
    os.write(out, json.dumps(answer).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
