"""A report's page, read back."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser


class Page(HTMLParser):
    """Its tags, attributes, tables (rows of cells, by the section they are in) and fault marks (by the section, then by class)."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.cells: dict[str, list[list[str]]] = {}
        self.marks: dict[str, Counter[str]] = {}
        self.ids: set[str] = set()
        self.text, self._section, self._cell = "", "head", False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.attributes += given.items()
        self.ids.add(given.get("id", ""))
        self._section = given["id"] if tag == "section" else self._section
        self._cell = tag == "td"
        if tag == "tr":
            self.cells.setdefault(self._section, []).append([])
        elif tag == "td":
            self.cells[self._section][-1].append("")
        if "data-count" in given:
            self.marks.setdefault(self._section, Counter())[given["class"].split()[-1]] += int(given["data-count"])

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "tr")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.cells[self._section][-1][-1] += data

    def row(self, section: str, first: str) -> list[str]:
        return next(row for row in self.cells[section] if row and row[0] == first)


def whole(cell: str) -> int:
    return int(cell.replace(",", ""))
