"""Asking the owner of an engine for another one.

Owns one POST to `engine.attach.replace_url`. Nothing waits for it: what comes of it is seen at the engine's URL, or in the
router's list. That it failed is an event and no more.
"""

from __future__ import annotations

import aiohttp

from rollout_ft.telemetry.events import Events

TIMEOUT_S = 10.0


async def ask_for_another(replace_url: str, url: str, reason: str, incarnation: int, events: Events) -> None:
    body, outcome = {"url": url, "reason": reason, "incarnation": incarnation}, ""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as http,
            http.post(replace_url, json=body) as answer,
        ):
            outcome = "" if answer.status < 300 else f"HTTP {answer.status}"
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as e:
        outcome = f"{type(e).__name__}: {e}"
    if outcome:
        events.emit("engine.replace_refused", replace_url=replace_url, reason=outcome, **{k: v for k, v in body.items() if k != "reason"})
    else:
        events.emit("engine.replace_asked", replace_url=replace_url, **body)
