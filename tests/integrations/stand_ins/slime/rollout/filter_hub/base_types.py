"""What a filter says of a group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class DynamicFilterOutput:
    keep: bool
    reason: str | None = None


def call_dynamic_filter(function: Any, *args: Any) -> Any:
    return DynamicFilterOutput(keep=True) if function is None else function(*args)
