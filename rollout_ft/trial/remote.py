"""What an agent in a process of its own can ask of its trial, beside the model.

Owns the way from the variables that such an agent is started with to its environment and its checkpoint. Imports nothing but the
standard library, so that any agent's environment can have it. A call waits for as long as the step takes.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any

URL, BASE, KEY = "ROLLOUT_FT_ENVIRONMENT_URL", "OPENAI_BASE_URL", "OPENAI_API_KEY"


class EnvironmentLost(Exception):
    """The trial has no environment any more: the attempt is over, whatever its agent returns."""


def step(action: dict[str, Any]) -> dict[str, Any]:
    """What the action does to the trial's environment, or did in an earlier attempt. Raises EnvironmentLost, ValueError."""
    if URL not in os.environ:
        raise ValueError(f"{URL} is not set: the run has no trial.environment")
    return _call(os.environ[URL] + "/step", {"action": action})


def messages() -> list[dict[str, Any]]:
    """The conversation of earlier attempts up to the last reply that they asked for, for an agent that goes on behind it; nothing
    in a first attempt. The environment goes on from there as well."""
    checkpoint = _call(os.environ[BASE].removesuffix("/v1") + "/checkpoint", {})
    if URL in os.environ and checkpoint["messages"]:
        _call(os.environ[URL] + "/begin", {"steps": checkpoint["steps_before"]})
    return checkpoint["messages"]


def _call(url: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {os.environ[KEY]}", "content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as response:
            return json.load(response)
    except urllib.error.HTTPError as e:
        words = e.read().decode(errors="replace")
        if e.code in (401, 410):
            raise EnvironmentLost(words) from None
        raise ValueError(words) from None
