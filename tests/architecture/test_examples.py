"""Every Python block of the documentation runs.

The blocks of a page run from top to bottom as one script, in an empty folder. Blocks of the rules' pages are the cases of the
rules, which run in ``tests/rules``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpfix.engines.bookkeeping import ENGINE
from tests.architecture.readers_objects import STAND_INS

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+) -->\n+)?^(?P<fence>`{3,}) *python.*\n(?P<code>(?:.*\n)*?)^(?P=fence)$", re.M
)
PAGES = {
    str(path.relative_to(ROOT)): blocks
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if (blocks := list(BLOCK.finditer(path.read_text())))
}
NEEDS = {"docs/lightning.md": "lightning", "docs/huggingface.md": "transformers"}
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
ENVIRONMENT = {"docs/ranks.md": ONE_RANK, "docs/sharded.md": ONE_RANK}
"""What ``torchrun`` tells a page."""
WHOLE_TRAININGS = {
    "README.md",
    "docs/augmentation.md",
    "docs/budget.md",
    "docs/federated.md",
    "docs/huggingface.md",
    "docs/lightning.md",
    "docs/monai.md",
    "docs/people.md",
    "docs/quickstart.md",
    "docs/ranks.md",
    "docs/sharded.md",
}
"""Pages that train from beginning to end, and show the statement to publish."""
NOT_RUN: dict[str, int] = {}
"""How many blocks of a page are marked as such that cannot run, by ``<!-- not run: why -->`` above them."""


@pytest.fixture(autouse=True)
def rules_are_taken_back() -> Iterator[None]:
    """A layer rule that a page registers is none of the tests that follow."""
    before = dict(ENGINE._registered)
    yield
    ENGINE._registered.clear()
    ENGINE._registered.update(before)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*treespec")
@pytest.mark.parametrize("page", PAGES)
def test_examples_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of a page run, with what :mod:`tests.architecture.readers_objects` has for it."""
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    monkeypatch.chdir(tmp_path)
    for name, value in ENVIRONMENT.get(page, {}).items():
        monkeypatch.setenv(name, value)
    namespace: dict[str, Any] = {"__name__": "example", **STAND_INS.get(page, dict)()}
    for block in PAGES[page]:
        if not block["reason"]:
            line = block.string.count("\n", 0, block.start("code"))
            exec(compile("\n" * line + block["code"], ROOT / page, "exec"), namespace)
    if page in WHOLE_TRAININGS:
        assert "privacy statement" in capsys.readouterr().out


def test_every_python_block_is_found() -> None:
    """A block is written so that it is found: none is indented, or has another name of the language."""
    for page, blocks in PAGES.items():
        assert len(re.findall(r"^\s*(?:`{3,}|~{3,}) *(?:py|python3?|pycon)\b", (ROOT / page).read_text(), re.M)) == len(
            blocks
        )


def test_blocks_that_cannot_run_are_counted() -> None:
    """Which blocks do not run is known; it changes here and in the page together."""
    marked = {page: sum(bool(block["reason"]) for block in blocks) for page, blocks in PAGES.items()}
    assert {page: number for page, number in marked.items() if number} == NOT_RUN
    marks = sum((ROOT / page).read_text().count("<!-- not run:") for page in PAGES)
    assert marks == sum(NOT_RUN.values())


def test_mark_belongs_to_the_block_below() -> None:
    """A mark is read with the block right below it, and with no other."""
    text = "<!-- not run: needs a GPU -->\n\n```python\nfirst()\n```\n\nWords.\n\n```python\nsecond()\n```\n"
    found = [(block["reason"], block["code"]) for block in BLOCK.finditer(text)]
    assert found == [("needs a GPU", "first()\n"), (None, "second()\n")]
