"""Names beside marks of a picture, each where nothing else is: measured, not guessed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

Side = Literal["left", "center", "right"]
Place = tuple[float, float, Side]
"""Where a name may stand, in points from its mark: to the right, up, and which side of it that is."""

_SIDES: Sequence[tuple[float, Side]] = ((9, "left"), (-9, "right"), (0, "center"))
# near ones first
PLACES: Sequence[Place] = (
    (11, 0, "left"),
    (-11, 0, "right"),
    (0, 13, "center"),
    (0, -13, "center"),
    *((right, up, side) for up in (11, -11, 22, -22, 33, -33, 44, -44, 55, -55, 66, -66) for right, side in _SIDES),
)


@dataclass(frozen=True)
class Label:
    """A name, and the mark that it belongs to, in the units of the axes."""

    text: str
    x: float
    y: float
    colour: str
    bold: bool = False


def settled(axes: Axes) -> Axes:
    """The axes when their place in the picture is decided; before that, nothing in pixels means anything."""
    figure = axes.get_figure()
    assert figure is not None
    figure.draw_without_rendering()  # type: ignore[union-attr]  # a figure, since we made it
    return axes


def write(axes: Axes, labels: Sequence[Label], taken: Sequence[Bbox], lines: Sequence[Bbox]) -> None:
    """Write each of `labels` where nothing is yet; over one of `lines` only if it must be. A point is a pixel here.

    One that has no room anywhere is left out: the title of its mark says what it is.

    Args:
        axes: settled.
        labels: the more important ones first.
        taken: boxes, in pixels, that nothing may lie on.
        lines: likewise, that something may lie on if there is no other room.
    """
    inside = axes.get_window_extent()
    full = [*(text.get_window_extent() for text in axes.texts), *taken]
    full += [box(axes, label.x, label.y, 7, 7) for label in labels]
    for label in labels:
        note = _note(axes, label)
        boxes = _boxes(axes, label, note.get_window_extent())
        fits = [_within(one, inside) and not any(one.overlaps(other) for other in full) for one in boxes]
        clear = [fit and not any(one.overlaps(line) for line in lines) for fit, one in zip(fits, boxes, strict=True)]
        best = clear.index(True) if any(clear) else fits.index(True) if any(fits) else None
        if best is None:
            note.remove()
            continue
        right, up, side = PLACES[best]
        note.xyann = (right, up)
        note.set_horizontalalignment(side)
        full.append(boxes[best])


def _note(axes: Axes, label: Label) -> Annotation:
    return axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=(0, 0),
        textcoords="offset points",
        ha="left",
        va="center",
        color=label.colour,
        fontweight="bold" if label.bold else "normal",
        in_layout=False,
    )


def _boxes(axes: Axes, label: Label, measured: Bbox) -> list[Bbox]:
    """The boxes of a name at each of `PLACES`, from its size: far quicker than to write it at each of them."""
    from matplotlib.transforms import Bbox

    column, line = (float(at) for at in axes.transData.transform((label.x, label.y)))
    found = []
    for right, up, side in PLACES:
        left = column + right - {"left": 0.0, "center": 0.5, "right": 1.0}[side] * measured.width
        low = line + up - measured.height / 2
        found.append(Bbox.from_extents(left, low, left + measured.width, low + measured.height))
    return found


def _within(one: Bbox, outer: Bbox) -> bool:
    return bool(outer.x0 <= one.x0 and one.x1 <= outer.x1 and outer.y0 <= one.y0 and one.y1 <= outer.y1)


def box(axes: Axes, x: float, y: float, right: float, up: float) -> Bbox:
    """A box around a place, in pixels; `right` and `up` are half of its sides."""
    from matplotlib.transforms import Bbox

    column, line = (float(at) for at in axes.transData.transform((x, y)))
    return Bbox.from_extents(column - right, line - up, column + right, line + up)


def along(axes: Axes, heights: Sequence[float], first: float = 1.0) -> list[Bbox]:
    """Small boxes along a curve whose marks are one unit apart, so that names can keep off it."""
    steps = [place / 5 for place in range(5 * max(len(heights) - 1, 0) + 1)]
    return [box(axes, first + step, _between(heights, step), 3, 3) for step in steps] if heights else []


def _between(heights: Sequence[float], step: float) -> float:
    left = min(int(step), len(heights) - 1)
    right = min(left + 1, len(heights) - 1)
    return heights[left] + (heights[right] - heights[left]) * (step - left)
