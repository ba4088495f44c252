"""The documentation runs, is complete, and says what the code says."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import opacus
import pytest

from benchmarks import opacus_comparison, real_scripts
from benchmarks.common import tables
from dpfix.report.statement import NOT_COVERED
from dpfix.rules import RULES
from tests.weights.legacy_zoo import REFUSED, ZOO

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def load(path: str) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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


def test_migration_knows_every_argument_and_method_of_opacus() -> None:
    """Whatever a script on Opacus may ask its engine for is in the table."""
    table = (ROOT / "docs/migration.md").read_text().partition("## Call by call")[2]
    arguments = inspect.signature(opacus.PrivacyEngine.make_private).parameters.keys()
    ordinary = {"self", "module", "optimizer", "data_loader", "noise_multiplier", "max_grad_norm", "kwargs"}
    methods = [name for name in vars(opacus.PrivacyEngine) if not name.startswith("_")]
    assert [name for name in arguments - ordinary if f"`{name}=" not in table] == []
    assert [name for name in methods if not re.search(rf"`(engine\.)?{name}\b", table)] == []


def test_site_takes_nothing_from_elsewhere() -> None:
    """Pages opened as files have fonts, search and its script beside them."""
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings and "  - search\n  - offline" in settings
    assert "http" not in settings
    files = re.findall(r"assets/\S+", settings)
    assert "assets/iframe-worker.js" in files  # without it the plugin takes it from a server
    assert all((ROOT / "docs" / file).exists() for file in files)


def test_sharp_edges_name_what_is_not_covered() -> None:
    """What every statement says of its limits stands on the page of sharp edges."""
    page = (ROOT / "docs/sharp-edges.md").read_text()
    assert [item for item in NOT_COVERED if f"| {item} |" not in page] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.stem)
def test_public_names_exist(page: Path) -> None:
    """What a page calls `dpfix.something` is there."""
    named = set(re.findall(r"dpfix(?:\.[A-Za-z_]+)+(?![\w./])", FENCED.sub("", page.read_text())))
    assert [name for name in sorted(named) if not is_there(name)] == []


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_every_page_is_in_the_navigation() -> None:
    """``mkdocs.yml`` lists every page there is."""
    listed = set(re.findall(r"([\w/.-]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES[2:]}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Links within the repository name files, and headings in them, that exist."""
    targets = re.findall(r"\]\((?!https?:|mailto:)([^)\s]*)", FENCED.sub("", page.read_text()))
    assert [target for target in targets if not leads_somewhere(page, *target.partition("#")[::2])] == []


FENCED = re.compile(r"^(`{3,}|~{3,}).*\n(?:.*\n)*?\1$", re.M)


def leads_somewhere(page: Path, name: str, heading: str) -> bool:
    there = page.parent / name if name else page
    return there.exists() and (not heading or heading in anchors(there.read_text()))


def anchors(text: str) -> set[str]:
    """The anchors that the headings of a page, and the names of the API, get."""
    found = {name for name in re.findall(r"^::: (\S+)$", text, re.M)}
    for heading in re.findall(r"^#+ +(.+)$", FENCED.sub("", text), re.M):
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)).strip().lower()
        slug, number = re.sub(r"[-\s]+", "-", words), 0
        while (anchor := f"{slug}_{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


def test_anchors_are_told_apart() -> None:
    """A heading that is not there, one in a block of code, and the second of two that are alike."""
    text = "# On `every` step, 1.5\n\n## Twice\n\n## Twice\n\n```text\n# No heading\n```\n\n::: dpfix.plan\n"
    assert anchors(text) == {"on-every-step-15", "twice", "twice_1", "dpfix.plan"}


def test_readme_shows_the_measured_table() -> None:
    """The table of the README is the one of the comparison page, and every set-up is in it."""
    table = tables.written(ROOT / "README.md")
    assert table and table in (ROOT / "docs/comparison.md").read_text()
    assert [row for row, *_ in opacus_comparison.SETUPS if f"| {row} |" not in table] == []
    scripts = tables.written(ROOT / "README.md", real_scripts.MARK)
    assert [row for row, *_ in real_scripts.SCRIPTS if f"| {row} |" not in scripts] == []
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
