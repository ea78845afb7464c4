"""Figures and texts as people read them.

Owns nothing but their spelling. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

UNITS = (("d", 86400.0), ("h", 3600.0), ("min", 60.0))


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

_BREAKS = {ord("\t"): "\\t", ord("\n"): "\\n", 0x2028: "\\u2028", 0x2029: "\\u2029"}


def printable(text: str) -> str:
    """What a model or an agent said, for a terminal: nothing in it moves a cursor, or changes a title."""
    return text.translate(_CONTROLS)


def on_one_line(text: str) -> str:
    """The same for a log: no line of it is made by anybody but who writes it."""
    return printable(text).translate(_BREAKS)


def duration(seconds: float) -> str:
    """`90 s`, `2.5 min`: from two of a unit on."""
    unit, length = next(((unit, length) for unit, length in UNITS if abs(seconds) >= 2 * length), ("s", 1.0))
    return f"{seconds / length:.3g} {unit}"


def count(value: float) -> str:
    if value != int(value):
        return ""
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e4 else f"{value:,.0f}"


def share(value: float) -> str:
    return f"{value:.0%}"
