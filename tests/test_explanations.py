"""The catalogue against the source: every code, outcome, state and reason is explained, and nothing else is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

import rollout_ft
from rollout_ft.cli.main import app
from rollout_ft.config import known_keys
from rollout_ft.engine import crash, driver, patience
from rollout_ft.engine.gate import Closed
from rollout_ft.engine.process import Exit
from rollout_ft.errors import ConfigError
from rollout_ft.fleet import engines
from rollout_ft.fleet.health import State
from rollout_ft.fleet.listing import WAITS
from rollout_ft.telemetry.explanations import CATALOGUE, Kind, explain
from rollout_ft.telemetry.metrics import ADMISSION, HISTOGRAMS, NO_ENGINE
from rollout_ft.telemetry.shown import TO_DO
from rollout_ft.telemetry.vocabulary import EVENTS
from rollout_ft.types import Outcome

ROOT = Path(rollout_ft.__file__).parent
FILES = {path: path.read_text() for path in ROOT.rglob("*.py") if "testing" not in path.parts}
TREES = {path: ast.parse(text) for path, text in FILES.items()}
FUNCTIONS = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
PLACE = {"BadRequest": 2, "error_body": 1, "error": 1, "Refusal": 1, "__init__": 2}
"""Where calls of this name have a code; `error` is a dialect's, and `__init__` a subclass of BadRequest's."""
PAGE = (ROOT.parent / "docs" / "troubleshooting.md").read_text()
COMMANDS = {found.name for found in (*app.registered_commands, *app.registered_groups)} | {
    found.callback.__name__ for found in app.registered_commands if found.callback
}
FIELDS = {"base_url", "api_key", "trial_id", "operator_key", "gateway_url"}
"""What is named in requests and replies."""
PASSED_ON = {"e.code", "str(error['code'])"}
"""Codes that somebody else gave."""


def calls() -> Iterator[ast.Call]:
    for tree in TREES.values():
        yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def texts(node: ast.AST) -> list[str]:
    """What a code can be: said there, one of two, or what a function of ours returns."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.IfExp(body=body, orelse=other):
            return texts(body) + texts(other)
        case ast.Call(func=ast.Name(id="getattr"), args=[_, _, default]):
            return texts(default)
        case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS:
            returned = [n.value for n in ast.walk(FUNCTIONS[name]) if isinstance(n, ast.Return) and n.value]
            return [text for value in returned for text in texts(value)]
        case _:
            assert ast.unparse(node) in PASSED_ON, f"{ast.unparse(node)}: who knows which codes these are?"
            return []


def codes_given() -> set[str]:
    found: set[str] = set()
    for call in calls():
        name = name_of(call)
        if name not in PLACE or (name == "error" and len(call.args) < 3) or "_log" in ast.unparse(call.func):
            continue
        if name == "__init__" and not (
            len(call.args) > 2 and isinstance(call.args[1], ast.Constant) and isinstance(call.args[1].value, int)
        ):
            continue
        named = [keyword.value for keyword in call.keywords if keyword.arg == "code"]
        for node in named or call.args[PLACE[name] : PLACE[name] + 1]:
            found.update(texts(node))
    [default] = re.findall(r'code: str = "(\w+)"', FILES[ROOT / "errors.py"])
    return found | {default}


def reasons_given() -> set[str]:
    """How every reason begins for which the source gives an engine up."""
    said = [call.args[1] for call in calls() if name_of(call) == "EngineLost" and len(call.args) > 1]
    said += [call.args[2] for call in calls() if name_of(call) in ("lost", "suspect", "_silent", "may_lose") and len(call.args) > 2]
    found = {patience.STALLED, patience.ALONE, driver.FAILED, engines.SILENT}
    for node in said:
        first = node.values[0] if isinstance(node, ast.JoinedStr) else node
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            found.add(first.value)
    why = next(n for n in ast.walk(FUNCTIONS_ASYNC["probe_idle"]) if isinstance(n, ast.JoinedStr))
    found.add(ast.unparse(why)[2:])
    found.update(crash.describe(Exit(code, ours), "") for code, ours in ((0, False), (-9, False), (None, False), (None, True)))
    return {f"{text.rstrip()} " for text in found} - {"nobody else owns it "}  # that is no loss: an order that makes no sense


FUNCTIONS_ASYNC = {node.name: node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef)}


def of_kind(kind: Kind) -> set[str]:
    return {code for code, each in CATALOGUE.items() if each.kind is kind}


