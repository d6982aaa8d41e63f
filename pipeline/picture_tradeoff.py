"""Accuracy against latency: the forms of one target, and what all targets ship."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline import pictures
from pipeline.pictures import NARROW, WIDE, Paint, identifier, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

OVERVIEW = (WIDE, 4.2)
_FAR = 8.0  # times as slow: a logarithmic scale shows more
# where a label may stand, in points from its mark: (x, y, horizontal alignment); near ones first
_PLACES = (
    *((11, 0, "left"), (-11, 0, "right"), (0, 13, "center"), (0, -13, "center")),
    *((right, up, side) for up in (11, -11, 22, -22, 33, -33, 44, -44) for right, side in ((9, "left"), (-9, "right"))),
)


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
    return pictures.svg(_drawing(points, scale), NARROW, name=name, title=title, told=_told(points))


def overview(points: Sequence[Point], scale: Scale, *, name: str) -> str:
    """As `tradeoff`, for forms of many targets."""
    title = f"{scale.metric} against {scale.latency}, all targets"
    return pictures.svg(_drawing(points, scale), OVERVIEW, name=name, title=title, told=_told(points))


def overview_png(points: Sequence[Point], scale: Scale) -> bytes:
    """`overview` as a PNG file."""
    return pictures.png(_drawing(points, scale), OVERVIEW)


def _drawing(points: Sequence[Point], scale: Scale) -> pictures.Draw:
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
    """Write each name beside its mark, where nothing is yet; over one of the lines only if it must be."""
    figure = axes.get_figure()
    assert figure is not None
    figure.draw_without_rendering()  # type: ignore[union-attr]  # a figure, since we made it
    inside = axes.get_window_extent()
    taken = [text.get_window_extent() for text in axes.texts]
    taken += [_box(axes, _x(axes, point), point.metric, 7, 7) for point in points]
    taken += [_across(axes, point, point.spread_ms) for point in points if point.spread_ms is not None]
    left = axes.get_xlim()[0]
    lines = [_box(axes, left, height, inside.width, 1) for height in (scale.eager, scale.budget)]
    for point in points:
        notes = [_write(axes, paint, point, *place) for place in _PLACES]
        boxes = [note.get_window_extent() for note in notes]
        fits = [_within(box, inside) and not any(box.overlaps(other) for other in taken) for box in boxes]
        clear = [fit and not any(box.overlaps(line) for line in lines) for fit, box in zip(fits, boxes, strict=True)]
        best = clear.index(True) if any(clear) else fits.index(True) if any(fits) else None
        for position, note in enumerate(notes):
            if position != best:
                note.remove()
        if best is not None:  # else it has no room, and its title says what it is
            taken.append(boxes[best])


def _write(axes: Axes, paint: Paint, point: Point, right: float, up: float, side: Any) -> Annotation:
    label = plain(point.label)
    return axes.annotate(
        label if point.latency_ms is not None else f"{label} (not timed)",
        (_x(axes, point), point.metric),
        xytext=(right, up),
        textcoords="offset points",
        ha=side,
        va="center",
        color=paint.good if point.chosen else _colour(paint, point),
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
