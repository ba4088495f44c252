"""Imports go down only: the rooms of docs/how-it-works.md, held by reading the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dpfix

ROOT = Path(dpfix.__file__).parent

STAGES = (
    "report", "errors", "instrument", "layout", "plan", "sampling", "weights", "engines",
    "scan", "rules", "repair", "observe", "audit", "choose", "training",
    "pipeline", "api", "__init__", "segmentation", "integrations", "cli", "__main__",
)  # fmt: skip
"""From the ground floor to the top: a room may import from those before it, and from no other."""
LEVEL = {room: level for level, room in enumerate(STAGES)}

OPACUS_PARTS = ("opacus.grad_sample", "opacus.optimizers")
MAY_USE_OPACUS_PARTS = {"engines", "training", "audit"}
OPTIONAL = {
    "monai",
    "transformers",
    "lightning",
    "pytorch_lightning",
    "nnunetv2",
    "rich",
    "matplotlib",
    "dp_accounting",
}

FILES = sorted(ROOT.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))


def room_of(file: Path) -> str:
    first = file.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Full names of the modules a file imports; ``if TYPE_CHECKING`` does not count."""
    todo: list[ast.AST] = [ast.parse(file.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        todo.extend(ast.iter_child_nodes(node))


def rooms_used(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(file) if name.startswith("dpfix.")} & LEVEL.keys()


@every_file
def test_imports_go_down(file: Path) -> None:
    room = room_of(file)
    assert room in LEVEL, f"say in STAGES where {room} belongs"
    for used in rooms_used(file):
        assert LEVEL[used] <= LEVEL[room], f"{room} imports {used}, which comes after it in the flow"


@every_file
def test_rules_and_engines_stay_apart(file: Path) -> None:
    room = room_of(file)
    if room in ("rules", "engines"):
        assert not rooms_used(file) & ({"rules", "engines", "api"} - {room})


@every_file
def test_parts_of_opacus_are_used_in_few_places(file: Path) -> None:
    used = [name for name in imported(file) if name.startswith(OPACUS_PARTS)]
    assert not used or room_of(file) in MAY_USE_OPACUS_PARTS, used


@every_file
def test_core_imports_nothing_optional(file: Path) -> None:
    if room_of(file) != "integrations":
        assert not {name.split(".")[0] for name in imported(file)} & OPTIONAL
