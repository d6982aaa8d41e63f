"""Whether what an engine of a part answers is what the row allows."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import backends, compare, reference
from pipeline.errors import UsageError, first_line
from pipeline.explain import gaps
from pipeline.explain.parts import Array, Feeds, Part, Step
from pipeline.store import Stored
from pipeline.types import Recipe, Runner, Scheme, Target


@dataclass(frozen=True)
class Trial:
    """How the outputs of a part (or of all of it) that was built alone differ from what they should be.

    Attributes:
        part: what was built; None for the whole.
        broken: the bounds of the row that they break, in words; none if it is as it should be.
        output: the one that is worst.
        own: its SQNR in dB.
        allowed: what the row asks for, in dB.
        values: of that output: what it should be, and what it is; None where the engine failed.
    """

    part: Part | None
    broken: tuple[str, ...] = ()
    output: str = ""
    own: float = math.inf
    allowed: float = -math.inf
    values: tuple[Array, Array] | None = None

    @property
    def departs(self) -> bool:
        """Whether anything is wrong."""
        return bool(self.broken)


def worst(trials: Sequence[Trial]) -> Trial:
    """One that departs before one that doesn't, then the one with the least SQNR."""
    return max(trials, key=lambda one: (one.departs, -one.own))


class Judge:
    """What a row allows."""

    def __init__(self, recipe: Recipe, target: Target, scheme: Scheme) -> None:
        self._kinds = {spec.name: spec.kind for spec in recipe.outputs}
        self.target, self.scheme, self.tolerance = target, scheme, target.vs_onnx[scheme]
        bounds = self.tolerance.model_dump(exclude_none=True)
        told = ", ".join(f"{name} = {value:g}" for name, value in bounds.items())
        step = ", or one step of its scale" if scheme.startswith("int8") else ""
        self.because = f"the row allows {told}{step} (`{target.name}`, vs_onnx.{scheme})"

    def whole(self, model: Stored, engine: Stored, calls: Sequence[Feeds]) -> list[Trial]:
        """The engine against what it was built from, for each call; one of sizes that it doesn't serve is no fault."""
        with reference.as_written(model) as run:
            wanted = [run(feeds) for feeds in calls]
        found = []
        with backends.loaded(engine, self.target) as run:
            for feeds, right in zip(calls, wanted, strict=True):
                try:
                    found.append(self._run(None, run, feeds, right, {}))
                except UsageError:
                    found.append(Trial(None))
        return found

    def run(
        self,
        part: Part | None,
        engine: Stored,
        calls: Sequence[Feeds],
        wanted: Sequence[Feeds],
        scales: Mapping[str, Array],
    ) -> list[Trial]:
        """What `engine` answers to `calls`, against `wanted`, for each; an engine that fails departs.

        Raises:
            UsageError: it doesn't take them.
            BuildError: it can't be loaded.
        """
        with backends.loaded(engine, self.target) as run:
            return [self._run(part, run, *pair, scales) for pair in zip(calls, wanted, strict=True)]

    def _run(self, part: Part | None, run: Runner, feeds: Feeds, right: Feeds, scales: Mapping[str, Array]) -> Trial:
        try:
            found = run(feeds)
        except UsageError:
            raise
        except Exception as error:  # a backend's runtime may raise anything
            return Trial(part, (f"fails: {first_line(error)}",), next(iter(right)), -math.inf, -math.inf)
        each = [self._compared(part, name, value, found[name], scales.get(name)) for name, value in right.items()]
        return worst(each)

    def distances(
        self, engine: Stored, calls: Sequence[Feeds], wanted: Sequence[Feeds], among: Collection[str], output: str
    ) -> tuple[float, float] | None:
        """SQNRs of what `engine` answers: the worst of the outputs `among`, and that of `output`; None if it fails."""
        least = dict.fromkeys([*among, output], math.inf)
        with backends.loaded(engine, self.target) as run:
            for feeds, right in zip(calls, wanted, strict=True):
                try:
                    found = run(feeds)
                except Exception:  # as above
                    return None
                for name, before in least.items():
                    least[name] = min(before, gaps.decibels(*gaps.sizes(right[name], found[name])))
        return min(least[name] for name in among), least[output]

    def _compared(self, part: Part | None, name: str, right: Array, found: Array, scale: Array | None) -> Trial:
        if right.shape != found.shape:
            return Trial(part, (f"shape {list(found.shape)}, not {list(right.shape)}",), name, -math.inf, -math.inf)
        plain, other = _without_fillings(right, found)
        if scale is not None:
            other = _nearer(plain, other, scale)
        kind = self._kinds.get(name, "other" if right.dtype.kind == "f" else "indices")
        distance = compare.distance(name, plain, other, kind)
        broken = compare.violations(distance, self.tolerance)
        return Trial(part, tuple(broken), name, distance.sqnr_db, self._allowed(plain), (right, found))

    def _allowed(self, right: Array) -> float:
        """The row's bounds as the least SQNR: what errors of the largest size everywhere would come to."""
        value = right.astype(np.float64)
        signal, peak = gaps.rms(value[np.isfinite(value)]), float(np.abs(value[np.isfinite(value)]).max(initial=0))
        bounds = self.tolerance
        least = [
            gaps.decibels(signal, noise)
            for noise in (
                bounds.max_abs,
                bounds.rmse,
                None if bounds.max_over_peak is None else bounds.max_over_peak * peak,
            )
            if noise is not None
        ]
        return max([*least, *([] if bounds.sqnr_db is None else [bounds.sqnr_db])], default=-math.inf)

    def kind(self, step: Step, found: Trial) -> str:
        """What is wrong with one operator."""
        if found.values is None:
            return "fails"
        right, other = found.values
        signal, _ = gaps.sizes(right, right)
        return gaps.kind(step.operator, right, other, signal * 10 ** (-found.allowed / 20))


def _without_fillings(right: Array, found: Array) -> tuple[Array, Array]:
    """Both with zeros where both have a number that only fills a masked place: beside it no other would count."""
    if right.dtype.kind != "f":
        return right, found
    fills = (right == found) & (np.abs(right) >= gaps.largest(right) / 2)
    return np.where(fills, 0, right).astype(right.dtype), np.where(fills, 0, found).astype(found.dtype)


def _nearer(right: Array, found: Array, scale: Array) -> Array:
    """`found` one step of `scale` nearer to `right`, where it is not the same."""
    gap = found.astype(np.float64) - right
    return np.asarray(right + np.sign(gap) * np.maximum(np.abs(gap) - float(scale.max()), 0))
