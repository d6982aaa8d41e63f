"""Questions that an engine must answer alike: rows of a batch alone and together, more padding, NaN in another row.

The engine is compared with itself. Its form is asked the same, since some forms aren't invariant: dynamic INT8 reads
its ranges from all rows of a call. What the form itself does is no fault of the engine, and only noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline import padding
from pipeline.stress import inputs
from pipeline.stress.subject import Outputs, Subject, Verdict, apart, departed, fault, not_asked
from pipeline.types import Runner, Sizes, StressCheck

if TYPE_CHECKING:
    from pipeline.types import Tensors

Both = Callable[[Runner], tuple[Outputs, Outputs]]


def _invariant(subject: Subject, name: str, sizes: Sizes, compared: str, both: Both) -> StressCheck:
    """Whether two ways to ask the same get the same answer, from the engine; and from its form, if not.

    Args:
        subject: what is checked.
        name: of the check.
        sizes: of the axes.
        compared: in words.
        both: asks a runner in both ways.
    """
    try:
        one_way, other_way = both(subject.form)
        own = apart(one_way, other_way, subject.kinds)
    except Exception as error:  # torch's and ONNX Runtime's own: the model may not be able to take it
        return not_asked(name, f"its form fails: {fault(error)}")
    try:
        answers = both(subject.run)
        found = apart(*answers, subject.kinds)
    except Exception as error:  # a backend's runtime may raise anything; whatever it is, it is the result
        bad, why = departed(subject, name), f"fails: {fault(error)}"
        return StressCheck(name=name, sizes=sizes, compared=compared, own=own, verdict=bad, why=why)
    broken, natural = subject.broken(found), subject.broken(own)
    verdict: Verdict = departed(subject, name) if broken else "passed"
    why = "; ".join(broken)
    if natural:
        strayed = [
            text
            for form, engine in zip((one_way, other_way), answers, strict=True)
            for text in subject.broken(apart(form, engine, subject.kinds))
        ]
        verdict, why = _natural(subject, name, natural, strayed, both)
    return StressCheck(name=name, sizes=sizes, compared=compared, found=found, own=own, verdict=verdict, why=why)


def _natural(subject: Subject, name: str, natural: list[str], strayed: list[str], both: Both) -> tuple[Verdict, str]:
    """What it means that the form isn't invariant: in fp32 it has to be, where the model is.

    Args:
        subject: what is checked.
        name: of the check.
        natural: how far the form is from itself.
        strayed: how far the engine is from the form, asked either way.
        both: as for `_invariant`.
    """
    told = f"the form itself changes its answer: {'; '.join(natural)}"
    if strayed:
        return departed(subject, name), f"{told}; and the engine isn't as its form: {'; '.join(strayed)}"
    if not subject.in_fp32:
        return "noted", told
    try:
        of_eager = subject.broken(apart(*both(subject.answers.ask), subject.kinds))
    except Exception as error:  # as above
        of_eager = [fault(error)]
    if of_eager:
        return "noted", f"eager fp32 itself changes its answer: {'; '.join(of_eager)}"
    return departed(subject, name), f"{told}, and eager fp32 doesn't"


def rows(subject: Subject) -> Iterator[StressCheck]:
    """Rows of a batch, each alone (or as few as there must be) and all together."""
    along = padding.rows(subject.signature)
    if along is None:
        yield not_asked("rows", "the model has no axis of independent rows")
        return
    axis, sizes = subject.signature.axes[along], subject.usual
    count, together = axis.min, max(sizes[along], min(axis.max, 2 * axis.min))
    if together == count:
        yield not_asked("rows", f"`{along}` is never anything but {count}")
        return
    sizes[along] = together
    whole = subject.answers.feeds(sizes)
    rowed = {spec.name for spec in subject.signature.inputs if along in spec.shape}
    starts = {0, together - count} if subject.slow else {0, (together - count) // 2, together - count}

    def both(run: Runner) -> tuple[Outputs, Outputs]:
        all_rows, parts = run(whole), [run(inputs.part(whole, rowed, start, count)) for start in sorted(starts)]
        names = [spec.name for spec in subject.signature.outputs]
        taken = {name: [all_rows[name][start : start + count] for start in sorted(starts)] for name in names}
        return (
            {name: np.concatenate(some) for name, some in taken.items()},
            {name: np.concatenate([one[name] for one in parts]) for name in names},
        )

    told = f"engine with itself: {along} {count} and {together} of the same"
    yield _invariant(subject, "rows", sizes, told, both)


def longer(subject: Subject) -> Iterator[StressCheck]:
    """Inputs, and the same with padding behind that their masks name."""
    masks = subject.recipe.stress.mask
    if not masks:
        like = next((spec.name for spec in subject.recipe.inputs if "mask" in spec.name), None)
        said = f'; if `{like}` is one, say `mask = {{ {like} = "AXIS" }}`' if like else ""
        yield not_asked("padding", f"`[stress] mask` names no mask{said}")
    for name in dict.fromkeys(masks.values()):
        sizes, axis = subject.usual, subject.signature.axes[name]
        size = inputs.odd_sizes({name: axis})[0 if subject.slow else 1][name]
        if size <= sizes[name]:
            sizes[name], size = axis.min, sizes[name]
        if size <= sizes[name]:
            yield not_asked("padding", f"`{name}` is never anything but {size}")
            continue
        yield _invariant(subject, "padding", sizes, *_longer(subject, sizes, name, size))


def _longer(subject: Subject, sizes: Sizes, axis: str, size: int) -> tuple[str, Both]:
    short = subject.answers.feeds(sizes)
    masks = {mask for mask, of in subject.recipe.stress.mask.items() if of == axis}
    long = inputs.padded(short, subject.signature, masks, axis, size)

    def both(run: Runner) -> tuple[Outputs, Outputs]:
        return dict(run(short)), padding.cut(run(long), subject.signature, sizes)

    return f"engine with itself: {axis} {sizes[axis]} and {size}, masked", both


# --- NaN -----------------------------------------------------------------------------------------------------------


def _with_nan(subject: Subject) -> tuple[dict[str, int], Tensors, Tensors] | str:
    """Sizes, and usual inputs without and with NaN in their first row; or why there are none."""
    along = padding.rows(subject.signature)
    if along is None:
        return "the model has no axis of independent rows"
    sizes = subject.few()
    usual = subject.answers.feeds(sizes)
    feeds = inputs.with_nan(usual, subject.signature, along)
    return (sizes, usual, feeds) if feeds is not None else "no input with rows is of floats"


def nan(subject: Subject) -> Iterator[StressCheck]:
    """NaN where eager fp32 answers NaN."""
    made = _with_nan(subject)
    if isinstance(made, str):
        yield not_asked("nan", made)
        return
    sizes, _, feeds = made
    compared = "engine with eager fp32: NaN in the first row"
    try:
        eager, form = subject.answers.ask(feeds), subject.form(feeds)
    except Exception as error:  # as in `_invariant`
        yield not_asked("nan", f"the model fails: {fault(error)}")
        return
    try:
        found = subject.run(feeds)
    except Exception as error:
        bad, why = departed(subject, "nan"), f"fails: {fault(error)}"
        yield StressCheck(name="nan", sizes=sizes, compared=compared, verdict=bad, why=why)
        return
    lost, natural = _lost(eager, found), _lost(eager, form)
    beyond = any(np.any(lost[name] & ~natural[name]) for name in lost)
    told = [f"`{name}` has {int(where.sum())} numbers for NaN" for name, where in lost.items() if where.any()]
    verdict: Verdict = "passed"
    if told:
        verdict = departed(subject, "nan") if beyond else "noted"
        told += [] if beyond else ["so has its form"]
    yield StressCheck(name="nan", sizes=sizes, compared=compared, verdict=verdict, why="; ".join(told))


def _lost(reference: Tensors, found: Tensors) -> dict[str, NDArray[np.bool_]]:
    """Of each output of floats, the places that have a number for the reference's NaN."""
    floats = [name for name in reference if reference[name].dtype.kind == found[name].dtype.kind == "f"]
    return {name: np.isnan(reference[name]) & ~np.isnan(found[name]) for name in floats}


def nan_rows(subject: Subject) -> Iterator[StressCheck]:
    """The other rows, with NaN in the first one and without."""
    made = _with_nan(subject)
    along = padding.rows(subject.signature)
    if isinstance(made, str) or along is None or made[0][along] < 2:
        yield not_asked("nan_rows", made if isinstance(made, str) else f"`{along}` is never more than 1")
        return
    sizes, usual, feeds = made

    def both(run: Runner) -> tuple[Outputs, Outputs]:
        clean, dirty = run(usual), run(feeds)
        return {name: array[1:] for name, array in clean.items()}, {name: array[1:] for name, array in dirty.items()}

    yield _invariant(
        subject, "nan_rows", sizes, "engine with itself: other rows, with and without NaN in the first", both
    )
