"""The quickstart's agent, which dies after its first turn in every attempt of the trials that MORTAL names."""

from __future__ import annotations

import os
from typing import Any

from rollout_ft.testing import quickstart_agent


class APIConnectionError(Exception):
    """As the SDKs name it."""


def run(task: dict[str, Any], base_url: str, api_key: str) -> float:
    if any(f"/sessions/{trial_id}~" in base_url for trial_id in os.environ["MORTAL"].split(",")):
        quickstart_agent.run({**task, "turns": 1}, base_url, api_key)
        raise APIConnectionError
    return quickstart_agent.run(task, base_url, api_key)
