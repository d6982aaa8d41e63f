"""An engine under stress: what is known about it, and what its answers are worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from pipeline import compare, padding, tolerances
from pipeline import targets as rows_of
from pipeline.errors import ExportyardError, first_line
from pipeline.reference import Answers
from pipeline.store import Stored
from pipeline.types import (
    Distance,
    OutputKind,
    Policy,
    Recipe,
    Runner,
    Scheme,
    Signature,
    StressCheck,
    Target,
    Tolerance,
)

if TYPE_CHECKING:
    from pipeline.types import Tensors

Outputs = dict[str, NDArray[Any]]
Verdict = Literal["passed", "failed", "noted", "not applicable"]


@dataclass(frozen=True)
class Subject:
    """An engine under stress.

    Attributes:
        run: the engine.
        model: the form that it was built from.
        signature: of the engine, with the sizes that it serves.
        bounds: of each output, on its distance from the form.
        in_fp32: whether the form is the model in fp32, which has to be invariant where the model is.
        slow: an emulator, or a board behind a network: the smallest sizes will do.
    """

    recipe: Recipe
    run: Runner
    model: Stored
    signature: Signature
    answers: Answers
    bounds: Mapping[str, Tolerance]
    in_fp32: bool
    slow: bool = False

    @property
    def kinds(self) -> dict[str, OutputKind]:
        """Of each output."""
        return {spec.name: spec.kind for spec in self.recipe.outputs}

    @property
    def usual(self) -> dict[str, int]:
        """Sizes of the axes at which values are tried: opt, or min where calls are slow."""
        axes = self.signature.axes
        return {name: axes[name].min if self.slow else axes[name].opt for name in self.recipe.axes}

    def form(self, feeds: Tensors) -> Outputs:
        """What the form answers."""
        return self.answers.ask(feeds, self.model)

    def few(self) -> dict[str, int]:
        """As `usual`, with two rows only, or as many as there must be."""
        sizes, rows = self.usual, padding.rows(self.signature)
        if rows is not None:
            axis = self.signature.axes[rows]
            sizes[rows] = min(max(2, axis.min), axis.max)
        return sizes

    def broken(self, found: tuple[Distance, ...], *, ties: bool = False) -> list[str]:
        """What of `found` is out of bounds, in words; with `ties`, which element is the largest isn't asked."""
        return [text for one, bound in self._bounded(found, ties=ties) for text in compare.violations(one, bound)]

    def share(self, found: tuple[Distance, ...]) -> float:
        """How much of what its bounds allow the engine takes, at most; which element is the largest isn't asked."""
        return max((compare.share(one, bound) for one, bound in self._bounded(found, ties=True)), default=0.0)

    def rounding(self, feeds: Tensors, reference: Tensors) -> float:
        """How far eager fp32 is from its form there, as a share of what is allowed: two right computations.

        Some models magnify rounding at some inputs, which is no fault of an engine. 0 where the form isn't in fp32, or
        eager PyTorch fails.
        """
        if not self.in_fp32:
            return 0.0
        try:
            return self.share(apart(reference, self.answers.form(None)(feeds), self.kinds))
        except Exception:  # torch's own
            return 0.0

    def _bounded(self, found: tuple[Distance, ...], *, ties: bool) -> list[tuple[Distance, Tolerance]]:
        pairs = [(one, self.bounds[one.output]) for one in found]
        if not ties:
            return pairs
        sized = [(one, bound.model_copy(update={"argmax_agreement": None})) for one, bound in pairs]
        return [(one, bound) for one, bound in sized if one.kind != "indices" and bound.model_dump(exclude_none=True)]


def of(
    recipe: Recipe, run: Runner, engine: Stored, model: Stored, answers: Answers, target: Target, scheme: Scheme
) -> Subject:
    """The engine of a target in one numeric form, loaded as `run`."""
    return Subject(
        recipe=recipe,
        run=run,
        model=model,
        signature=engine.signature(),
        answers=answers,
        bounds=tolerances.of(recipe, target, scheme),
        in_fp32=scheme == "fp32",
        slow=target.device is not None or rows_of.unfit(target) is not None,
    )


def apart(reference: Tensors, found: Tensors, kinds: Mapping[str, OutputKind]) -> tuple[Distance, ...]:
    """As `compare.distances`, but where both have NaN they agree: an input may well leave no other answer."""
    if set(reference) == set(found):
        pairs = {name: _without_nan(reference[name], found[name]) for name in reference}
        reference, found = (
            {name: one for name, (one, _) in pairs.items()},
            {name: two for name, (_, two) in pairs.items()},
        )
    return compare.distances(reference, found, kinds)


def _without_nan(reference: NDArray[Any], found: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    if reference.dtype.kind != "f" or found.dtype.kind != "f" or reference.shape != found.shape:
        return reference, found
    both = np.isnan(reference) & np.isnan(found)
    return (np.where(both, 0, reference), np.where(both, 0, found)) if both.any() else (reference, found)


def not_asked(name: str, why: str) -> StressCheck:
    """A check that wasn't made, and why."""
    return StressCheck(name=name, verdict="not applicable", why=why)


def policy(subject: Subject, name: str) -> Policy:
    """What the recipe lets a check do."""
    return cast("Policy", getattr(subject.recipe.stress, "vectors" if name.startswith("vector:") else name))


def departed(subject: Subject, name: str) -> Verdict:
    """Of a check that found something."""
    return "failed" if policy(subject, name) == "fail" else "noted"


def fault(error: Exception) -> str:
    """What went wrong, on one line."""
    return error.message if isinstance(error, ExportyardError) else f"{type(error).__name__}: {first_line(error)}"
