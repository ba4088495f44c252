"""The documentation runs, is complete, and says what the code says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import opacus_comparison
from benchmarks.common import tables
from dpfix.rules import RULES
from tests.weights.legacy_zoo import REFUSED, ZOO

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = {"docs/lightning.md": "lightning"}
WITH_EXAMPLES = [
    "README.md",
    "docs/quickstart.md",
    "docs/monai.md",
    "docs/augmentation.md",
    "docs/budget.md",
    "docs/federated.md",
    "docs/people.md",
    *NEEDS,
]


def load(path: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*treespec")
@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_examples_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The Python blocks of a page run from top to bottom, as one script."""
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    text = (ROOT / page).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S))
    assert blocks
    namespace: dict[str, object] = {"__name__": "example"}
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], page, "exec"), namespace)
    assert "privacy statement" in capsys.readouterr().out


def test_rule_pages_are_up_to_date() -> None:
    """Pages of rules, of codes and the navigation are what the source says; ``python -m docs.generate_rules`` writes them."""
    generator = load("docs/generate_rules.py")
    assert generator.stale(generator.pages()) == []


def test_every_code_is_explained() -> None:
    """Every code that a message can carry stands in the documentation."""
    source = "".join(path.read_text() for path in (ROOT / "dpfix").rglob("*.py"))
    told = "".join(page.read_text() for page in PAGES)
    assert {rule.code for rule in RULES} <= set(re.findall(r"DPF\d{3}", (ROOT / "docs/codes.md").read_text()))
    assert set(re.findall(r"DPF\d{3}", source)) <= set(re.findall(r"DPF\d{3}", told))


def test_every_rule_is_in_the_navigation() -> None:
    """``mkdocs.yml`` lists every page there is."""
    listed = set(re.findall(r"([\w/.-]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES[2:]}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Links to other pages of the repository name files that exist."""
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_readme_shows_the_measured_table() -> None:
    """The table of the README is the one of the comparison page, and every set-up is in it."""
    table = tables.written(ROOT / "README.md")
    assert table and table in (ROOT / "docs/comparison.md").read_text()
    assert [row for row, *_ in opacus_comparison.SETUPS if f"| {row} |" not in table] == []
    assert "**wrong**" not in table


@pytest.mark.parametrize("name", ["tokens", "crops", "detached", "dropped_last"])
def test_comparison_is_right(name: str) -> None:
    """A few rows of the comparison, measured: dpfix is right, and Opacus is not."""
    _, build, measure, _ = next(row for row in opacus_comparison.SETUPS if row[1].__name__ == name)
    assert opacus_comparison.outcome(opacus_comparison.through_dpfix, build, measure).right
    assert not opacus_comparison.outcome(opacus_comparison.plain_opacus, build, measure).right


@pytest.mark.slow
def test_whole_comparison() -> None:
    """The script's exit status says that dpfix was right in every row."""
    command = [sys.executable, "-m", "benchmarks.opacus_comparison"]
    subprocess.run(command, check=True, capture_output=True, timeout=1200, cwd=ROOT)


def test_weights_page_has_every_network() -> None:
    """The table says of every network that dpfix loads it rightly or refuses it."""
    table = tables.written(ROOT / "docs/weights.md")
    cells = {
        line.split("|")[1].strip(): line.split("|")[3].strip() for line in table.splitlines() if line.startswith("|")
    }
    assert all(cells[case.name.strip()].startswith("right") for case in ZOO)
    assert all(cells[case.name.strip()].startswith("refused") for case in REFUSED)
