"""The program that runs SGLang's parsers: `sglang_worker.py TOOL_PARSER REASONING_PARSER`, JSON lines in and out.

Owns the import of sglang, of which only the parsers are loaded: no engine, no GPU. Requests are answered by a child,
within a limit of CPU time for each; a request that ends the child costs a fork and not another import. Knows nothing of
this package, and is run by its path.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import mmap
import os
import signal
import sys
import types
from typing import Any

CPU_S = 5.0


def load(tool_parser: str, reasoning_parser: str) -> tuple[Any, Any]:
    """`(calls, reasoning)`: what parses, or None where nothing is to."""
    os.environ["SGLANG_FORWARD_UNKNOWN_TOOLS"] = "true"  # a call to a tool that nobody declared is still a call
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("sglang is not installed")
    package = types.ModuleType("sglang")  # its own __init__ imports everything
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["sglang"] = package
    logging.disable(logging.CRITICAL)
    return (
        _Calls(tool_parser) if tool_parser != "none" else None,
        _Reasoning(reasoning_parser, tool_parser != "none") if reasoning_parser != "none" else None,
    )


class _Calls:
    def __init__(self, name: str):
        self._name = name
        self._parser: Any = importlib.import_module("sglang.srt.function_call.function_call_parser").FunctionCallParser
        self._tool: Any = importlib.import_module("sglang.srt.entrypoints.openai.protocol").Tool
        detector = self._parser([], name).detector
        self.opening, self.closing = (str(getattr(detector, key, "") or "") for key in ("bot_token", "eot_token"))

    def __call__(self, text: str, tools: list[Any]) -> Any:
        parser = self._parser([self._tool.model_validate(tool) for tool in tools], self._name)
        content, calls = parser.parse_non_stream(text)
        return {"text": content, "calls": [(call.name, call.parameters) for call in calls]}


class _Reasoning:
    def __init__(self, name: str, before_calls: bool):
        parser: Any = importlib.import_module("sglang.srt.parser.reasoning_parser").ReasoningParser
        self._make = lambda: parser(name, stream_reasoning=False, tool_call_parser_active=before_calls)
        self._make()

    def __call__(self, text: str) -> Any:
        reasoning, content = self._make().parse_non_stream(text)
        return {"reasoning": reasoning or "", "text": content or ""}


def answer(calls: Any, reasoning: Any, request: Any) -> Any:
    if request["do"] == "reasoning":
        return reasoning(request["text"])
    return {"found": [_or_none(calls, text, request["tools"]) for text in request["texts"]]}


def _or_none(calls: Any, text: str, tools: list[Any]) -> Any:
    try:
        return calls(text, tools)
    except Exception:
        return None


def serve(calls: Any, reasoning: Any, out: int) -> None:
    """Answers until nobody asks any more; whoever dies of a request is replaced, and that request is answered here."""
    busy = mmap.mmap(-1, 1)
    while (child := os.fork()) != 0:
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        if busy[0]:
            busy[0] = 0
            why = "took too long" if os.WTERMSIG(status) == signal.SIGPROF else f"ended the process with status {status}"
            _write(out, {"error": why})
    for line in sys.stdin.buffer:
        busy[0] = 1
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # the signal that it sends ends this process
        try:
            made = answer(calls, reasoning, json.loads(line))
        except Exception as e:
            made = {"error": f"{type(e).__name__}: {e}"[:500]}
        signal.setitimer(signal.ITIMER_PROF, 0)  # a reply is written whole
        _write(out, made)
        busy[0] = 0
    os._exit(0)


def _write(out: int, made: Any) -> None:
    data = json.dumps(made).encode() + b"\n"
    while data:
        data = data[os.write(out, data) :]


def main(tool_parser: str, reasoning_parser: str) -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what is printed is no answer
    try:
        calls, reasoning = load(tool_parser, reasoning_parser)
    except Exception as e:
        return _write(out, {"error": f"{type(e).__name__}: {e}"[:500]})
    _write(out, {"opening": calls.opening if calls else "", "closing": calls.closing if calls else ""})
    serve(calls, reasoning, out)


if __name__ == "__main__":
    main(*sys.argv[1:3])
