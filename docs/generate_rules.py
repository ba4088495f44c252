"""Write one page per rule from the rule's own file: its docstring, its cases and the message it gives.

``python docs/generate_rules.py`` writes ``docs/rules/*.md``. With ``--check`` nothing is written, and the
exit status is 1 if a page is missing, stale or left over.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from dpfix.api import options_of
from dpfix.report.finding import Finding
from dpfix.rules import RULES
from dpfix.scan.scan import Scan

PAGES = Path(__file__).parent / "rules"
SECTIONS = ("What", "Why bad", "Why", "Example", "Use instead", "Fix safety")
HEADINGS = {"Why bad": "Why it is bad", "Why": "Why it matters", "Fix safety": "How safe the repair is"}
GENERATED = "<!-- written by docs/generate_rules.py from dpfix/rules/{name}.py; change that file instead -->"


def name_of(rule: ModuleType) -> str:
    """The rule's file name without its ending."""
    return rule.__name__.rpartition(".")[2]


def markdown(text: str) -> str:
    """Docstring markup as Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"(?<!`)(https?://[^\s),]+)", r"<\1>", text.replace("``", "`"))


def sections(rule: ModuleType) -> tuple[str, dict[str, str]]:
    """The first line of a rule's docstring, and its paragraphs by heading."""
    first, *paragraphs = inspect.cleandoc(rule.__doc__ or "").split("\n\n")
    found: dict[str, str] = {}
    for paragraph in paragraphs:
        heading, colon, text = paragraph.partition(":")
        if colon and heading in SECTIONS:
            found[heading] = text.strip()
        else:
            last = next(reversed(found), "What")
            found[last] = f"{found.get(last, '')}\n\n{paragraph}".strip()
    return first, found


# ------------------------------------------------------------------ the cases


class Source:
    """What stands in a rule's file.

    Args:
        rule: the rule.
    """

    def __init__(self, rule: ModuleType) -> None:
        self.text = inspect.getsource(rule)
        self.body = ast.parse(self.text).body
        kinds = (ast.FunctionDef, ast.ClassDef)
        self.helpers = {n.name: n for n in self.body if isinstance(n, kinds) and n.name.startswith("_")}

    def segment(self, node: ast.AST) -> str:
        """The source of a node."""
        return textwrap.dedent(ast.get_source_segment(self.text, node, padded=True) or "").strip()

    def cases(self, name: str) -> tuple[list[ast.expr], str]:
        """The cases of ``VALID`` or ``INVALID``, and the remark behind them."""
        for number, node in enumerate(self.body):
            target = (
                node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            )  # "INVALID: tuple = ()" is an annotated assignment
            if isinstance(target, ast.Name) and target.id == name and isinstance(node.value, ast.Tuple):  # type: ignore[union-attr]
                following = self.body[number + 1] if number + 1 < len(self.body) else None
                text = (
                    getattr(getattr(following, "value", None), "value", "") if isinstance(following, ast.Expr) else ""
                )
                return list(node.value.elts), text  # type: ignore[union-attr]
        return [], ""

    def needed(self, cases: list[ast.expr]) -> list[str]:
        """Source of the helpers that some cases use, directly or through one another."""
        wanted: set[str] = set()
        todo: list[ast.AST] = list(cases)
        while todo:
            names = {n.id for n in ast.walk(todo.pop()) if isinstance(n, ast.Name)}
            new = (names & self.helpers.keys()) - wanted
            wanted |= new
            todo += [self.helpers[n] for n in new]
        return [self.segment(node) for name, node in self.helpers.items() if name in wanted]


def case_lines(source: Source, cases: list[ast.expr]) -> str:
    """The body of every case, one below the other."""
    bodies = [case.body if isinstance(case, ast.Lambda) else case for case in cases]
    return "\n".join(source.segment(body) for body in bodies)


# ------------------------------------------------------------------ the message


