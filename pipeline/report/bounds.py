"""How much of each bound an engine uses: 1 is all of it, whatever the bound is of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from pipeline import evidence, tolerances
from pipeline.report.data import Use
from pipeline.types import Distance, MetricResult, ParityReport, Recipe, Scheme, Target, Tolerance

_LESS = ("max_abs", "max_over_peak", "rmse")
_MORE = ("sqnr_db", "cosine", "argmax_agreement")


def uses(recipe: Recipe, target: Target, report: ParityReport) -> tuple[Use, ...]:
    """Every bound that an engine was judged by: the recipe's budget, and the tolerance of its outputs."""
    found = [_drop(report.metric)]
    budget = recipe.budget.vs_eager
    if budget is not None:
        found += [use for one in report.metric.vs_eager for use in _of(one, budget, budget=True)]
    worst = evidence.worst(distance for row in report.sizes for distance in row.vs_onnx)
    bounds = bounds_of(recipe, target, report.scheme)
    found += [use for one in worst if one.output in bounds for use in _of(one, bounds[one.output], budget=False)]
    return tuple(found)


def bounds_of(recipe: Recipe, target: Target, scheme: Scheme) -> Mapping[str, Tolerance]:
    """Of each output; none where neither recipe nor row has any, as for a row that was changed since."""
    return tolerances.of(recipe, target, scheme) if scheme in target.vs_onnx else {}


def tightest(found: Iterable[Use]) -> int | None:
    """The place of the bound of which most is used."""
    known = [(one.share, -place) for place, one in enumerate(found) if one.share is not None]
    return -max(known)[1] if known else None


def broken(distances: Iterable[Distance], bounds: Mapping[str, Tolerance]) -> tuple[str, ...]:
    """The bounds that don't hold, in words."""
    each = [use for one in distances if one.output in bounds for use in _of(one, bounds[one.output], budget=False)]
    found = [one for one in each if one.share is not None and one.share > 1]
    return tuple(f"`{one.output}` {one.bound} {one.value:.4g}, bound {one.limit:g}" for one in found)


def _drop(metric: MetricResult) -> Use:
    share = max(0.0, metric.drop) / metric.budget if metric.budget > 0 else None
    return Use(against="budget", bound="drop", value=metric.drop, limit=metric.budget, share=share)


def _of(one: Distance, bounds: Tolerance, *, budget: bool) -> list[Use]:
    found = []
    # a distance between indices means nothing: they are right or wrong
    names = ("argmax_agreement",) if one.kind == "indices" else (*_LESS, *_MORE)
    for name in names:
        limit, value = getattr(bounds, name), getattr(one, name)
        if one.kind == "indices" and limit is None:
            limit = 1.0  # see `compare.violations`
        if limit is None or value is None:
            continue
        against: Literal["budget", "form"] = "budget" if budget else "form"
        part = share(name, value, limit)
        found.append(Use(against=against, bound=name, output=one.output, value=value, limit=limit, share=part))
    return found


def share(bound: str, value: float, limit: float) -> float | None:
    """What part of a bound is used; above 1 it is broken. None where it leaves nothing to be used.

    Decibels are turned into the noise's amplitude, so that 6 dB more than asked for is half of the bound.
    """
    if math.isnan(value):
        return math.inf
    if bound == "sqnr_db":
        return math.inf if value == -math.inf else 10 ** (min(limit - value, 400.0) / 20)
    allowed, used = (limit, value) if bound in _LESS else (1 - limit, 1 - value)
    if allowed <= 0:
        return None if used <= 0 else math.inf
    return max(0.0, used) / allowed
