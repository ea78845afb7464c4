"""schemathesis against a live gateway and the document that it serves: `make test-api`.

Runs in an environment of its own; the gateway and all behind it run in the project's.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS

TRIAL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
"""As the document has it; what is none is sent as it is, and refused."""
PROJECT = Path(__file__).parents[2]
NOT_OURS = ("positive_data_acceptance", "unsupported_method", "ignored_auth")
"""A body may be well formed and still ask for what cannot be; no route tells without a key that it exists; and the keys
that are given to each call here would be given to those without as well: they have tests of their own."""


class Live:
    def __init__(self, line: dict[str, str]):
        self.url, self._operator = line["url"], {"authorization": f"Bearer {line['operator_key']}"}
        self._session = self.open("session")

    def open(self, trial_id: str) -> dict[str, str]:
        reply = requests.post(f"{self.url}/sessions", json={"trial_id": trial_id}, headers=self._operator, timeout=10)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def aim(self, case: schemathesis.Case) -> dict[str, str]:
        """Points a case at something that exists; the headers that open it."""
        if not case.operation.definition.raw["security"]:
            return {}
        if TRIAL_ID.fullmatch(str(case.path_parameters.get("trial_id", "/"))):
            case.path_parameters["trial_id"] = self.open(f"v-{uuid.uuid4().hex}")["trial_id"]
        if "operator" in case.operation.definition.raw["security"][0]:
            return self._operator
        session = self.open(f"d-{uuid.uuid4().hex}") if case.method == "DELETE" else self._session
        if "session_id" in case.path_parameters:
            case.path_parameters["session_id"] = session["session_id"]
        case.headers.pop("X-Session-ID", None)
        return {"authorization": f"Bearer {session['api_key']}"}


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    command = [str(PROJECT / ".venv/bin/python"), str(PROJECT / "tests/stack.py")]
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin
        assert process.stdout
        yield Live(json.loads(process.stdout.readline()))
        process.stdin.close()


@pytest.fixture(scope="session")
def api(live: Live) -> Any:
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@settings(max_examples=int(os.environ.get("EXAMPLES", "60")), deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_the_document_allows_is_answered_as_it_says(case: schemathesis.Case, live: Live) -> None:
    headers = live.aim(case)
    left_out = [check for check in CHECKS.get_all() if check.__name__ in NOT_OURS]
    case.call_and_validate(headers=headers, excluded_checks=left_out, timeout=30)
