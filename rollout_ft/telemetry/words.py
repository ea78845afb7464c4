"""Figures and texts as people read them.

Owns nothing but their spelling. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence


def counted(count: int, noun: str, several: str = "") -> str:
    """`1 turn`, `2,000 turns`, `3 recoveries`."""
    return f"{count:,} {noun if count == 1 else several or f'{noun}s'}"


def listed(numbers: Sequence[int]) -> str:
    """`1 to 3, 7` of ascending numbers."""
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), *range(127, 160))}


def printable(text: str) -> str:
    """What a model or an agent said, for a terminal: nothing in it moves a cursor, or changes a title."""
    return text.translate(_CONTROLS)
