"""The measures of the house: how many rooms, how long a file, how wide a function; who may ask which engine it is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import dpfix
from dpfix.engines import BY_NAME

ROOT = Path(dpfix.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
OUTSIDE_ENGINES = [file for file in FILES if file.relative_to(ROOT).parts[0] != "engines"]

MOST_ENTRIES = 20
NOT_COUNTED = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
MOST_LINES = 400
MOST_PARAMETERS = 6
MOST_WIDE_FUNCTIONS = 12


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


outside_engines = pytest.mark.parametrize("file", OUTSIDE_ENGINES, ids=name_of)


def test_entries_of_the_package() -> None:
    entries = sorted({path.name for path in ROOT.iterdir()} - NOT_COUNTED)
    assert len(entries) <= MOST_ENTRIES, (
        f"{len(entries)} entries directly in dpfix/, at most {MOST_ENTRIES}: put a file into the room of its stage "
        f"(test_imports.py has the stages): {', '.join(entries)}"
    )


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_length_of_a_file(file: Path) -> None:
    lines = len(file.read_text().splitlines())
    assert lines <= MOST_LINES, (
        f"{name_of(file)} has {lines} lines, at most {MOST_LINES}: move what has a name of its own to a file of its own"
    )


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many parameters a function has, ``*args`` and ``**kwargs`` among them, ``self`` and ``cls`` not."""
    given = function.args
    named = [*given.posonlyargs, *given.args]
    bound = bool(named) and named[0].arg in {"self", "cls"}
    return len(named) - bound + len(given.kwonlyargs) + (given.vararg is not None) + (given.kwarg is not None)


def wide_functions(source: str, name: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or parameters(node) <= MOST_PARAMETERS:
            continue
        if not any("overload" in ast.unparse(decorator) for decorator in node.decorator_list):
            yield f"{name}:{node.lineno} {node.name} ({parameters(node)})"


def test_wide_functions_are_few() -> None:
    wide = [found for file in FILES for found in wide_functions(file.read_text(), name_of(file))]
    assert len(wide) <= MOST_WIDE_FUNCTIONS, (
        f"{len(wide)} functions have more than {MOST_PARAMETERS} parameters, at most {MOST_WIDE_FUNCTIONS} may: make what "
        "travels together one frozen dataclass:\n  " + "\n  ".join(wide)
    )


# ------------------------------------------------------------------ which engine it is

ENGINE_CLASS = re.compile(r"\w*(Handle|(?<!Privacy)Engine)$")
"""A ``PrivacyEngine`` is the object that Opacus's users know; it computes no gradients."""


def type_tests(source: str) -> Iterator[str]:
    """``isinstance``, ``issubclass`` and ``case`` with a class of an engine or a handle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.MatchClass):
            classes: ast.AST = node.cls
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"isinstance", "issubclass"}
            and len(node.args) == 2
        ):
            classes = node.args[1]
        else:
            continue
        names = {
            n.id if isinstance(n, ast.Name) else n.attr
            for n in ast.walk(classes)
            if isinstance(n, ast.Name | ast.Attribute)
        }
        if any(map(ENGINE_CLASS.match, names)):
            yield f"line {classes.lineno}: {ast.unparse(node)}"  # type: ignore[attr-defined]


def name_tests(source: str) -> Iterator[str]:
    """Comparisons with the name of an engine: written out, or asked from an engine."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.MatchValue):
            compared: list[ast.expr] = [node.value]
        elif isinstance(node, ast.Compare) and any(
            isinstance(op, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for op in node.ops
        ):
            compared = [node.left, *node.comparators]
        else:
            continue
        if any(map(is_engine_name, compared)):
            yield f"line {node.lineno}: {ast.unparse(node)}"


def is_engine_name(node: ast.expr) -> bool:
    """A key of ``BY_NAME``, alone or in a tuple, list or set; or ``engine.name``."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return any(map(is_engine_name, node.elts))
    if isinstance(node, ast.Attribute) and node.attr == "name":
        return bool(re.search("engine|handle|by_hand", ast.unparse(node.value), re.I))
    return isinstance(node, ast.Constant) and node.value in BY_NAME


@outside_engines
def test_nobody_asks_for_the_class_of_an_engine(file: Path) -> None:
    found = list(type_tests(file.read_text()))
    assert found == [], "outside engines/: let Engine or Handle have a member that says what it can"


@outside_engines
def test_nobody_asks_for_the_name_of_an_engine(file: Path) -> None:
    found = list(name_tests(file.read_text()))
    assert found == [], "outside engines/: let Engine have a member that says it; legal values come from BY_NAME itself"


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(handle, BookkeepingHandle)",
        "issubclass(cls, (Vmap, engines.base.Engine))",
        "isinstance(handle, MicrobatchHandle | None)",
        "match handle:\n    case HooksHandle(): pass",
    ],
)
def test_a_type_test_is_seen(source: str) -> None:
    assert len(list(type_tests(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "plan.engine == 'vmap'",
        "'no_op' != mode",
        "mode in ('hooks', 'functorch')",
        "mode not in {'ew'}",
        "engine.name == chosen",
        "match mode:\n    case 'microbatch': pass",
    ],
)
def test_a_name_test_is_seen(source: str) -> None:
    assert len(list(name_tests(source))) == 1


def test_other_comparisons_are_let_through() -> None:
    source = "isinstance(x, SafePrivacyEngine) and mode in BY_NAME and p.name == q and fixability == 'exact'"
    assert [*type_tests(source), *name_tests(source)] == []


def test_parameters_are_counted() -> None:
    source = "class A:\n    def f(self, a, b, /, c, *d, e, g, **h): ...\n    @overload\n    def g(self, a, b, c, d, e, f, g): ..."
    assert list(wide_functions(source, "a.py")) == ["a.py:2 f (7)"]
