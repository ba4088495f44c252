"""Write one page per rule from the rule's own file, the page of all codes, and the rules' part of the navigation.

``python -m docs.generate_rules`` writes ``docs/rules/*.md``, ``docs/codes.md`` and what stands between two marks in
``mkdocs.yml``. With ``--check`` nothing is written, and the exit status is 1 if something is missing, stale or left over.
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
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from dpfix import errors
from dpfix.api import options_of
from dpfix.report.codes import CODES, RETIRED
from dpfix.report.finding import Finding, Fixability
from dpfix.rules import RULES, Rule
from dpfix.rules.rule import run_rules
from dpfix.scan.scan import Scan

ROOT = Path(__file__).parents[1]
HEADINGS = {"Why bad": "Why it is bad", "Why": "Why it matters"}
SECTIONS = ("What", *HEADINGS, "Example", "Use instead")
GENERATED = "<!-- written by docs/generate_rules.py from {source}; change that file instead -->"
NAVIGATION = ("      # rules begin: written by docs/generate_rules.py\n", "      # rules end\n")
GROUPS = {
    "Layers": "batch_norm instance_norm inplace replaceable embedding",
    "The model": "eval_mode scripted compiled parameter_dtype distributed",
    "Optimizer and data": "optimizer data_loader",
}
"""What rules look at, and the files of those that do."""
BY_CODE = sorted(RULES, key=lambda rule: rule.code)


def name_of(rule: Rule) -> str:
    """The rule's file name without its ending."""
    return type(rule).__module__.rpartition(".")[2]


