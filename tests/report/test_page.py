"""The page: well formed, alone, readable in light and dark, folded where there is much, and short where it stands first."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from torch import nn

import dpfix
from dpfix.report import page
from dpfix.report.curve import EpsilonCurve
from dpfix.report.finding import Finding
from dpfix.report.page import Drawing
from dpfix.report.report import EngineEvidence, Layer, Report
from dpfix.report.text import summary
from tests.helpers import setting, train

VOID = {"meta", "br", "link", "img", "input", "hr", "path", "circle", "polyline"}
STYLE = (Path(page.__file__).parent / "report.css").read_text()


class Outline(HTMLParser):
    """Elements that are open, and everything that was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.details: list[bool] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "details":
            self.details.append("open" in dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def outline(text: str) -> Outline:
    found = Outline()
    found.feed(text)
    found.close()
    assert found.open == []
    return found


@pytest.fixture(scope="module")
def private() -> dpfix.PrivateTraining:
    layers = (nn.Linear(6, 16), nn.BatchNorm1d(16), *(nn.ELU(inplace=True) for _ in range(8)), nn.Linear(16, 3))
    private = dpfix.make_private_safe(**setting(nn.Sequential(*layers), cache=False))
    train(private, 3)
    return private


# ------------------------------------------------------------------ the page


def test_page_is_well_formed_and_needs_nothing_else(private: dpfix.PrivateTraining) -> None:
    text = private.to_html(1e-3)
    found = outline(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(found.tags)
    assert not {name for name, _ in found.attributes} & {"src", "href", "onclick", "onload", "data"}
    assert "url(" not in text and "@import" not in text and "://" not in text


def test_many_places_of_one_kind_are_one_finding_and_folded(private: dpfix.PrivateTraining) -> None:
    findings = [f for f in private.report.findings if f.code == "DPF003"]
    text = private.report.to_html()
    assert len(findings) == 8 and text.count("<b>DPF003</b>") == 1 and "7 more of the same" in text
    assert outline(text).details and not any(outline(text).details)  # 9 layers changed: folded too
    assert all(f.fact in text.replace("&#39;", "'") for f in findings)


def test_what_stops_the_training_stands_first() -> None:
    told = Finding.advice("DPF050", "a remark.", "none.")
    stops = Finding.refusal("DPF014", "the loss mixes.", "it does.", "do not.")
    text = Report("Net", (told, stops)).to_html()
    assert text.index("the loss mixes.") < text.index("a remark.")


def test_fragment_keeps_its_style_to_itself(private: dpfix.PrivateTraining) -> None:
    for shown in (private._repr_html_(), private.report._repr_html_()):
        outline(shown)
        assert "<html" not in shown and "<body" not in shown and " id=" not in shown
    rules = re.sub(r"@media[^{]*\{", "", STYLE)
    selectors = [s.strip() for head in re.findall(r"([^{}]+)\{", rules) for s in head.split(",")]
    assert selectors and [s for s in selectors if not s.startswith(".dpfix-report")] == []


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("ground", ["ground", "raised"])
def test_texts_can_be_read(scheme: int, ground: str) -> None:
    """Contrast of at least 4.5, level AA of https://www.w3.org/TR/WCAG22/."""
    blocks = re.findall(r"--ground:.*?\}", STYLE, re.S)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[scheme]))
    below = luminance(colours[ground])
    for name in ("text", "quiet", "mark", "bad", "warn", "good"):
        light, dark = sorted((luminance(colours[name]), below), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_nothing_is_told_by_colour_alone(private: dpfix.PrivateTraining) -> None:
    text = private.report.to_html()
    assert all(
        word in text for word in ("■", "breaks-guarantee", "▲", "blocks-training", "≈", "changes-model", "● trains")
    )


def test_tree_shows_before_and_after(private: dpfix.PrivateTraining) -> None:
    (norm,) = [layer for layer in private.report.layers if layer.path == "1"]
    assert norm.changed and norm.before.startswith("BatchNorm1d(16") and norm.after.startswith("GroupNorm(")
    (linear,) = [layer for layer in private.report.layers if layer.path == "0"]
    assert not linear.changed and linear.before == "Linear(in_features=6, out_features=16, bias=True)"


def test_a_diagnosis_shows_the_repaired_tree() -> None:
    given = setting(nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)))
    report = dpfix.diagnose(**{k: given[k] for k in ("module", "optimizer", "data_loader", "criterion")})
    assert [layer.path for layer in report.layers if layer.changed] == ["1"]
    assert isinstance(given["module"][1], nn.BatchNorm1d)


