"""The page as a browser shows it: nothing sticks out, moves, complains or is asked of the network, in all schemes and widths.

Needs playwright and a Chromium, which ``DPFIX_TEST_BROWSER`` names; see ``docs/contributing.md``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import dpfix
from dpfix.report.finding import Finding
from dpfix.report.report import Report
from tests.helpers import setting, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

SHIFTS = """
window.shifted = 0;
new PerformanceObserver((list) => { for (const e of list.getEntries()) window.shifted += e.value; })
    .observe({type: "layout-shift", buffered: true});
"""
UNFOLD = "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
STICKS_OUT = """() => {
    const width = document.documentElement.clientWidth;
    const scrolls = (e) => e && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
    const out = [...document.body.querySelectorAll('*')]
        .filter((e) => e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement))
        .map((e) => `${e.tagName}.${e.className}`);
    return document.documentElement.scrollWidth > width ? ["the page", ...out] : out;
}"""
CONTRASTS = """() => {
    const light = (text) => {
        const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (e) => {
        for (; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$/.test(colour)) return light(colour);
        }
        return 1;
    };
    const texts = [...document.body.querySelectorAll('*')]
        .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length)
        .filter((e) => !e.closest('svg') && !e.closest('style'));
    return texts.map((e) => {
        const [dark, bright] = [light(getComputedStyle(e).color), ground(e)].sort((a, b) => a - b);
        return [(bright + 0.05) / (dark + 0.05), e.tagName + ': ' + e.textContent.trim().slice(0, 40)];
    });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("DPFIX_TEST_BROWSER")
    if not path:
        pytest.skip("DPFIX_TEST_BROWSER names no browser")
    with playwright.sync_playwright() as run:
        opened = run.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of a training and one of a refusal, with long names and many places."""
    blocks = (nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ELU(inplace=True)) for _ in range(8))
    long = nn.ModuleDict({"a_module_whose_name_is_longer_than_a_narrow_screen_is_wide": nn.Linear(16, 3)})
    model = nn.Sequential(nn.Linear(6, 16), *blocks, *long.values())
    private = dpfix.make_private_safe(**setting(model, cache=False))
    train(private, 3)
    fact = f"the loss in `{'deep.' * 40}loss` mixes (/{'folder/' * 30}train.py:12)."
    refused = Report("Net", tuple(Finding.refusal("DPF014", fact, "it does. " * 40, "do not.") for _ in range(6)))
    folder = tmp_path_factory.mktemp("pages")
    for name, text in (("training", private.to_html(1e-3)), ("refused", refused.to_html())):
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {file.stem: file for file in folder.iterdir()}


@pytest.mark.parametrize("page", ["training", "refused"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 800, 1400])
def test_page(browser: Any, pages: dict[str, Path], page: str, scheme: str, width: int, tmp_path: Path) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    complaints: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.add_init_script(SHIFTS)
    address = pages[page].as_uri()
    tab.goto(address, wait_until="networkidle")
    assert tab.evaluate("window.shifted") == 0
    tab.screenshot(path=tmp_path / "folded.png", full_page=True)
    assert tab.evaluate(STICKS_OUT) == []
    tab.evaluate(UNFOLD)
    assert tab.evaluate(STICKS_OUT) == []
    assert [found for found in tab.evaluate(CONTRASTS) if found[0] < 4.5] == []
    tab.screenshot(path=tmp_path / "unfolded.png", full_page=True)
    assert (complaints, asked) == ([], [address])
    tab.close()


def test_what_sticks_out_and_cannot_be_read_is_found(browser: Any) -> None:
    tab = browser.new_page(viewport={"width": 320, "height": 900})
    tab.set_content('<p style="width: 400px; color: #bbbbbb; background: #ffffff">too wide and too pale</p>')
    assert tab.evaluate(STICKS_OUT) == ["the page", "P."]
    ((contrast, _),) = tab.evaluate(CONTRASTS)
    assert 1.5 < contrast < 2.5
    tab.close()
