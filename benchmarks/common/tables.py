"""Markdown tables, and the place in a page where a script writes what it has measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

MARK = "table"
"""What a script writes into a page stands between two comments with this word, or another one where there are several."""


def row(*cells: object) -> str:
    return "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)


def head(*titles: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*titles), "|" + "---|" * len(titles)]


def written(page: Path, mark: str = MARK) -> str:
    """What a script has written into a page."""
    begins, ends = _comments(mark)
    return page.read_text().partition(begins)[2].partition(ends)[0].strip()


def write(page: Path, lines: Iterable[str], mark: str = MARK) -> None:
    """Put lines into a page, in the place of those that are there."""
    begins, ends = _comments(mark)
    before, found, rest = page.read_text().partition(begins)
    _, end, after = rest.partition(ends)
    if not found or not end:
        raise ValueError(f"{page} has no line {begins}, and {ends} after it")
    page.write_text(before + "\n".join([begins, *lines, ends]) + after)


def _comments(mark: str) -> tuple[str, str]:
    return f"<!-- {mark} begins -->", f"<!-- {mark} ends -->"


def short(text: str, length: int, end: str = " ...") -> str:
    """The first characters of a text, in one line that can stand in a table."""
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= length else text[: length - len(end)] + end