def scan_of(case: dict[str, Any]) -> Scan:
    """A scan of a case, completed by an ordinary optimizer and loader."""
    case = dict(case)
    module = case.pop("module")
    optimizer = case.pop("optimizer", None)
    loader = case.pop("data_loader", None)
    case.pop("integers", None)
    if optimizer is None:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    if loader is None:
        loader = DataLoader(TensorDataset(torch.zeros(8, 6)), batch_size=4)
    return Scan(module, optimizer, loader, *options_of(case))


def findings(rule: ModuleType) -> Iterator[Finding]:
    """What the rule finds in its first case of every fixability."""
    seen: set[Any] = set()
    for case in rule.INVALID:
        for finding in rule.find(scan_of(case())):
            if finding.code == rule.CODE and finding.fixability not in seen:
                seen.add(finding.fixability)
                yield finding


def message(finding: Finding) -> str:
    """The message without line numbers and measured differences, which vary."""
    text = re.sub(r"(\w+\.py):\d+", r"\1", str(finding))
    return re.sub(r"\d\.\de[+-]\d\d", "...", text)


# ------------------------------------------------------------------ the pages


def page(rule: ModuleType) -> str:
    """The page of one rule."""
    name, (first, told), source = name_of(rule), sections(rule), Source(rule)
    error = rule.ERROR.__name__
    parts = [GENERATED.format(name=name), f"# {rule.CODE}: {markdown(rule.TITLE)}", markdown(first)]
    for heading, text in told.items():
        parts += [f"## {HEADINGS.get(heading, heading)}", markdown(text[:1].upper() + text[1:])]
    parts += ["## What dpfix says", f"A refusal is raised as `dpfix.{error}`."]
    messages = [message(finding) for finding in findings(rule)]
    if messages:
        parts += ["For the cases below:", "```text\n" + "\n\n".join(messages) + "\n```"]
    parts += ["## Cases", "Each line gives arguments of the call. The rule's tests run the same lines."]
    invalid, remark = source.cases("INVALID")
    valid, _ = source.cases("VALID")
    if invalid:
        parts += ["Found:", f"```python\n{case_lines(source, invalid)}\n```"]
    elif remark:
        parts += [f"Found: {markdown(remark)}"]
    if valid:
        parts += ["Left alone:", f"```python\n{case_lines(source, valid)}\n```"]
    helpers = source.needed([*valid, *invalid])
    if helpers:
        parts += ["with", "```python\n" + "\n\n\n".join(helpers) + "\n```"]
    return "\n\n".join(parts) + "\n"


def index() -> str:
    """The list of rules."""
    rows = [
        f"| [{r.CODE}]({name_of(r)}.md) | {markdown(r.TITLE)} | `{r.ERROR.__name__}` |"
        for r in sorted(RULES, key=lambda r: r.CODE)
    ]
    return "\n".join([
        GENERATED.format(name="*"),
        "",
        "# Rules",
        "",
        "A rule looks at model, optimizer and data loader before anything is run. It repairs what it finds,",
        "or it refuses it. What needs a run of the training step is on the page",
        "[What is checked, and what is not](../checks.md).",
        "",
        "| code | what is found | a refusal raises |",
        "|---|---|---|",
        *rows,
        "",
    ])


def pages() -> dict[str, str]:
    """All pages by file name."""
    return {"index.md": index(), **{f"{name_of(rule)}.md": page(rule) for rule in RULES}}


def stale(wanted: dict[str, str]) -> list[str]:
    """Pages that are missing, differ or are left over."""
    there = {path.name: path.read_text() for path in PAGES.glob("*.md")}
    return sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name))


def main() -> int:
    """Write or check the pages.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not up to date")
    check = parser.parse_args().check
    wanted = pages()
    old = stale(wanted)
    if check:
        if old:
            print(f"not up to date: {', '.join(old)}. Run: python docs/generate_rules.py", file=sys.stderr)
        return bool(old)
    PAGES.mkdir(exist_ok=True)
    for name in old:
        if name in wanted:
            (PAGES / name).write_text(wanted[name])
        else:
            (PAGES / name).unlink()
    print(f"{len(wanted)} pages, {len(old)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
