"""Markdown tables, and the place in a page where a script writes what it has measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

BEGINS, ENDS = "<!-- table begins -->", "<!-- table ends -->"
"""What a script writes into a page stands between these."""


def row(*cells: object) -> str:
    return "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)


def head(*titles: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*titles), "|" + "---|" * len(titles)]


def written(page: Path) -> str:
    """What a script has written into a page."""
    return page.read_text().partition(BEGINS)[2].partition(ENDS)[0].strip()


def write(page: Path, lines: Iterable[str]) -> None:
    """Put lines into a page, in the place of those that are there."""
    before, begins, rest = page.read_text().partition(BEGINS)
    _, ends, after = rest.partition(ENDS)
    if not begins or not ends:
        raise ValueError(f"{page} has no line {BEGINS}, and {ENDS} after it")
    page.write_text(before + "\n".join([BEGINS, *lines, ENDS]) + after)


def short(text: str, length: int, end: str = " ...") -> str:
    """The first characters of a text, in one line that can stand in a table."""
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= length else text[: length - len(end)] + end