def test_code_of_the_script_is_not_asked_for_words() -> None:
    class Own(nn.Linear):
        def extra_repr(self) -> str:
            raise AssertionError("it may print values")

    report = dpfix.make_private_safe(**setting(nn.Sequential(Own(6, 3)), cache=False)).report
    assert Layer("0", "Own", "Own") in report.layers


def test_bars_are_in_proportion() -> None:
    evidence = (
        EngineEvidence("bookkeeping", True, 1e-7, 0.001, samples=8, memory=1024),
        EngineEvidence("vmap", True, 1e-7, 0.004, samples=8, memory=512),
        EngineEvidence("hooks", False, reason="no"),
    )
    text = Report("Net", engine="bookkeeping", evidence=evidence).to_html()
    assert re.findall(r'style="width: ([\d.]+)%', text) == ["25.0", "100.0", "100.0", "50.0"]
    assert all(word in text for word in ("1 ms", "4 ms", "1 KiB", "512 bytes")) and text.count("● trains") == 2


# ------------------------------------------------------------------ epsilon


def test_curve_is_the_accountants(private: dpfix.PrivateTraining) -> None:
    curve, steps = private._curve(1e-3), private.statement(1e-3).steps
    assert curve.so_far[0] == (0, 0.0) and curve.so_far[-1] == curve.to_come[0]
    assert curve.so_far[-1] == (steps, pytest.approx(private.get_epsilon(1e-3)))
    values = [epsilon for _, epsilon in (*curve.so_far, *curve.to_come)]
    assert values == sorted(values) and curve.to_come[-1][1] > curve.so_far[-1][1]


def test_curve_ends_where_it_was_planned() -> None:
    given = setting(nn.Sequential(nn.Linear(6, 3)))
    del given["noise_multiplier"]
    private = dpfix.make_private_safe_with_epsilon(target_epsilon=4.0, target_delta=1e-3, epochs=2, **given)
    train(private, 1)
    curve = private._curve(1e-3)
    assert curve.to_come[-1][0] == 2 * 3 and curve.to_come[-1][1] == pytest.approx(4.0, abs=0.1)
    assert "epsilon 4 at delta 0.001" in str(private.report) and "as it was planned" in private.to_html()
    assert private.with_objects(*private)._curve(1e-3).to_come == curve.to_come


def test_infinite_epsilon_is_said_and_not_drawn() -> None:
    private = dpfix.make_private_safe(**setting(nn.Sequential(nn.Linear(6, 3)), noise_multiplier=0.0))
    train(private, 1)
    text = private.to_html(1e-3)
    assert "epsilon <b>inf</b>" in text and "<svg" not in text


def test_points_stay_inside_of_the_drawing() -> None:
    drawing = Drawing.of(EpsilonCurve(1e-5, ((0, 0.0), (5, 1.0)), ((5, 1.0), (100, 3.0))))
    assert drawing is not None
    points = [tuple(map(float, p.split(","))) for line in (drawing.so_far, drawing.to_come) for p in line.split()]
    assert all(page.LEFT <= x <= page.WIDTH and 0 <= y <= page.HEIGHT - page.BOTTOM for x, y in points)
    assert Drawing.of(EpsilonCurve(1e-5, ((0, 0.0),))) is None


# ------------------------------------------------------------------ the terminal


def test_short_form_is_five_lines(private: dpfix.PrivateTraining) -> None:
    heading, *lines, hint = str(private.report).splitlines()
    assert heading == "dpfix report for Sequential" and "report.details()" in hint
    assert [line.split(":")[0].strip() for line in lines] == ["verdict", "engine", "cost", "epsilon", "changed"]
    assert "1 place computes something else now (DPF001), 8 places compute the same in another way (DPF003)" in lines[4]


def test_short_form_of_a_training_says_what_is_spent(private: dpfix.PrivateTraining) -> None:
    delta = 0.1 / 24
    assert f"{private.get_epsilon(delta):.4g} at delta {delta:g} after" in str(private)


def test_short_form_has_what_stops_the_training() -> None:
    stops = Finding.refusal("DPF014", "the loss mixes.", "it does.", "do not.")
    text = str(Report("Net", (stops,)))
    assert (
        "refused: 1 finding stops private training" in text and str(stops).splitlines()[0] in text and "do not." in text
    )


def test_verdict_is_no_proof_where_nothing_was_proven() -> None:

    report = dpfix.make_private_safe(**setting(nn.Sequential(nn.Linear(6, 3)), grad_sample_mode="no_op")).report
    assert "not proven" in summary(report)["verdict"]
    assert "decides" in summary(replace(report, engine=""))["verdict"]
