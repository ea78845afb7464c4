"""`rollout-ft explain [CODE]`: what the catalogue says, for people and scripts.

Owns how it is shown; what is said is `telemetry.explanations`'.
"""

from __future__ import annotations

from dataclasses import asdict

import orjson

from rollout_ft.errors import ConfigError
from rollout_ft.telemetry.explanations import CATALOGUE, Kind, explain, nearest


def said_of(code: str, as_json: bool) -> str:
    """Of one code, or of all. Raises ConfigError naming the nearest for one that is not known."""
    if not code:
        return orjson.dumps([asdict(each) for each in CATALOGUE.values()]).decode() if as_json else _all()
    found = explain(code)
    if found is None:
        meant = f"; did you mean {near}?" if (near := nearest(code)) else "."
        raise ConfigError(f"{code}: nothing is known of it{meant} `rollout-ft explain` lists all")
    if as_json:
        return orjson.dumps(asdict(found)).decode()
    return f"{found.code} ({found.kind}): {found.meaning}\n  why: {found.cause}\n  do:  {found.remedy}"


def _all() -> str:
    width = max(map(len, CATALOGUE))
    return "\n\n".join(
        "\n".join([kind.upper(), *(f"  {each.code:<{width}}  {each.meaning}" for each in CATALOGUE.values() if each.kind is kind)])
        for kind in Kind
    )