def markdown(text: str) -> str:
    """Docstring markup as Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"(?<!`)(https?://[^\s),]+)", r"<\1>", text.replace("``", "`"))


def sections(rule: Rule) -> tuple[str, dict[str, str]]:
    """The first line of a rule's docstring, and its paragraphs by heading."""
    first, *paragraphs = inspect.cleandoc(type(rule).__doc__ or "").split("\n\n")
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

    def __init__(self, rule: Rule) -> None:
        self.text = inspect.getsource(sys.modules[type(rule).__module__])
        nodes = [n for n in ast.parse(self.text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
        self.helpers = {n.name: n for n in nodes if n.name.startswith("_")}
        body = next(n for n in nodes if n.name == type(rule).__name__).body
        self.constants = {
            n.targets[0].id: n.value for n in body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
        }

    def segment(self, node: ast.AST) -> str:
        """The source of a node."""
        return textwrap.dedent(ast.get_source_segment(self.text, node, padded=True) or "").strip()

    def cases(self, name: str) -> list[ast.expr]:
        """The cases of ``VALID`` or ``INVALID``."""
        cases = self.constants.get(name)
        return cases.elts if isinstance(cases, ast.Tuple) else []

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


def findings(rule: Rule) -> Iterator[Finding]:
    """What the rule finds in its first case of every fixability."""
    seen: set[Any] = set()
    for case in rule.INVALID:
        for _, finding in run_rules(scan_of(case()), [rule]):
            if finding.fixability not in seen:
                seen.add(finding.fixability)
                yield finding


def message(finding: Finding) -> str:
    """The message without line numbers and measured differences, which vary."""
    text = re.sub(r"(\w+\.py):\d+", r"\1", str(finding))
    return re.sub(r"\d\.\de[+-]\d\d", "...", text)


# ------------------------------------------------------------------ the pages


def outcomes(rule: Rule) -> str:
    """What can be done about a finding of the rule, as the rule declares it."""
    return "\n".join(f"- `{outcome.value}`: {markdown(text)}" for outcome, text in rule.outcomes.items())


def refusal(rule: Rule) -> str:
    """The exception of a rule that refuses."""
    return f"`dpfix.{rule.error.__name__}`" if Fixability.REFUSED in rule.outcomes else ""


def page(rule: Rule) -> str:
    """The page of one rule."""
    name, (first, told), source = name_of(rule), sections(rule), Source(rule)
    parts = [
        GENERATED.format(source=f"dpfix/rules/{name}.py"),
        f"# {rule.code}: {markdown(rule.title)}",
        markdown(first),
    ]
    for heading, text in told.items():
        parts += [f"## {HEADINGS.get(heading, heading)}", markdown(text[:1].upper() + text[1:])]
    parts += ["## How safe the repair is", outcomes(rule), "## What dpfix says"]
    if refusal(rule):
        parts += [f"A refusal is raised as {refusal(rule)}."]
    messages = [message(finding) for finding in findings(rule)]
    if messages:
        parts += ["For the cases below:", "```text\n" + "\n\n".join(messages) + "\n```"]
    parts += ["## Cases", "Each line gives arguments of the call. The rule's tests run the same lines."]
    invalid, valid = source.cases("INVALID"), source.cases("VALID")
    if invalid:
        parts += ["Found:", f"```python\n{case_lines(source, invalid)}\n```"]
    elif rule.remark:
        parts += [f"Found: {markdown(rule.remark)}"]
    if valid:
        parts += ["Left alone:", f"```python\n{case_lines(source, valid)}\n```"]
    helpers = source.needed([*valid, *invalid])
    if helpers:
        parts += ["with", "```python\n" + "\n\n\n".join(helpers) + "\n```"]
    return "\n\n".join(parts) + "\n"


def table(*rows: tuple[str, ...]) -> str:
    """A table; the first row is its head."""
    head, *body = (f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def grouped() -> dict[str, list[Rule]]:
    """The rules by what they look at, in the order of their codes.

    Raises:
        ValueError: a rule stands in no group, or a group names a file that is no rule.
    """
    files = {name_of(rule) for rule in RULES}
    if wrong := files ^ set(" ".join(GROUPS.values()).split()):
        raise ValueError(f"GROUPS and the files of dpfix/rules/ do not agree: {', '.join(sorted(wrong))}")
    return {group: [rule for rule in BY_CODE if name_of(rule) in names.split()] for group, names in GROUPS.items()}


def row(rule: Rule) -> tuple[str, ...]:
    """A rule in the list of rules."""
    can_be_done = ", ".join(f"`{outcome.value}`" for outcome in rule.outcomes)
    return f"[{rule.code}]({name_of(rule)}.md)", markdown(rule.title), can_be_done, refusal(rule)


def index() -> str:
    """The list of rules."""
    parts = [
        GENERATED.format(source="dpfix/rules/*.py"),
        "# Rules",
        "A rule looks at model, optimizer and data loader before anything is run. It repairs what it finds,\n"
        "or it refuses it. What needs a run of the training step is on the page\n"
        "[What is checked, and what is not](../checks.md); [Codes](../codes.md) has all numbers.",
    ]
    for group, rules in grouped().items():
        head = ("code", "what is found", "what can be done", "a refusal raises")
        parts += [f"## {group}", table(head, *map(row, rules))]
    return "\n\n".join(parts) + "\n"


def codes() -> str:
    """The page of all codes, rules' and others."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.DPFixError)]
    raised = {kind.code: f"`dpfix.{kind.__name__}`" for kind in kinds}
    others = [(code, meaning, raised.get(code, "")) for code, meaning in CODES.items()]
    given = {*CODES, *RETIRED, *(rule.code for rule in RULES)}
    last = max(code for code in given if code < "DPF100")
    parts = [
        GENERATED.format(source="dpfix/report/codes.py and dpfix/rules/__init__.py"),
        "# Codes",
        "The code of a finding never changes its meaning. It stands in the report, in its JSON and HTML forms, and in\n"
        "`error.findings` of whatever is refused.",
        "## Rules",
        table(
            ("code", "meaning"),
            *((f"[{rule.code}](rules/{name_of(rule)}.md)", markdown(rule.title)) for rule in BY_CODE),
        ),
        "## Checks and advice",
        "What is found besides, most of it by running the training step; see [What is checked, and what is not](checks.md).",
        table(("code", "meaning", "error of this code"), *(row for row in others if row[0] < "DPF100")),
        "## Refusals in words",
        "A refusal without a finding of its own has the code of its class of error. Its text does not name the code.",
        table(("code", "meaning", "error of this code"), *(row for row in others if row[0] >= "DPF100")),
        "## Retired",
        table(("code", "meaning"), *RETIRED.items()),
        f"The next free number of a rule or check is DPF{int(last[3:]) + 1:03d}. It is given in `dpfix/rules/__init__.py` or\n"
        "`dpfix/report/codes.py`.",
    ]
    return "\n\n".join(parts) + "\n"


def navigation() -> str:
    """``mkdocs.yml`` with every page of a rule in its navigation."""
    begin, end = NAVIGATION
    before, _, rest = (ROOT / "mkdocs.yml").read_text().partition(begin)
    lines = ["Rules:", "    - rules/index.md"]
    for group, rules in grouped().items():
        lines += [f"    - {group}:", *(f"        - rules/{name_of(rule)}.md" for rule in rules)]
    first, *others = lines
    entries = "".join(f"      {line}\n" for line in (f"- {first}", *others))
    return before + begin + entries + end + rest.partition(end)[2]


def pages() -> dict[str, str]:
    """All that is written, by path."""
    rules = {"index": index(), **{name_of(rule): page(rule) for rule in RULES}}
    return {
        "mkdocs.yml": navigation(),
        "docs/codes.md": codes(),
        **{f"docs/rules/{name}.md": text for name, text in rules.items()},
    }


def stale(wanted: dict[str, str]) -> list[str]:
    """Pages that are missing, differ or are left over."""
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "docs/rules").glob("*.md")}
    return sorted(
        name
        for name in wanted.keys() | there
        if not (ROOT / name).exists() or wanted.get(name) != (ROOT / name).read_text()
    )


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
            print(f"not up to date: {', '.join(old)}. Run: python -m docs.generate_rules", file=sys.stderr)
        return bool(old)
    for name in old:
        if name in wanted:
            (ROOT / name).write_text(wanted[name])
        else:
            (ROOT / name).unlink()
    print(f"{len(wanted)} pages, {len(old)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
