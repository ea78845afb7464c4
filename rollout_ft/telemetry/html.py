"""Parts of a page: tables that scroll by themselves, figures, words.

Owns their shape, and the escaping of what is put into them. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

MAX_LISTED = 300
"""Rows of a table that may have as many as a run has trials."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, escaped: bool = False, text: int = 1) -> str:
    """The first `text` columns are words, the others figures. `escaped`: the cells are HTML already."""
    rows = list(rows)
    if not rows:
        return ""
    cells = "".join(f'<th scope="col"{_class(i, text)}>{escape(name)}</th>' if name else "<td></td>" for i, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{_class(i, text)}>{cell if escaped else escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    about = escape(" ".join(filter(None, head)))
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{about}"><table><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _class(column: int, text: int) -> str:
    return ' class="text"' if column < text else ""


def more(every: Sequence[Any], file: str) -> str:
    left_out = len(every) - MAX_LISTED
    return f'<p class="note">And {left_out:,} more, in {file}.</p>' if left_out > 0 else ""


def prose(said: str) -> str:
    """What is in backticks is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(said))


def spaced(name: str) -> str:
    return name.replace("_", " ")


def figure(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:,.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
