"""What an agent in a process of its own can ask of its trial, beside the model.

Owns the way from the variables that such an agent is started with to its environment and its checkpoint. Imports nothing but the
standard library, so that any agent's environment can have it. A call waits for as long as the step takes.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

PATIENCE_S, PAUSE_S = 300.0, 0.5
"""How long a gateway that restarts is waited for, and how often it is asked."""
URL, BASE, KEY = "ROLLOUT_FT_ENVIRONMENT_URL", "OPENAI_BASE_URL", "OPENAI_API_KEY"


class EnvironmentLost(Exception):
    """The trial has no environment any more: the attempt is over, whatever its agent returns."""


class APIConnectionError(Exception):
    """Nobody answers. The name is that of the clients' own error: infrastructure is to blame, and not the agent."""


def step(action: dict[str, Any]) -> dict[str, Any]:
    """What the action does to the trial's environment, or did in an earlier attempt. Raises EnvironmentLost, ValueError."""
    if URL not in os.environ:
        raise ValueError(f"{URL} is not set: the run has no trial.environment")
    return _call(os.environ[URL] + "/step", {"action": action})


def messages() -> list[dict[str, Any]]:
    """The conversation of earlier attempts up to the last reply that they asked for, for an agent that goes on behind it; nothing
    in a first attempt. The environment goes on from there as well."""
    checkpoint = _call(os.environ[BASE].removesuffix("/v1") + "/checkpoint", {}, PATIENCE_S)
    if URL in os.environ and checkpoint["messages"]:
        _call(os.environ[URL] + "/begin", {"steps": checkpoint["steps_before"]})
    return checkpoint["messages"]


def _call(url: str, body: dict[str, Any], patience_s: float = 0.0) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {os.environ[KEY]}", "content-type": "application/json"}
    until = time.monotonic() + patience_s
    while True:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as response:
                return json.load(response)
        except urllib.error.HTTPError as e:
            words = e.read().decode(errors="replace")
            if e.code in (401, 410):
                raise EnvironmentLost(words) from None
            if e.code != 503 or time.monotonic() > until:
                raise (APIConnectionError if e.code >= 500 else ValueError)(words) from None
        except OSError as e:
            if time.monotonic() > until:
                raise APIConnectionError(f"{url}: {e}") from None
        time.sleep(PAUSE_S)