def test_every_code_that_the_source_gives_is_explained_and_no_other():
    assert codes_given() == of_kind(Kind.ERROR)


def test_every_outcome_and_every_state_is_explained():
    assert of_kind(Kind.OUTCOME) == set(Outcome)
    assert of_kind(Kind.STATE) == set(State)


def test_every_reason_for_which_an_engine_is_lost_is_explained_and_no_other():
    given = reasons_given()
    met = {found.code for reason in given if (found := explain(reason)) and found.kind is Kind.REASON}
    assert [reason for reason in given if explain(reason) is None] == []
    # what begins with an URL or comes out of an order of the trainer is made of other words
    assert met | {"http", "no answer within"} == of_kind(Kind.REASON)


def test_every_word_that_our_screens_show_is_explained():
    assert of_kind(Kind.EVENT) == set(EVENTS)
    assert of_kind(Kind.WAIT) == ({*WAITS, *Closed, ADMISSION, NO_ENGINE} - set(State)), "what is a state as well is explained as one"
    assert set(TO_DO) <= set(EVENTS)
    assert "add nodes" in CATALOGUE["store.exposed"].remedy.lower()


def test_a_reason_is_known_as_it_was_said():
    said = "engine engine-3 lost: killed by SIGKILL (out of memory on the GPU): CUDA error"
    found = explain(said)
    assert found is not None
    assert found.code == "killed by"
    assert explain("stalled alone: no token of a call for 3.0 s while others moved") == CATALOGUE["stalled alone"]
    assert explain("nobody") is None
    assert explain("ENV_FAILED") == CATALOGUE["env_failed"]


def check_named(text: str) -> None:
    """The config keys, events, codes and commands that a text names in backticks exist."""
    events = set(re.findall(r'emit\(\s*"([a-z_]+\.[a-z_]+)"', "\n".join(FILES.values())))
    for named in re.findall(r"`([^`\n]+)`", text):
        if re.match(r"[a-z]+\.[a-z_.]+(:|$)", named):
            assert named.split(":")[0] in {*known_keys(), *events}, named
        elif re.fullmatch(r"[a-z]+(_[a-z]+)+", named):
            assert named in {*CATALOGUE, *FIELDS, *known_keys(), *HISTOGRAMS}, named
        elif named.startswith("rollout-ft "):
            assert named.split()[1] in COMMANDS, named


def test_what_is_advised_exists():
    for each in CATALOGUE.values():
        check_named(f"{each.meaning} {each.cause} {each.remedy}")


def said(node: ast.AST) -> str:
    """A text of the source with `…` where something is filled in."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts).replace("`", "")


def test_every_entry_of_the_page_has_a_message_of_the_source_a_why_and_a_do():
    others = [tree for path, tree in TREES.items() if path.name != "explanations.py"]
    messages = {said(node) for tree in others for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.Constant))}
    entries = re.split(r"^### ", PAGE.partition("\n## Alerts")[0], flags=re.MULTILINE)[1:]
    assert len(entries) > 20
    for entry in entries:
        parts = re.match(r"`([^`]+)`\n\*\*Why\.\*\* .+\n\*\*Do\.\*\* .+", entry, re.DOTALL)
        assert parts, entry
        assert any(parts[1].strip("…") in message for message in messages), parts[1]


def test_what_the_page_advises_exists():
    check_named(re.sub(r"^### .*$", "", PAGE, flags=re.MULTILINE))


def run(*args: str) -> Any:
    return CliRunner().invoke(app, ["explain", *args])


def test_a_code_is_explained_for_people_and_for_scripts():
    assert "`store.journal_dir`" in run("unknown_trial").stdout
    assert orjson.loads(run("unknown_trial", "--json").stdout)["kind"] == "error"


def test_without_a_code_all_are_listed():
    assert all(code in run().stdout for code in CATALOGUE)
    assert [each["code"] for each in orjson.loads(run("--json").stdout)] == list(CATALOGUE)


@pytest.mark.parametrize(("typed", "meant"), [("unknown_trail", "unknown_trial"), ("INFRA_EXAUSTED", "infra_exhausted")])
def test_of_an_unknown_code_the_nearest_known_one_is_named(typed: str, meant: str):
    found = run(typed)
    assert isinstance(found.exception, ConfigError)  # which is exit code 2
    assert f"did you mean {meant}?" in str(found.exception)


@pytest.mark.parametrize("typed", ["nosuch", "xyz", "released or not"])
def test_where_nothing_is_near_nothing_is_guessed(typed: str):
    assert "did you mean" not in str(run(typed).exception)
