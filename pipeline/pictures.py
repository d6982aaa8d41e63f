"""Pictures for the report, as SVG text for its page: equal bytes for equal data, and nothing from outside."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

WIDTH_IN, HEIGHT_IN = 4.6, 3.3
# drawn in these, which become the page's own colours, light or dark
INK, SOFT, LINE, GOOD, BAD = "#010101", "#020202", "#030303", "#040404", "#050505"
_COLOURS = {INK: "currentColor", SOFT: "var(--soft)", LINE: "var(--line)", GOOD: "var(--good)", BAD: "var(--bad)"}
_STYLE: Any = {  # matplotlib's type is a dict of 330 literals
    "svg.hashsalt": "exportyard",
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# where a label may stand, in points from its mark: (x, y, horizontal alignment); near ones first
_PLACES = (
    *((11, 0, "left"), (-11, 0, "right"), (0, 13, "center"), (0, -13, "center")),
    *((right, up, side) for up in (11, -11, 22, -22, 33, -33) for right, side in ((9, "left"), (-9, "right"))),
)


@dataclass(frozen=True)
class Point:
    """A candidate: its latency in milliseconds (None if it wasn't timed), and the recipe's metric."""

    label: str
    latency_ms: float | None
    metric: float
    passed: bool
    chosen: bool


def tradeoff(points: Sequence[Point], eager: float, budget: float, metric: str, latency: str, *, name: str) -> str:
    """Accuracy against latency: an ``<svg>`` element with one mark a candidate, and the budget as a line.

    Args:
        points: at least one.
        eager: the metric of eager fp32.
        budget: the metric's worst value within budget.
        metric: the axis' label.
        latency: likewise.
        name: of the picture, unique in its page; letters, digits and ``-``.
    """
    # an Agg figure of its own: pyplot would keep every figure, and look for a display
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), dpi=72, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        _frame(axes, points, eager, budget)
        axes.set_xlabel(latency)
        axes.set_ylabel(metric)
        _lines(axes, eager, budget)
        for point in points:
            _mark(axes, point)
        _label(axes, points, (eager, budget))
        written = io.StringIO()
        figure.savefig(
            written,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _for_page(written.getvalue(), points, name, f"{metric} against {latency}")


def _frame(axes: Axes, points: Sequence[Point], eager: float, budget: float) -> None:
    """Limits that leave room for labels. Latency starts at zero, so that distances are honest."""
    timed = [point.latency_ms for point in points if point.latency_ms is not None]
    right = (max(timed, default=0) or 1) * 1.3
    axes.set_xlim(0, right)
    values = [*(point.metric for point in points), eager, budget]
    room = max((max(values) - min(values)) * 0.22, 1e-3)
    axes.set_ylim(min(values) - room, max(values) + room)
    axes.grid(visible=True, color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(axis="x", nbins=6)
    axes.locator_params(axis="y", nbins=6)


def _lines(axes: Axes, eager: float, budget: float) -> None:
    axes.axhline(eager, color=SOFT, linewidth=1, linestyle=(0, (1, 2)))
    axes.axhline(budget, color=BAD, linewidth=1.2, linestyle=(0, (5, 3)))
    side = axes.get_yaxis_transform()
    up = eager >= budget
    for value, text, colour, above in ((eager, "eager fp32", SOFT, up), (budget, "budget", BAD, not up)):
        axes.annotate(
            text,
            (1, value),
            xycoords=side,
            xytext=(0, 3 if above else -3),
            textcoords="offset points",
            ha="right",
            va="bottom" if above else "top",
            color=colour,
        )


def _x(axes: Axes, point: Point) -> float:
    """Where a candidate stands; one that wasn't timed stands at the right edge."""
    return point.latency_ms if point.latency_ms is not None else axes.get_xlim()[1] * 0.97


def _mark(axes: Axes, point: Point) -> None:
    colour = GOOD if point.chosen else INK if point.passed else BAD
    shape = "o" if point.passed else "X"
    where = [_x(axes, point)], [point.metric]
    if point.chosen:
        axes.plot(*where, "o", color="none", markeredgecolor=GOOD, markersize=14, markeredgewidth=1.3)
    timed = point.latency_ms is not None
    (mark,) = axes.plot(*where, shape, color=colour, markersize=7, fillstyle="full" if timed else "none")
    mark.set_gid(f"mark-{point.label}")


def _label(axes: Axes, points: Sequence[Point], across: Sequence[float]) -> None:
    """Write each candidate's name beside its mark, where nothing is yet; over a line of `across` only if it must be."""
    figure = axes.get_figure()
    assert figure is not None
    figure.draw_without_rendering()  # type: ignore[union-attr]  # a figure, since we made it
    inside = axes.get_window_extent()
    taken = [text.get_window_extent() for text in axes.texts]
    taken += [_box(axes, _x(axes, point), point.metric, 7, 7) for point in points]
    lines = [_box(axes, 0, height, inside.width, 1) for height in across]
    for point in points:
        notes = [_write(axes, point, *place) for place in _PLACES]
        boxes = [note.get_window_extent() for note in notes]
        fits = [_within(box, inside) and not any(box.overlaps(other) for other in taken) for box in boxes]
        clear = [fit and not any(box.overlaps(line) for line in lines) for fit, box in zip(fits, boxes, strict=True)]
        best = clear.index(True) if any(clear) else fits.index(True) if any(fits) else 0
        for position, note in enumerate(notes):
            if position != best:
                note.remove()
        taken.append(boxes[best])


def _write(axes: Axes, point: Point, right: float, up: float, side: Any) -> Annotation:
    return axes.annotate(
        point.label if point.latency_ms is not None else f"{point.label} (not timed)",
        (_x(axes, point), point.metric),
        xytext=(right, up),
        textcoords="offset points",
        ha=side,
        va="center",
        color=GOOD if point.chosen else INK if point.passed else BAD,
        fontweight="bold" if point.chosen else "normal",
        in_layout=False,
    )


def _within(box: Bbox, outer: Bbox) -> bool:
    return bool(outer.x0 <= box.x0 and box.x1 <= outer.x1 and outer.y0 <= box.y0 and box.y1 <= outer.y1)


def _box(axes: Axes, x: float, y: float, right: float, up: float) -> Bbox:
    """A box around a place, in pixels; `right` and `up` are half of its sides."""
    from matplotlib.transforms import Bbox

    column, line = (float(at) for at in axes.transData.transform((x, y)))
    return Bbox.from_extents(column - right, line - up, column + right, line + up)


def _for_page(svg: str, points: Sequence[Point], name: str, title: str) -> str:
    """The ``<svg>`` element alone, in the page's colours and font, with identifiers that no other picture has."""
    text = svg[svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    for drawn, wanted in _COLOURS.items():
        text = text.replace(drawn, wanted)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = text.replace("*{stroke-linejoin", "svg *{stroke-linejoin")  # or it would style the whole page
    for point in points:
        start = f'<g id="{name}-mark-{point.label}">'
        text = text.replace(start, f"{start}<title>{escape(_told(point))}</title>")
    head, _, rest = text.partition(">")
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(title)}">{rest}'


def _told(point: Point) -> str:
    timed = "not timed" if point.latency_ms is None else f"{point.latency_ms:.3g} ms"
    return f"{point.label}: {timed}, {point.metric:.4f}"
