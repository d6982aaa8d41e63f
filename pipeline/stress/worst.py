"""A search for the input with which an engine is farthest from its form, within the recipe's ranges and sizes.

Hypothesis makes up sizes and ways to draw values, and climbs: it varies what was worst so far. What is searched isn't
each number of an input, of which there are too many, but how they are drawn: evenly in a part of the range, at its
ends, mostly 0 with a few peaks, or as the recipe's `feeds` makes them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings, target
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline import padding, samples
from pipeline.errors import DataError
from pipeline.stress import inputs
from pipeline.stress.subject import Subject, apart, fault
from pipeline.types import Distance, InputSpec, Reporter, Sizes

Array = NDArray[Any]
Way = Literal["usual", "even", "ends", "peaks"]
ROUND = 100  # inputs before Hypothesis is given another seed; it climbs in the second half of them
FOR_SEARCH = 0.8  # of the time; the rest is for making the worst one smaller


@dataclass(frozen=True)
class Draw:
    """How the values of one input are drawn.

    Attributes:
        way: ``usual`` is as for any comparison; ``even`` between two values; ``ends`` only these two; ``peaks`` is the
            value of the range that is nearest to 0, and one of the two at few places.
        low: the lesser value, as a place in the range from 0 to 1; likewise `high`.
        few: share of the places that have the greater value, or a peak.
    """

    way: Way = "usual"
    low: float = 0.0
    high: float = 1.0
    few: float = 0.5

    def __str__(self) -> str:
        """In words."""
        if self.way == "usual":
            return "as usual"
        span = f"{self.low:.3g} to {self.high:.3g} of its range"
        return f"{self.way}, {span}" if self.way == "even" else f"{self.way}, {span}, {self.few:.2g} of them high"


@dataclass(frozen=True)
class Case:
    """One input, by how it is made: the same case makes the same input."""

    sizes: Mapping[str, int]
    number: int = 0
    draws: Mapping[str, Draw] = field(default_factory=dict)

    def __str__(self) -> str:
        """In words."""
        sizes = ", ".join(f"{name}={size}" for name, size in self.sizes.items()) or "its one size"
        return "; ".join([f"{sizes}, seed {self.number}", *(f"`{name}` {draw}" for name, draw in self.draws.items())])


@dataclass(frozen=True)
class Worst:
    """The worst input that a search has found.

    Attributes:
        feeds: the input itself.
        found: the engine's distances from its form; none where it failed.
        share: of what the bounds allow; infinite where the engine failed.
        rounding: the same of eager fp32, where the form is in fp32: two right computations may differ by that.
        error: how it failed.
        tried: inputs that were tried.
    """

    case: Case
    feeds: dict[str, Array]
    found: tuple[Distance, ...]
    share: float
    rounding: float = 0.0
    error: str | None = None
    tried: int = 0

    @property
    def beyond(self) -> float:
        """What the engine takes beyond that, and what the search is for."""
        return self.share - self.rounding if math.isfinite(self.rounding) else 0.0


class _OverError(BaseException):
    """The time is up. No `Exception`, which Hypothesis would take for a failure of what it tests."""


def search(subject: Subject, seconds: float, report: Reporter, first: int = 0, most: float = math.inf) -> Worst:
    """The worst input that could be found in `seconds`. The order of trials is the same each time, not their number.

    Args:
        subject: the engine, its form and its bounds.
        seconds: from the first trial on; a trial that has begun is ended.
        report: told how the search goes.
        first: seed of the first round.
        most: trials, before the worst one is made smaller.

    Raises:
        RecipeError: the recipe's `feeds` raised.
        DataError: the form took none of the inputs.
    """
    began, worst, tried = 0.0, list[Worst](), 0

    def look(case: Case) -> float:
        nonlocal began, tried
        began = began or time.monotonic()  # Hypothesis gets ready first, for a second or so
        spent = time.monotonic() - began
        if tried and (spent > FOR_SEARCH * seconds or tried >= most):
            raise _OverError
        found = _look(subject, case)
        tried += 1
        if found is not None and (not worst or found.beyond > worst[-1].beyond):
            worst[:] = [found]
        told = f"worst of {tried} inputs: {worst[-1].beyond:.3g} of what is allowed" if worst else f"{tried} inputs"
        report(int(spent), math.ceil(seconds), told)
        if worst and worst[-1].error is not None:
            raise _OverError  # nothing is worse
        return found.beyond if found is not None else 0.0

    with suppress(_OverError):
        for number in range(first, first + 10**6):
            _climb(_cases(subject), look, number)
    if not worst:
        raise DataError(
            f"recipe `{subject.recipe.name}`: its own ONNX graph fails on each of {tried} inputs",
            hint="see whether every value of each `range` in [[inputs]] is one that the model takes",
        )
    return replace(_smaller(subject, worst[-1], began + seconds), tried=tried)


def _climb(cases: st.SearchStrategy[Case], look: Any, number: int) -> None:
    """One round of Hypothesis."""

    @seed(number)
    @settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.target),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def climb(case: Case) -> None:
        target(math.log10(max(look(case), 1e-30)))  # amplitudes span decades, and 0 has no logarithm

    climb()


def _cases(subject: Subject) -> st.SearchStrategy[Case]:
    places = st.floats(0, 1)
    draw = st.builds(_draw, st.sampled_from(get_args(Way)), places, places, places)
    axes = {name: subject.signature.axes[name] for name in subject.recipe.axes}
    sizes = {name: st.integers(axis.min, axis.max) for name, axis in axes.items()}
    return st.builds(
        Case,
        sizes=st.fixed_dictionaries(sizes),
        number=st.integers(0, 2**16),
        draws=st.fixed_dictionaries({spec.name: draw for spec in inputs.free(subject.recipe)}),
    )


def _draw(way: Way, one: float, other: float, few: float) -> Draw:
    return Draw(way, min(one, other), max(one, other), few) if way != "usual" else Draw()


def make(subject: Subject, case: Case) -> dict[str, Array]:
    """The input of a case.

    Raises:
        RecipeError: the recipe's `feeds` raised.
    """
    feeds = samples.feeds(subject.recipe, case.sizes, case.number)
    specs = {spec.name: spec for spec in subject.recipe.inputs}
    for place, (name, draw) in enumerate(sorted(case.draws.items())):
        if draw.way != "usual":
            rng = np.random.default_rng([case.number, place])
            feeds[name] = _values(specs[name], feeds[name], draw, rng)
    return feeds


def _values(spec: InputSpec, array: Array, draw: Draw, rng: np.random.Generator) -> Array:
    least, greatest = inputs.ends(spec)
    # from both ends, since the width of the range may be no float
    low, high = (least * (1 - place) + greatest * place for place in (draw.low, draw.high))
    if draw.way == "even":
        made = low + rng.random(array.shape) * (high - low)
    else:
        chosen = rng.random(array.shape) < draw.few
        base = np.asarray(inputs.zero(spec, array), np.float64) if draw.way == "peaks" else low
        made = np.where(chosen, high, base)
    if array.dtype.kind != "f":
        made = np.rint(made)
    return np.clip(made, least, greatest).astype(array.dtype)


def _look(subject: Subject, case: Case) -> Worst | None:
    """How far the engine is from its form there; None where the form fails, and nothing can be said."""
    feeds = make(subject, case)
    return _apart(subject, feeds, case)


def _apart(subject: Subject, feeds: dict[str, Array], case: Case) -> Worst | None:
    try:
        reference = subject.answers.form(subject.model)(feeds)
    except Exception:  # torch's and ONNX Runtime's own
        return None
    try:
        found = apart(reference, subject.run(feeds), subject.kinds)
    except Exception as error:  # a backend's runtime may raise anything; whatever it is, it is the result
        return Worst(case, feeds, (), math.inf, error=fault(error))
    return Worst(case, feeds, found, subject.share(found), subject.rounding(feeds, reference))


def _smaller(subject: Subject, worst: Worst, end: float) -> Worst:
    """The smallest input that is as bad, of those that there is time to try: fewer rows, shorter, plainer."""
    found: Worst | None = worst
    while found is not None and time.monotonic() < end:
        worst, found = found, None
        for case in _simpler(subject, worst.case):
            if time.monotonic() > end:
                break
            tried = _look(subject, case)
            if tried is not None and tried.beyond >= worst.beyond:
                found = tried
                break
    return worst


def _simpler(subject: Subject, case: Case) -> Iterator[Case]:
    for name, size in case.sizes.items():
        least = subject.signature.axes[name].min
        for smaller in dict.fromkeys((least, (least + size) // 2, size - 1)):
            if least <= smaller < size:
                yield replace(case, sizes={**case.sizes, name: smaller})
    for name, draw in case.draws.items():
        if draw.way != "usual":
            yield replace(case, draws={**case.draws, name: Draw()})
    if case.number:
        yield replace(case, number=0)


def known(subject: Subject, kept: Mapping[str, dict[str, Array]], compared: Iterable[Sizes]) -> float:
    """The worst of inputs that the engine is compared with anyway: kept ones that it serves, and usual ones."""
    usual = [subject.answers.feeds(sizes) for sizes in compared]
    served = [feeds for feeds in kept.values() if padding.fits(feeds, subject.signature)]
    found = [_apart(subject, feeds, Case({})) for feeds in (*served, *usual)]
    return max((one.beyond for one in found if one is not None), default=0.0)
