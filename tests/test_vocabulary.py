"""Every event that is told is in the list, and the list in the documentation."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from rollout_ft.telemetry.vocabulary import EVENTS
from rollout_ft.types import Served

PACKAGE = Path(__file__).parent.parent / "rollout_ft"
VARIABLE = {f"turn.{served}" for served in Served if served is not Served.FRESH} | {"engine.doubted", "engine.trusted"}
"""Those whose name is put together where they are told."""
BY_HAND = {"run.started", "run.resumed", "events.missed", "events.rotated"}
"""Those of the process that started the run."""


def told() -> Iterator[str]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "emit":
                constants = [each.value for each in ast.walk(node.args[0]) if isinstance(each, ast.Constant)]
                yield from (str(name) for name in constants if "." in str(name))


def test_every_event_that_is_told_is_in_the_list_and_no_other_is():
    assert {name for name in told() if not name.startswith("turn.")} | VARIABLE | BY_HAND == EVENTS.keys()


def test_the_page_shows_the_list():
    page = (PACKAGE.parent / "docs" / "events.md").read_text()
    assert dict(re.findall(r"^\| `([a-z_.]+)` \| (.+) \|$", page, re.MULTILINE)) == EVENTS
