"""A plot as HTML that needs nothing else: marks in an SVG that stretches, labels beside it that do not.

Owns scales, ticks and the escaping of what is written into a plot. Pure. Marks are in a square of 1000 by 1000 with the origin
below left; strokes keep their width whatever the plot's size, so that it can be read on a telephone, on paper and on a wide screen. How
things look is the style sheet's: here they have classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

SIZE = 1000.0
MAX_TICKS = 6


@dataclass(frozen=True, slots=True)
class Scale:
    """Where values are on an axis. `log`: to the base of 10; then `low` is above 0. Ticks are round in `unit`s."""

    low: float
    high: float
    log: bool = False
    unit: float = 1.0

    def at(self, value: float) -> float:
        """0 to `SIZE`; what is outside is at its end."""
        low, high, value = (self._linear(x) for x in (self.low, self.high, min(max(value, self.low), self.high)))
        return min(SIZE, SIZE * (value - low) / (high - low)) if high > low else 0.0

    def _linear(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.log else value

    def ticks(self) -> list[float]:
        """At most `MAX_TICKS` round values within it."""
        if self.log:
            exponents = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            every = -(-len(exponents) // MAX_TICKS) if exponents else 1
            return [10.0**e for e in exponents][::every]
        step = self.unit * _round_step((self.high - self.low) / self.unit / (MAX_TICKS - 1))
        first = math.ceil(self.low / step - 1e-9)
        return [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)][:MAX_TICKS]


def _round_step(least: float) -> float:
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= least * (1 - 1e-9))


def up_to(values: Iterable[float]) -> Scale:
    """From 0, or a little below what is less, to a little above the largest."""
    every = [0.0, *values]
    least, most = min(every), max(every)
    return Scale(least * 1.05, most * 1.05 if most > least else 1.0)


def decades(values: Sequence[float], least: float) -> Scale:
    """Whole powers of ten around the values; those below `least` are at it."""
    low, high = max(least, min(values, default=least)), max(least, max(values, default=least))
    down, up = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return Scale(10.0**down, 10.0 ** max(up, down + 1), log=True)


Label = Callable[[float], str]


def panel(about: str, x: Scale, y: Scale, marks: Iterable[str], x_label: Label, y_label: Label, *, height: str = "14rem") -> str:
    """`about` says in a sentence what is seen, for those who do not see it. Without labels of y there is no room for them."""
    across = "".join(f'<path class="grid" d="M0 {_y(y.at(tick))}H{SIZE:g}"/>' for tick in y.ticks() if y_label(tick))
    beside = "".join(f'<span style="bottom:{y.at(t) / 10:.4g}%">{escape(y_label(t))}</span>' for t in y.ticks() if y_label(t))
    below = "".join(f'<span style="left:{x.at(tick) / 10:.4g}%">{escape(x_label(tick))}</span>' for tick in x.ticks())
    return (
        f'<div class="plot{"" if beside else " bare"}" role="group" aria-label="{escape(about)}">'
        f'<div class="y" aria-hidden="true">{beside}</div>'
        f'<svg viewBox="0 0 {SIZE:g} {SIZE:g}" preserveAspectRatio="none" style="height:{height}" focusable="false">{across}'
        f'{"".join(marks)}</svg><div class="x" aria-hidden="true">{below}</div></div>'
    )  # fmt: skip


def line(points: Sequence[tuple[float, float]], kind: str, said: str = "") -> str:
    """Through places on both scales."""
    return _path(kind, "M" + "L".join(f"{x:.5g} {_y(y)}" for x, y in points), said) if points else ""


def area(points: Sequence[tuple[float, float]], kind: str) -> str:
    """Between the axis and a line."""
    if not points:
        return ""
    over = "L".join(f"{x:.5g} {_y(y)}" for x, y in points)
    return _path(kind, f"M{points[0][0]:.5g} {_y(0)}L{over}L{points[-1][0]:.5g} {_y(0)}Z", "")


def box(x: float, y: float, width: float, height: float, kind: str, said: str = "") -> str:
    return _path(kind, f"M{x:.5g} {_y(y)}h{width:.5g}v{-height:.5g}h{-width:.5g}Z", said)


def rule(x: float, kind: str, said: str, count: int = 1, *, length: float = SIZE) -> str:
    """A vertical mark from above, which a pointer need not hit to the pixel; `count`: of what it stands for."""
    d = f"M{x:.5g} 0V{length:g}"
    return f'<g class="rule {kind}" data-count="{count}"><title>{escape(said)}</title><path class="near" d="{d}"/><path d="{d}"/></g>'


def dot(x: float, y: float, kind: str, said: str, count: int = 1) -> str:
    return f'<path class="dot {kind}" data-count="{count}" d="M{x:.5g} {_y(y)}h0"><title>{escape(said)}</title></path>'


def _path(kind: str, d: str, said: str) -> str:
    inside = f"<title>{escape(said)}</title></path>" if said else "</path>"
    return f'<path class="{kind}" d="{d}">{inside}'


def _y(value: float) -> str:
    return f"{SIZE - value:.5g}"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """`(class, words)`; the class is that of the mark."""
    items = "".join(f'<li><i class="key {kind}"></i>{escape(words)}</li>' for kind, words in entries)
    return f'<ul class="legend">{items}</ul>' if items else ""


def bar(parts: Sequence[tuple[str, float, str]]) -> str:
    """One bar of parts that make the whole: `(class, value, words)`; what is nothing is not there."""
    whole = sum(value for _, value, _ in parts)
    shares = "".join(
        f'<span class="{kind}" style="flex-grow:{value:.12g}" title="{escape(words)}"></span>' for kind, value, words in parts if value > 0
    )
    return f'<div class="bar">{shares}</div>' if whole > 0 else ""
