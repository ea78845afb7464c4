"""A siege's verdict, as a test sees it."""

from __future__ import annotations

from typing import Any

import pytest

from rollout_ft.testing.siege import Blow, Siege

ROWS = pytest.StashKey[list[dict[str, Any]]]()


class Judged:
    """Notes a siege for the table, and fails with its complaints and the command that repeats it."""

    def __init__(self, request: pytest.FixtureRequest):
        self._request = request
        self.seed: int = request.config.getoption("--siege-seed")

    def __call__(self, siege: Siege, called: str = "") -> None:
        if called or siege.blow is not Blow.NONE:
            self._request.config.stash[ROWS].append({**siege.row(), "fault": called or siege.blow.value})
        again = f"make test-cluster ARGS=\"--siege-seed {siege.seed} -k '{self._request.node.originalname}'\""
        assert not siege.complaints, f"{siege.complaints}\n{again}"
        outcomes = [(r.outcome, r.cause) for r in siege.results]
        assert outcomes == [("completed", "")] * len(outcomes), f"{outcomes}\n{again}"
