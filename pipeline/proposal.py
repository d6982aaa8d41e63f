"""Tolerances that fit a model: what its engines really show, times a margin that is said.

A tolerance is a statement about one model in one numeric form. One that is too wide hides a wrong kernel, one that is
too narrow fails right engines, and only measuring tells where the line is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Literal

from pipeline import backends, compare, tolerances
from pipeline.reference import Answers
from pipeline.store import Stored
from pipeline.types import Distance, Frozen, OutputKind, ParityReport, Recipe, Scheme, Target

Measure = Literal["max_abs", "max_over_peak", "sqnr_db", "cosine", "argmax_agreement"]
MEASURES: Mapping[OutputKind, tuple[Measure, ...]] = {
    "logits": ("sqnr_db", "argmax_agreement"),
    "scores": ("sqnr_db", "argmax_agreement"),
    "probabilities": ("max_abs", "argmax_agreement"),
    "embedding": ("cosine",),
    "boxes": ("max_abs",),
    "indices": ("argmax_agreement",),
    "other": ("sqnr_db",),
}
"""What is worth knowing of each kind of output where rounding isn't all: probabilities and boxes have a unit, of
embeddings only the direction counts, of logits how they compare."""
STEP = 2.0**-23  # of float32 at 1: less than that of the peak is no difference that one could rely on


@dataclass(frozen=True)
class Seen:
    """What one engine showed at one place."""

    target: str
    scheme: Scheme
    where: str
    found: Distance
    ties: bool = False


class Bound(Frozen):
    """One bound that is proposed.

    Attributes:
        measure: a key of a tolerance.
        worst: what the engines showed, the worst of all.
        target: which engine that was, and `where` with what.
        engines: how many engines were measured.
        in_force: for each of their targets what bounds it now; None where nothing does.
        source: where the bound of `target` is said.
        proposed: `worst` with the margin; None if no engine showed any difference, and for `argmax_agreement` of what
            isn't indices: a bound holds at each size, and in a batch of 1 one close call is everything.
    """

    scheme: Scheme
    output: str
    kind: OutputKind
    measure: Measure
    worst: float
    target: str
    where: str
    engines: int
    in_force: Mapping[str, float | None]
    source: str
    proposed: float | None


def measures(scheme: Scheme, kind: OutputKind) -> tuple[Measure, ...]:
    """What to bound. In fp32 an engine differs by rounding alone, which goes with the largest numbers."""
    return ("max_over_peak",) if scheme == "fp32" and kind != "indices" else MEASURES[kind]


def seen(report: ParityReport) -> Iterator[Seen]:
    """What a comparison found at all sizes and under stress."""
    for one in report.sizes:
        for found in one.vs_onnx:
            yield Seen(report.target, report.scheme, _sizes(one.sizes), found)
    for check in report.stress:
        if check.verdict == "passed":  # what the form itself does says nothing about an engine
            for found in check.found:
                told = f"{check.name}, {_sizes(check.sizes)}"
                yield Seen(report.target, report.scheme, told, found, ties=check.name not in ("sizes", "rows"))


def on_data(
    recipe: Recipe, engine: Stored, model: Stored, answers: Answers, target: Target, scheme: Scheme
) -> Iterator[Seen]:
    """What the engine shows on the evaluation data that it serves, all calls together.

    Raises:
        BuildError, UnavailableError: the engine can't be loaded.
    """
    from pipeline import padding

    kinds = {spec.name: spec.kind for spec in recipe.outputs}
    form, signature = answers.form(model), engine.signature()
    asked = [one for one, _ in answers.evaluation() if padding.fits(one.feeds, signature, parts=True)]
    with backends.loaded(engine, target) as run:
        ask = padding.in_parts(run, signature)
        pairs = [(form(one.feeds), ask(one.feeds)) for one in asked]
    for name in kinds if pairs else ():
        reference, other = ([one[name] for one in side] for side in zip(*pairs, strict=True))
        found = compare.pooled(name, reference, other, kinds[name])
        yield Seen(target.name, scheme, f"evaluation data, {len(asked)} calls", found)


def bounds(recipe: Recipe, targets: Sequence[Target], found: Iterable[Seen], margin: float) -> list[Bound]:
    """A bound for each scheme, output and measure, from all that was seen.

    Args:
        recipe: says the kinds of outputs.
        targets: rows of the engines that were measured.
        found: at least one for each scheme and output.
        margin: how many times the noise that was measured is allowed.
    """
    rows = {target.name: target for target in targets}
    everything = list(found)
    schemes = dict.fromkeys(one.scheme for one in everything)
    proposals = []
    for scheme in schemes:
        for spec in recipe.outputs:
            of_output = [one for one in everything if one.scheme == scheme and one.found.output == spec.name]
            for measure in measures(scheme, spec.kind):
                values = [(value, one) for one in of_output if (value := _value(one, measure)) is not None]
                if values:
                    proposals.append(_bound(recipe, rows, scheme, measure, values, margin))
    return proposals


def _value(one: Seen, measure: Measure) -> float | None:
    """What was measured; None where that means nothing: which element is the largest among equal ones."""
    if measure == "argmax_agreement" and one.ties:
        return None
    value: float | None = getattr(one.found, measure)
    return value


def _bound(
    recipe: Recipe,
    rows: Mapping[str, Target],
    scheme: Scheme,
    measure: Measure,
    values: Sequence[tuple[float, Seen]],
    margin: float,
) -> Bound:
    pick = max if measure.startswith("max") else min
    worst, where = pick(values, key=lambda pair: pair[0])
    names = dict.fromkeys(one.target for _, one in values)
    output, only_told = where.found.output, measure == "argmax_agreement" and where.found.kind != "indices"
    unsaid = 1.0 if where.found.kind == "indices" else None  # indices have to be equal where nothing else is said
    stated = {name: getattr(tolerances.of(recipe, rows[name], scheme)[output], measure) for name in names}
    in_force = {name: unsaid if bound is None else bound for name, bound in stated.items()}
    return Bound(
        scheme=scheme,
        output=output,
        kind=where.found.kind,
        measure=measure,
        worst=worst,
        target=where.target,
        where=where.where,
        engines=len(names),
        in_force=in_force,
        source=tolerances.source(recipe, rows[where.target], scheme, output),
        proposed=None if only_told else with_margin(measure, worst, margin),
    )


def with_margin(measure: Measure, worst: float, margin: float) -> float | None:
    """`worst` as a bound that allows `margin` times its noise, rounded to its loose side; None if there is no noise.

    SQNR counts noise in dB; 1 less the cosine is half the square of the noise; a share of rows is a share of rows.
    """
    if measure == "sqnr_db":
        least = min(worst, -20 * math.log10(STEP))  # what rounds to the same numbers has no noise
        return float(math.floor(least - 20 * math.log10(margin)))
    if measure == "cosine":
        return _floor(1 - max(1 - worst, STEP) * margin**2, -1.0)
    if measure == "argmax_agreement":
        return _floor(1 - (1 - worst) * margin, 0.0)
    if measure == "max_over_peak":
        return _ceiling(max(worst, STEP) * margin)
    return _ceiling(worst * margin) if worst > 0 else None


def _ceiling(value: float) -> float:
    """The next number of two digits that isn't less."""
    if value == 0 or not math.isfinite(value):
        return value
    exact = Decimal(value)
    return float(exact.quantize(Decimal((0, (1,), exact.adjusted() - 1)), ROUND_CEILING))


def _floor(value: float, least: float) -> float:
    """The next number that isn't more, and whose distance from 1 has two digits."""
    return max(least, float(1 - Decimal(repr(_ceiling(1 - value)))))


def toml(found: Iterable[Bound], margin: float) -> str:
    """The bounds as tables to paste into recipe.toml."""
    tables: dict[str, dict[str, list[str]]] = {}
    engines = set[tuple[str, str]]()
    for one in found:
        engines |= {(target, one.scheme) for target in one.in_force}
        if one.proposed is not None:
            tables.setdefault(one.output, {}).setdefault(one.scheme, []).append(f"{one.measure} = {one.proposed:.12g}")
    lines = [f"# {margin:g} times the noise that {len(engines)} engines showed; see `exportyard tolerance`"]
    for output, schemes in tables.items():
        lines += ["", f"[tolerance.outputs.{output}]"]
        lines += [f"{scheme} = {{ {', '.join(bounds)} }}" for scheme, bounds in schemes.items()]
    return "\n".join(lines)


def _sizes(sizes: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items()) or "its one size"
