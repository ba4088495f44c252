"""The report as one HTML page: what a reader needs from it, in the order in which it is asked for.

The page has no script and names no address: it is one file that can be sent. All texts are escaped; names of modules, paths
and messages come from the script.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dpfix.report.curve import EpsilonCurve
from dpfix.report.finding import Fixability, Severity
from dpfix.report.groups import groups
from dpfix.report.text import summary
from dpfix.report.units import duration, number, size

if TYPE_CHECKING:
    from dpfix.report.report import EngineEvidence, Layer, Report
    from dpfix.report.statement import PrivacyStatement

WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 400, 220, 48, 40, 14
"""Of the drawing of epsilon; it is scaled to the page."""
FOLDED_FROM = 4
"""Places of one kind that are folded away."""

_SIGNS = {Severity.BREAKS_GUARANTEE: "■", Severity.BLOCKS_TRAINING: "▲", Severity.ADVICE: "○"}
_ANSWERS = {Fixability.EXACT: "✓", Fixability.CHANGES_MODEL: "≈", Fixability.NOTHING: "–", Fixability.REFUSED: "✕"}


def document(report: Report, statement: PrivacyStatement | None = None, curve: EpsilonCurve | None = None) -> str:
    """The whole page.

    Args:
        report: of the call.
        statement: of the steps that were made; left out of a diagnosis.
        curve: epsilon over the steps.

    Returns:
        An HTML document.
    """
    return _rendered("report.html", report, statement, curve)


def fragment(report: Report, statement: PrivacyStatement | None = None, curve: EpsilonCurve | None = None) -> str:
    """The same to be set into another page, as notebooks do; its rules of style stay inside of it.

    Args:
        report: of the call.
        statement: of the steps that were made.
        curve: epsilon over the steps.

    Returns:
        A ``style`` and a ``div`` element.
    """
    return _rendered("report_body.html", report, statement, curve)


@cache
def _environment() -> Environment:
    found = Environment(
        loader=PackageLoader("dpfix.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"size": size, "duration": duration, "number": number}
    return found


def _rendered(name: str, report: Report, statement: PrivacyStatement | None, curve: EpsilonCurve | None) -> str:
    drawn = None if curve is None else Drawing.of(curve)
    return (
        _environment()
        .get_template(name)
        .render(
            report=report,
            summary=summary(report, curve),
            groups=groups(report.findings),
            bars=[chart for chart in (_times(report), _memory(report)) if chart],
            rows=rows(report.layers),
            changed=[layer for layer in report.layers if layer.changed],
            statement=statement,
            curve=curve,
            drawing=drawn,
            signs=_SIGNS,
            answers=_ANSWERS,
            folded_from=FOLDED_FROM,
        )
    )


@dataclass(frozen=True)
class Bar:
    """One bar of a chart.

    Attributes:
        name: of the engine.
        text: its number.
        percent: its length.
        chosen: whether this engine trains.
    """

    name: str
    text: str
    percent: float
    chosen: bool


def _times(report: Report) -> tuple[str, list[Bar]] | None:
    known = [(e, e.seconds) for e in report.evidence if e.seconds is not None and e.passed]
    return _chart("time of a probe step", report, known, duration)


def _memory(report: Report) -> tuple[str, list[Bar]] | None:
    known = [(e, float(e.memory)) for e in report.evidence if e.memory is not None and e.passed]
    return _chart("memory that it holds at once, beside the model", report, known, size)


def _chart(
    title: str, report: Report, known: list[tuple[EngineEvidence, float]], text: Any
) -> tuple[str, list[Bar]] | None:
    if not known:
        return None
    most = max(value for _, value in known) or 1.0
    bars = [Bar(e.engine, text(value), round(100 * value / most, 1), e.engine == report.engine) for e, value in known]
    return title, bars


@dataclass(frozen=True)
class Row:
    """A line of the tree of modules.

    Attributes:
        depth: how far it is indented.
        name: its name in the module above; ``...`` for several that stayed as they were.
        before: what stood there.
        after: what stands there now; empty if it is the same.
        changed: whether it is another one.
    """

    depth: int
    name: str
    before: str
    after: str = ""
    changed: bool = False


def rows(layers: Iterable[Layer]) -> list[Row]:
    """The tree of modules, in the order of the model."""
    found = []
    for layer in layers:
        above, _, name = layer.path.rpartition(".")
        depth = 0 if not layer.path else 1 + above.count(".") + bool(above)
        before, after = layer.before or "nothing", layer.after or "nothing"
        found.append(Row(min(depth, 12), name or "model", before, after if layer.changed else "", layer.changed))
    return found


@dataclass(frozen=True)
class Drawing:
    """Where the lines of a curve run.

    Attributes:
        so_far: points of a polyline; empty if there is nothing to draw.
        to_come: the same.
        now: where the training is.
        across: places and texts of the marks of the lower axis.
        up: of the left axis.
    """

    so_far: str
    to_come: str
    now: tuple[float, float] | None
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]

    @classmethod
    def of(cls, curve: EpsilonCurve) -> Drawing | None:
        """The drawing of a curve; ``None`` if there is nothing that can be drawn."""
        points = [*curve.so_far, *curve.to_come]
        last, most = max((s for s, _ in points), default=0), max((e for _, e in points), default=0.0)
        if not last or not most or not math.isfinite(most):
            return None

        def place(point: tuple[int, float]) -> tuple[float, float]:
            x = LEFT + (WIDTH - LEFT - MARGIN) * point[0] / last
            y = HEIGHT - BOTTOM - (HEIGHT - BOTTOM - MARGIN) * point[1] / most
            return round(x, 1), round(y, 1)

        def line(part: tuple[tuple[int, float], ...]) -> str:
            return " ".join(f"{x},{y}" for x, y in map(place, part)) if len(part) > 1 else ""

        across = tuple((place((steps, 0.0))[0], f"{steps}") for steps in sorted({0, last // 2, last}))
        up = tuple((place((0, value))[1], number(value)) for value in (0.0, most / 2, most))
        now = place(curve.so_far[-1]) if curve.so_far else None
        return cls(line(curve.so_far), line(curve.to_come), now, across, up)
