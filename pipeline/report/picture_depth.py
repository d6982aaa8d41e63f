"""Error through the depth of a model: a curve over its operators, in the order of the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipeline.report import drawing, picture_labels
from pipeline.report.drawing import NARROW, WIDE, Paint, plain
from pipeline.report.picture_labels import Label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

SIZE = (WIDE, 3.0)
FEW = 16  # operators; a picture as wide as a phone has room for them


@dataclass(frozen=True)
class Layer:
    """An operator: SQNRs of its output in dB, an infinity where nothing differs; `running` with all errors before it.

    Attributes:
        tag: written beside its mark; earlier ones come first where there isn't room for all.
    """

    label: str
    own_db: float | None
    running_db: float | None = None
    tag: str | None = None


def depth(layers: Sequence[Layer], *, name: str, own: str, running: str = "") -> str:
    """An ``<svg>`` element with a curve or two; `own` and `running` say what they are of."""
    told = {f"layer-{place}": _words(one, own, running) for place, one in enumerate(layers)}
    draw = partial(_draw, layers=layers, own=own, running=running)
    size = NARROW if len(layers) <= FEW else SIZE
    return drawing.svg(draw, size, name=name, title=f"{own}, operator by operator", told=told)


def _draw(axes: Axes, paint: Paint, *, layers: Sequence[Layer], own: str, running: str) -> None:
    from matplotlib.ticker import MaxNLocator

    known = [value for one in layers for value in (one.own_db, one.running_db) if value is not None]
    finite = [value for value in known if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=100.0)
    room = max((high - low) * 0.18, 5.0)
    floor, ceiling = low - room, high + room
    axes.set_xlim(0.3, len(layers) + 0.7)
    axes.set_ylim(floor, ceiling)
    axes.grid(visible=True, color=paint.line, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.set_xlabel(f"{len(layers)} operators, in the order of the graph")
    axes.set_ylabel("SQNR in dB, more is better")
    _curve(axes, [one.running_db for one in layers], (floor, ceiling), running, paint.two)
    marks = _curve(axes, [one.own_db for one in layers], (floor, ceiling), own, paint.one)
    for place, mark in marks.items():
        mark.set_gid(f"layer-{place - 1}")
    _write_tags(axes, paint, layers, floor, ceiling)
    if running:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, labelcolor="linecolor", ncols=2)


def _curve(
    axes: Axes, values: Sequence[float | None], limits: tuple[float, float], label: str, colour: str
) -> dict[int, Line2D]:
    """A line with a mark for each value that is known; the marks by place."""
    heights = {place: _clipped(value, *limits) for place, value in enumerate(values, 1) if value is not None}
    if not heights:
        return {}
    axes.plot([*heights], [*heights.values()], color=colour, linewidth=1.1, label=label)
    small = 5 if len(heights) < 60 else 3
    return {
        place: axes.plot([place], [height], "o", color=colour, markersize=small)[0] for place, height in heights.items()
    }


def _clipped(value: float, floor: float, ceiling: float) -> float:
    """An infinity stands at the edge."""
    return min(max(value, floor), ceiling) if not math.isnan(value) else floor


def _write_tags(axes: Axes, paint: Paint, layers: Sequence[Layer], floor: float, ceiling: float) -> None:
    picture_labels.settled(axes)
    labels = []
    for place, one in enumerate(layers, 1):
        value = one.own_db if one.own_db is not None else one.running_db
        if value is not None and one.tag is not None:
            labels.append(Label(plain(one.tag, 34), place, _clipped(value, floor, ceiling), paint.bad))
    curves = [[one.own_db for one in layers], [one.running_db for one in layers]]
    heights = [[_clipped(value, floor, ceiling) for value in curve if value is not None] for curve in curves]
    # where some are unknown the marks aren't one unit apart; then a name may lie on the line
    lines = [found for curve in heights if len(curve) == len(layers) for found in picture_labels.along(axes, curve)]
    picture_labels.write(axes, labels, (), lines)


def _words(one: Layer, own: str, running: str) -> str:
    parts = [
        f"{what} {value:.1f} dB" for what, value in ((own, one.own_db), (running, one.running_db)) if value is not None
    ]
    return f"{one.label}: {', '.join(parts)}"
