"""What of the report is drawn: which points, curves and bars, with their names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from pipeline.report import picture_depth, picture_timeline, picture_tradeoff
from pipeline.report.data import Report, Sensitivity, Speed, TargetLine
from pipeline.report.picture_depth import Layer
from pipeline.report.picture_timeline import Bar
from pipeline.report.picture_tradeoff import Point, Scale
from pipeline.types import Explanation

MANY = 8  # targets in one picture; more of them are named by their number


def pictures(report: Report) -> dict[str, Any]:
    """Every picture as markup, by what it is of; None where there is nothing to draw."""
    timings = _timings(report)
    return {
        "overview": _overview(report),
        "tradeoff": [_tradeoff(report, place, line, timings) for place, line in enumerate(report.targets)],
        "sensitivity": [_sensitivity(one) for one in report.sensitivity],
        "layers": [_layers(one, place) if one.layers else None for place, one in enumerate(report.explanations)],
        "timeline": _timeline(report),
    }


def _markup(svg: str) -> Markup:
    return Markup(svg)  # noqa: S704  ours; what comes from a user is escaped there


def scale(report: Report) -> Scale | None:
    """The axes of every picture of accuracy; None where no target has a metric that can be drawn."""
    known = next((line.metric for line in report.targets if line.metric is not None), None)
    if known is None or not math.isfinite(known.eager):
        return None
    budget = known.eager - known.budget if report.higher_is_better else known.eager + known.budget
    timed = next((line.speed for line in report.targets if line.speed is not None), None)
    where = "" if timed is None else f" ({_spell(timed)})"
    return Scale(known.eager, budget, report.metric, f"latency in ms{where}")


def _spell(speed: Speed) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in speed.sizes.items())
    threads = f"{speed.threads} thread{'s' if speed.threads > 1 else ''}"
    return f"{sizes}, {threads}" if sizes else threads


def shipped(report: Report) -> list[Point]:
    """What each target ships, as far as it was timed."""
    few = len(report.targets) <= MANY
    return [
        Point(
            label=f"{place} {line.target}" if few else f"{place}",
            latency_ms=line.speed.time.median_ms,
            metric=line.metric.engine,
            passed=True,
            chosen=False,
            spread_ms=(line.speed.time.p25_ms, line.speed.time.p75_ms),
            kind=line.scheme or "",
        )
        for place, line in enumerate(report.targets, start=1)
        if line.speed is not None and line.metric is not None and math.isfinite(line.metric.engine)
    ]


def _overview(report: Report) -> Markup | None:
    points, axes = shipped(report), scale(report)
    if len(points) < 2 or axes is None:
        return None
    return _markup(picture_tradeoff.overview(points, axes, name="overview"))


def overview_png(report: Report) -> bytes | None:
    """The same as a file."""
    points, axes = shipped(report), scale(report)
    return None if len(points) < 2 or axes is None else picture_tradeoff.overview_png(points, axes)


def _timings(report: Report) -> Mapping[tuple[str, str], Speed]:
    """The first timing of each form."""
    found: dict[tuple[str, str], Speed] = {}
    for one in report.speeds:
        found.setdefault((one.target, one.scheme), one)
    return found


def _tradeoff(report: Report, place: int, line: TargetLine, timings: Mapping[tuple[str, str], Speed]) -> Markup | None:
    axes = scale(report)
    points = [*_forms(report, line.target, timings)]
    if len(points) < 2 or axes is None:
        return None
    return _markup(picture_tradeoff.tradeoff(points, axes, name=f"tradeoff-{place}"))


def _forms(report: Report, target: str, timings: Mapping[tuple[str, str], Speed]) -> Iterator[Point]:
    passed = {one.scheme for one in report.parity if one.target == target and one.passed}
    for one in report.tried:
        if one.target != target or one.metric is None or not math.isfinite(one.metric):
            continue
        timed = timings.get((target, one.scheme))
        yield Point(
            label=one.scheme,
            latency_ms=None if timed is None else timed.time.median_ms,
            metric=one.metric,
            passed=one.scheme in passed,
            chosen=one.chosen,
            spread_ms=None if timed is None else (timed.time.p25_ms, timed.time.p75_ms),
            kind=one.scheme,
        )


def _sensitivity(one: Sensitivity) -> Markup:
    numbered = {one.operators[place].rank for place in one.worst}
    layers = [
        Layer(found.module or found.node, found.sqnr_db, tag=str(found.rank) if found.rank in numbered else None)
        for found in one.operators
    ]
    return _markup(picture_depth.depth(layers, name=f"sensitivity-{one.scheme}", own="in 8 bits by itself"))


def common(modules: Sequence[str]) -> str:
    """What all names of modules begin with, up to a point; so that the rest of them is short enough to be read."""
    parts = [module.split(".")[:-1] for module in modules if module]
    shared = next((place for place, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1), None)
    least = min(map(len, parts), default=0) if shared is None else shared
    return "".join(f"{part}." for part in parts[0][:least]) if parts else ""


def _layers(one: Explanation, place: int) -> Markup:
    tags = {found.node: found.module or found.node for found in one.departures}
    layers = [
        Layer(found.module or found.node, found.own_db, found.after_db, tag=tags.get(found.node))
        for found in one.layers
    ]
    running = "in the running model"
    return _markup(picture_depth.depth(layers, name=f"layers-{place}", own="given the right inputs", running=running))


def _timeline(report: Report) -> Markup | None:
    if report.timeline is None:
        return None
    bars = [
        Bar(
            stage=one.stage,
            label=one.step.partition("/")[2],
            start_s=one.start_s,
            seconds=one.seconds,
            other=not one.where.startswith(report.provenance.host),
        )
        for one in report.timeline.steps
    ]
    return _markup(picture_timeline.timeline(bars, name="timeline"))


def histogram(counts: Sequence[int]) -> Markup:
    """A small histogram as an ``<svg>`` of few bytes; heights are logarithmic, or a ReLU's zeros would be all of it."""
    if not counts:
        return Markup("")
    top = math.log1p(max(counts)) or 1
    heights = [max(1, round(38 * math.log1p(count) / top)) if count else 0 for count in counts]
    bars = "".join(f"M{6 * place} 40v-{height}h5v{height}z" for place, height in enumerate(heights) if height)
    return Markup('<svg class="histogram" viewBox="0 0 {} 40" preserveAspectRatio="none"><path d="{}"/></svg>').format(
        len(counts) * 6, bars
    )
