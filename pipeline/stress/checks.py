"""What an engine is asked beyond usual inputs: is it still its form with inputs that nobody thought of?

Most questions compare the engine with the form that it was built from, by the bounds that hold at usual inputs; the
others are in `pipeline.stress.invariance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline import padding, vectors
from pipeline.stress import inputs, invariance
from pipeline.stress.subject import Subject, apart, departed, fault, not_asked, policy
from pipeline.types import StressCheck

if TYPE_CHECKING:
    from pipeline.types import Tensors

WITH_FORM = "engine with its form"


def checks(subject: Subject, compared: list[dict[str, int]]) -> Iterator[StressCheck]:
    """Every check, one by one, in the order of the keys of `[stress]`.

    Args:
        subject: what is checked.
        compared: sizes at which it has been compared already.

    Raises:
        DataError: a kept input can't be used.
        RecipeError: the recipe's `feeds` raised.
    """
    asked: dict[str, Callable[[Subject], Iterator[StressCheck]]] = {
        "sizes": lambda one: _sizes(one, compared),
        "rows": invariance.rows,
        "padding": invariance.longer,
        "zeros": lambda one: _values(one, "zeros", {"all values 0": inputs.zero}),
        "ends": lambda one: _values(one, "ends", ENDS),
        "denormals": lambda one: _values(one, "denormals", {"all values denormal": inputs.denormal}),
        "nan": invariance.nan,
        "nan_rows": invariance.nan_rows,
        "vectors": _vectors,
    }
    for name, ask in asked.items():
        if policy(subject, name) == "skip":
            yield not_asked(name, f'`[stress] {name} = "skip"`')
        else:
            yield from ask(subject)


ENDS: Mapping[str, Any] = {
    "all values at their least": inputs.least,
    "all values at their greatest": inputs.greatest,
    "each value at one of its ends": inputs.either_end,
}


def _with_form(subject: Subject, name: str, feeds: Tensors, what: str = "", *, ties: bool = False) -> StressCheck:
    """One call of the engine, compared with the form.

    Args:
        subject: what is checked.
        name: of the check.
        feeds: the inputs.
        what: about them, in words.
        ties: many elements of an output may be equal but for rounding, which then decides their order.
    """
    sizes = padding.sizes_of(feeds, subject.signature)
    compared = f"{WITH_FORM}, {what}" if what else WITH_FORM
    try:
        reference = subject.form(feeds)
    except Exception as error:  # torch's and ONNX Runtime's own: the model may not be able to take it
        return StressCheck(
            name=name, sizes=sizes, compared=compared, verdict="not applicable", why=f"its form fails: {fault(error)}"
        )
    try:
        found = apart(reference, subject.run(feeds), subject.kinds)
    except Exception as error:  # a backend's runtime may raise anything; whatever it is, it is the result
        return StressCheck(
            name=name, sizes=sizes, compared=compared, verdict=departed(subject, name), why=f"fails: {fault(error)}"
        )
    broken = subject.broken(found, ties=ties)
    verdict = departed(subject, name) if broken else "passed"
    if broken and broken == subject.broken(found, ties=True):
        rounding = subject.rounding(feeds, reference)
        if subject.share(found) <= 1 + rounding:
            broken.append(f"but eager fp32 is {rounding:.3g} of what is allowed away, too: rounding is magnified there")
            verdict = "noted"
    why = "; ".join(broken)
    return StressCheck(name=name, sizes=sizes, compared=compared, found=found, verdict=verdict, why=why)


def _sizes(subject: Subject, compared: list[dict[str, int]]) -> Iterator[StressCheck]:
    axes = {name: subject.signature.axes[name] for name in subject.recipe.axes}
    odd = [sizes for sizes in inputs.odd_sizes(axes) if sizes not in compared]
    if not odd:
        yield not_asked("sizes", "there are no odd sizes besides those compared anyway")
    for sizes in odd[:1] if subject.slow else odd:
        yield _with_form(subject, "sizes", subject.answers.feeds(sizes))


def _values(subject: Subject, name: str, changes: Mapping[str, Any]) -> Iterator[StressCheck]:
    usual = subject.answers.feeds(subject.few())
    for what, change in changes.items():
        feeds = inputs.changed(subject.recipe, usual, change)
        if feeds is None:
            none_free = not inputs.free(subject.recipe)
            yield not_asked(
                name, "no input is `free` of what `feeds` makes" if none_free else "no float may be so small"
            )
            return
        # inputs that are equal everywhere give equal outputs
        yield _with_form(subject, name, feeds, what, ties=change is not inputs.either_end)


def _vectors(subject: Subject) -> Iterator[StressCheck]:
    kept = vectors.read(subject.recipe)
    if not kept:
        yield not_asked("vectors", "none is kept (`exportyard stress` finds some)")
    for file, feeds in kept.items():
        name = f"vector:{file}"
        if padding.fits(feeds, subject.signature):
            yield _with_form(subject, name, feeds, ties=True)  # which a search finds
        else:
            yield not_asked(name, f"the engine doesn't serve {padding.sizes_of(feeds, subject.signature)}")
