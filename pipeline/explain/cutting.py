"""Where an engine stops being the form that it was built from, for backends that don't let anyone look inside.

A fault of a compiler comes again when a part of the model is compiled. So the form is cut in two, each half is built
with the same backend and row, and run on the values that its inputs should have: the half whose outputs are wrong
has the fault, and is cut again, down to one operator. Where both halves are right, the fault needs operators of
both (a fusion, as a rule), and the smallest group around the cut that is still wrong is looked for. Where all of them
together are right, too, it is not the compiler: the engine's file is stale or damaged.

What is wrong is what the row's own tolerance forbids; a tensor that was quantised may also be off by one step.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipeline import backends
from pipeline.errors import ExportyardError, first_line
from pipeline.explain.cut_judge import Judge, Trial, worst
from pipeline.explain.cut_search import Search
from pipeline.explain.parts import Feeds, Step
from pipeline.store import Stored
from pipeline.types import Departure, Recipe, Reporter, Scheme, Target

NAMED = 6  # operators of a group that a suggestion lists


def departures(
    recipe: Recipe,
    model: Stored,
    engine: Stored,
    target: Target,
    scheme: Scheme,
    feeds_list: Sequence[Feeds],
    report: Reporter,
    tuning: Path | None = None,
) -> tuple[tuple[Departure, ...], str | None]:
    """The operator (or the smallest group) that the row's backend compiles to something else; none if nothing is wrong.

    Args:
        recipe: of the model.
        model: what `engine` was built from: a graph, or a program.
        engine: of `target`.
        target: the row; its backend builds the parts.
        scheme: of `model`.
        feeds_list: what the engine is asked; its parts are asked the one at which it is worst.
        report: told how many parts were built.
        tuning: the folder that the stage `tune` wrote, for a row that asks for it.

    Returns:
        What departs, and why nobody looked if that was so.

    Raises:
        BuildError: the engine can't be loaded.
    """
    backend = backends.find(target.backend)
    reason = backend.missing(target) or backend.not_runnable(target)
    if reason is not None:
        return (), f"parts of it would have to be built and run, and this host can't: {reason}"
    judge = Judge(recipe, target, scheme)
    calls = judge.whole(model, engine, feeds_list)
    whole = worst(calls)
    if not whole.departs:
        return (), None
    asked = feeds_list[next(place for place, one in enumerate(calls) if one is whole)]
    with tempfile.TemporaryDirectory(prefix="exportyard-cutting-") as folder:
        search = Search(model, judge, [asked], tuning, Path(folder), report)
        try:
            found = search.smallest(search.plan.core)
            if found is not None:
                return (_departure(search, judge, found),), None
            return _of_the_file(recipe, engine, judge, search, whole)
        except ExportyardError as error:
            return (), f"it departs, but can't be built again to find out where: {first_line(error)}"


def _of_the_file(
    recipe: Recipe, engine: Stored, judge: Judge, search: Search, whole: Trial
) -> tuple[tuple[Departure, ...], str | None]:
    """No part is wrong: either the file is, or it takes the whole."""
    if search.again().departs:
        refused = f" (of those that could be built; the others: {search.refused})" if search.refused else ""
        return (), f"all of it departs whenever it is built, but no part of it does{refused}"
    found = Departure(
        level="engine",
        operator="",
        node="",
        output=whole.output,
        before=math.inf,
        after=whole.own,
        own=whole.own,
        allowed=whole.allowed,
        because=f"{judge.because}; built again from the same form, it is right",
        kind="file",
        suggestion=f"the engine's files are stale or damaged: remove `{engine.path}` and run `exportyard export"
        f" {recipe.name}`",
    )
    return (found,), None


def _departure(search: Search, judge: Judge, found: Trial) -> Departure:
    assert found.part is not None
    steps = [one for one in (search.form.steps[place] for place in found.part.steps) if one.role == "core"]
    step, kind, advice = steps[0], "fused wrongly", _suggestion(judge.target, judge.scheme, steps)
    if len(steps) == 1:
        kind = judge.kind(step, found)
    elif search.stuck:
        kind, advice = "one of several", f"it is one of {_told(steps)}; less can't be built alone: {search.refused}"
    elif found.values is not None and found.values[0].dtype.kind != "f":
        # given the right numbers it makes the right choice, and the others are within bounds
        step = next((one for one in steps if found.output in one.makes), steps[-1])
        kind, advice = (
            "near tie",
            (
                f"no operator is wrong: what the row allows the others to be off decides between values that are almost"
                f" equal; allow that with `argmax_agreement` in the row's vs_onnx.{judge.scheme}"
            ),
        )
    before, after = search.on_the_way(found)
    return Departure(
        level="engine",
        operator=step.operator,
        node=step.name,
        module=step.module,
        line=step.line,
        output=found.output,
        before=before,
        after=after,
        own=found.own,
        allowed=found.allowed,
        because=f"{judge.because}; alone, it has {'; '.join(found.broken)}",
        kind=kind,
        suggestion=advice,
    )


def _suggestion(target: Target, scheme: Scheme, steps: Sequence[Step]) -> str:
    advice = (
        "leave it in float"
        if scheme.startswith("int8")
        else "write that line of the model with other operators, or take another backend for this hardware"
    )
    if len(steps) == 1:
        return f"`{target.backend}` compiles this operator to something else: {advice}, and tell its authors"
    return (
        f"`{target.backend}` compiles {_told(steps)} to something else only when they stand together, which fuses"
        f" them: {advice}, and tell its authors"
    )


def _told(steps: Sequence[Step]) -> str:
    names = ", ".join(f"{step.operator} `{step.name}`" for step in steps[:NAMED])
    return f"{len(steps)} operators ({names}{', ...' if len(steps) > NAMED else ''})"
