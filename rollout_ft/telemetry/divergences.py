"""Where the replays of a run left their record, as its events tell.

Owns what is shown of it: the first divergence of each attempt. Those after it mostly follow from it. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rollout_ft.types import JSON

HEAD = ("trial", "attempt", "turn", "message", "where", "recorded", "sent")
MOST = 20
_KEYS = ("trial", "attempt", "turn", "message", "role", "where", "recorded", "sent", "served")


def divergences(events: Iterable[JSON]) -> list[JSON]:
    """`{trial, attempt, turn, message, role, where, recorded, sent, served, more}` of each attempt that diverged; `more`: how often
    it did so again."""
    found: dict[tuple[str, int], JSON] = {}
    for event in events:
        if event.get("event") == "trial.diverged":
            first = found.setdefault((event["trial"], event["attempt"]), {**{key: event[key] for key in _KEYS}, "more": -1})
            first["more"] += 1
    return list(found.values())


def rows_diverged(met: Sequence[JSON]) -> list[list[str]]:
    """For people, under `HEAD`; the first `MOST`."""
    rows = [
        [
            d["trial"], str(d["attempt"]), f"{d['turn']}" + (f" and {d['more']} more" if d["more"] else ""),
            f"{d['message']} ({d['role']})" if d["message"] >= 0 else "", d["where"], d["recorded"], d["sent"],
        ]
        for d in met[:MOST]
    ]  # fmt: skip
    return rows + ([[f"and {len(met) - MOST} more attempts", *[""] * (len(HEAD) - 1)]] if len(met) > MOST else [])
