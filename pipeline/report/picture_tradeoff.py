"""Accuracy against latency: the forms of one target, and what all targets ship."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipeline.report import drawing, picture_labels
from pipeline.report.drawing import NARROW, WIDE, Paint, identifier, plain
from pipeline.report.picture_labels import Label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

OVERVIEW = (WIDE, 4.2)
_FAR = 8.0  # times as slow: a logarithmic scale shows more


@dataclass(frozen=True)
class Point:
    """A form: its latency in milliseconds (None if it wasn't timed), the quartiles of that, and the recipe's metric."""

    label: str
    latency_ms: float | None
    metric: float
    passed: bool
    chosen: bool
    spread_ms: tuple[float, float] | None = None
    kind: str = "fp32"


@dataclass(frozen=True)
class Scale:
    """What the axes are of: the metric of eager fp32, its worst value within budget, and what to call both axes."""

    eager: float
    budget: float
    metric: str
    latency: str


def tradeoff(points: Sequence[Point], scale: Scale, *, name: str) -> str:
    """The forms of one target: an ``<svg>`` element with one mark a form, and the budget as a line.

    Args:
        points: at least one.
        scale: see there.
        name: of the picture, unique in its page; letters, digits and ``-``.
    """
    title = f"{scale.metric} against {scale.latency}"
    return drawing.svg(_drawing(points, scale), NARROW, name=name, title=title, told=_told(points))


def overview(points: Sequence[Point], scale: Scale, *, name: str) -> str:
    """As `tradeoff`, for forms of many targets."""
    title = f"{scale.metric} against {scale.latency}, all targets"
    return drawing.svg(_drawing(points, scale), OVERVIEW, name=name, title=title, told=_told(points))


def overview_png(points: Sequence[Point], scale: Scale) -> bytes:
    """`overview` as a PNG file."""
    return drawing.png(_drawing(points, scale), OVERVIEW)


def _drawing(points: Sequence[Point], scale: Scale) -> drawing.Draw:
    return partial(_draw, points=points, scale=scale)


def _draw(axes: Axes, paint: Paint, *, points: Sequence[Point], scale: Scale) -> None:
    _frame(axes, paint, points, scale)
    _lines(axes, paint, scale)
    for point in points:
        _mark(axes, paint, point)
    _label(axes, paint, points, scale)


def _frame(axes: Axes, paint: Paint, points: Sequence[Point], scale: Scale) -> None:
    """Limits with room for labels. Latency starts at zero, so that distances are honest, unless it varies much."""
    timed = [point.latency_ms for point in points if point.latency_ms]
    ends = [min(point.spread_ms[1], 2 * (point.latency_ms or 0)) for point in points if point.spread_ms is not None]
    most, least = max([*timed, *ends], default=1.0), min(timed, default=1.0)
    if most > _FAR * least:
        axes.set_xscale("log")
        axes.set_xlim(least / 1.6, most * 2.2)
        _plain_ticks(axes)
        axes.set_xlabel(f"{plain(scale.latency, 90)}, logarithmic")
    else:
        axes.set_xlim(0, most * 1.3)
        axes.locator_params(axis="x", nbins=6)
        axes.set_xlabel(plain(scale.latency, 90))
    values = [*(point.metric for point in points), scale.eager, scale.budget]
    room = max((max(values) - min(values)) * 0.22, abs(scale.eager) * 1e-3, 1e-6)
    axes.set_ylim(min(values) - room, max(values) + room)
    axes.locator_params(axis="y", nbins=6)
    axes.set_ylabel(plain(scale.metric))
    axes.grid(visible=True, color=paint.line, linewidth=0.6)
    axes.set_axisbelow(True)


def _plain_ticks(axes: Axes) -> None:
    """1, 2 and 5 of each power of ten, written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=30))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _lines(axes: Axes, paint: Paint, scale: Scale) -> None:
    axes.axhline(scale.eager, color=paint.soft, linewidth=1, linestyle=(0, (1, 2)))
    axes.axhline(scale.budget, color=paint.bad, linewidth=1.2, linestyle=(0, (5, 3)))
    side = axes.get_yaxis_transform()
    up = scale.eager >= scale.budget
    lines = ((scale.eager, "eager fp32", paint.soft, up), (scale.budget, "budget", paint.bad, not up))
    for value, text, colour, above in lines:
        axes.annotate(
            text,
            (0, value),
            xycoords=side,
            xytext=(3, 3 if above else -3),
            textcoords="offset points",
            ha="left",
            va="bottom" if above else "top",
            color=colour,
        )


def _x(axes: Axes, point: Point) -> float:
    """Where a form stands; one that wasn't timed stands at the right edge."""
    if point.latency_ms:
        return point.latency_ms
    return 0.0 if point.latency_ms == 0 and axes.get_xscale() == "linear" else axes.get_xlim()[1] * 0.97


def _colour(paint: Paint, point: Point) -> str:
    if not point.passed:
        return paint.bad
    return paint.one if point.kind.startswith("int8") else paint.ink if point.kind == "fp32" else paint.two


def _mark(axes: Axes, paint: Paint, point: Point) -> None:
    colour = _colour(paint, point)
    shape = ("s" if point.kind.startswith("int8") else "o" if point.kind == "fp32" else "^") if point.passed else "X"
    where = [_x(axes, point)], [point.metric]
    if point.spread_ms is not None and point.latency_ms:
        axes.plot([*point.spread_ms], [point.metric, point.metric], color=colour, linewidth=2.2, alpha=0.45)
    if point.chosen:
        axes.plot(*where, "o", color="none", markeredgecolor=paint.good, markersize=14, markeredgewidth=1.6)
    timed = point.latency_ms is not None
    (mark,) = axes.plot(*where, shape, color=colour, markersize=7, fillstyle="full" if timed else "none")
    mark.set_gid(f"mark-{identifier(point.label)}")


def _label(axes: Axes, paint: Paint, points: Sequence[Point], scale: Scale) -> None:
    """Each name beside its mark, off the bars that show quartiles, and off the two lines if there is room."""
    picture_labels.settled(axes)
    labels = [
        Label(
            text=plain(point.label) if point.latency_ms is not None else f"{plain(point.label)} (not timed)",
            x=_x(axes, point),
            y=point.metric,
            colour=paint.good if point.chosen else _colour(paint, point),
            bold=point.chosen,
        )
        for point in sorted(points, key=lambda point: not point.chosen)
    ]
    bars = [_across(axes, point, point.spread_ms) for point in points if point.spread_ms is not None]
    left, width = axes.get_xlim()[0], axes.get_window_extent().width
    lines = [picture_labels.box(axes, left, height, width, 1) for height in (scale.eager, scale.budget)]
    picture_labels.write(axes, labels, bars, lines)


def _across(axes: Axes, point: Point, ends: tuple[float, float]) -> Bbox:
    """The box of the bar that shows a form's quartiles."""
    from matplotlib.transforms import Bbox

    (left, line), (right, _) = (axes.transData.transform((max(end, 1e-9), point.metric)) for end in ends)
    return Bbox.from_extents(float(left), float(line) - 2, float(right), float(line) + 2)


def _told(points: Sequence[Point]) -> dict[str, str]:
    return {f"mark-{identifier(point.label)}": _words(point) for point in points}


def _words(point: Point) -> str:
    timed = "not timed" if point.latency_ms is None else f"{point.latency_ms:.3g} ms"
    return f"{point.label}: {timed}, {point.metric:.4f}"
