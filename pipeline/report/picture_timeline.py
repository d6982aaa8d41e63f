"""When each step was made: a lane for each stage, and bars as long as it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from pipeline.report import drawing
from pipeline.report.drawing import WIDE, Paint, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LANE_IN, _EDGES_IN = 0.26, 0.75
_LEAST = 0.002  # of the width: a bar that can be seen
_LETTER = 0.0102  # of the width


@dataclass(frozen=True)
class Bar:
    """A step, in seconds after the first one began; `other` for one that was made on another machine."""

    stage: str
    label: str
    start_s: float
    seconds: float
    other: bool = False


@dataclass(frozen=True)
class _Placed:
    bar: Bar
    row: int
    left: float


def timeline(bars: Sequence[Bar], *, name: str) -> str:
    """An ``<svg>`` element; time in which nothing was made is cut out, and marked by a line."""
    shifts, cuts = _shifts(bars)
    placed, lanes = _rows(bars, shifts)
    height = _LANE_IN * sum(count for _, count in lanes) + _EDGES_IN
    told = {f"bar-{place}": _words(one.bar) for place, one in enumerate(placed)}
    draw = partial(_draw, placed=placed, lanes=lanes, cuts=cuts)
    return drawing.svg(draw, (WIDE, height), name=name, title="when each step was made", told=told)


def _shifts(bars: Sequence[Bar]) -> tuple[list[float], list[float]]:
    """Where each bar begins when idle time is left out; and where some was."""
    order = sorted(range(len(bars)), key=lambda place: bars[place].start_s)
    shifts, cuts = [0.0] * len(bars), []
    reached, idle = bars[order[0]].start_s, 0.0
    for place in order:
        one = bars[place]
        gap = one.start_s - reached
        if gap > 0:
            idle += gap
            if gap > 1:  # less lies between any two steps
                cuts.append(one.start_s - idle)
        shifts[place] = one.start_s - idle
        reached = max(reached, one.start_s + one.seconds)
    return shifts, cuts


def _rows(bars: Sequence[Bar], lefts: Sequence[float]) -> tuple[list[_Placed], list[tuple[str, int]]]:
    """Bars in rows; a stage has as many as it needs for those that were made at once."""
    stages = list(
        dict.fromkeys(bars[place].stage for place in sorted(range(len(bars)), key=lambda place: lefts[place]))
    )
    placed: list[_Placed] = []
    lanes: list[tuple[str, int]] = []
    first = 0
    for stage in stages:
        ends: list[float] = []
        for place in sorted(range(len(bars)), key=lambda place: lefts[place]):
            if bars[place].stage != stage:
                continue
            row = next((row for row, end in enumerate(ends) if end <= lefts[place] + 1e-3), len(ends))
            ends[row : row + 1] = [lefts[place] + bars[place].seconds]
            placed.append(_Placed(bars[place], first + row, lefts[place]))
        lanes.append((stage, len(ends)))
        first += len(ends)
    return placed, lanes


def _draw(
    axes: Axes, paint: Paint, *, placed: Sequence[_Placed], lanes: Sequence[tuple[str, int]], cuts: Sequence[float]
) -> None:
    total = max((one.left + one.bar.seconds for one in placed), default=0) or 1.0
    rows = sum(count for _, count in lanes)
    axes.set_xlim(-0.002 * total, total * 1.01)
    axes.set_ylim(rows - 0.4, -0.6)
    axes.grid(visible=True, axis="x", color=paint.line, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("seconds in which something was made")
    starts = [sum(count for _, count in lanes[:place]) for place in range(len(lanes))]
    axes.set_yticks([start + (count - 1) / 2 for start, (_, count) in zip(starts, lanes, strict=True)])
    axes.set_yticklabels([plain(stage) for stage, _ in lanes])
    axes.tick_params(axis="y", length=0)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color=paint.line, linewidth=0.6)
    for cut in cuts:
        axes.axvline(cut, color=paint.soft, linewidth=0.8, linestyle=(0, (1, 3)))
    for place, one in enumerate(placed):
        width = max(one.bar.seconds, _LEAST * total)
        colour = paint.two if one.bar.other else paint.one
        (bar,) = axes.barh(
            one.row, width, left=one.left, height=0.66, color=colour, edgecolor=paint.paper, linewidth=0.5
        )
        bar.set_gid(f"bar-{place}")
        words = plain(one.bar.label, 30)
        if len(words) * _LETTER * total < width * 0.95:
            axes.text(one.left + width / 2, one.row, words, ha="center", va="center", color=paint.paper)


def _words(bar: Bar) -> str:
    return f"{bar.stage}/{bar.label}: {bar.seconds:.2f} s" if bar.label else f"{bar.stage}: {bar.seconds:.2f} s"
