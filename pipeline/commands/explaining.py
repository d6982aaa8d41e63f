"""The command that says which operator is at fault."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from pipeline import console, turns, workspace
from pipeline import run as chain
from pipeline.commands.options import HERE, AsJson, Checkpoint, Folder, RecipeName, Targets
from pipeline.errors import ParityError, UsageError, unknown
from pipeline.job import Job
from pipeline.types import Departure, Explanation, Layer, Scheme, Target

COLUMNS = ["level", "operator", "module", "line", "before", "after", "own", "explained", "what"]
LAYER_COLUMNS = ["tensor", "operator", "module", "line", "after", "own"]
WORST = 8  # layers that a healthy engine is shown with


def explain(
    recipe: RecipeName,
    target: Targets = None,
    scheme: Annotated[
        Optional[str],  # noqa: UP045  typer reads it at run time
        typer.Option("--scheme", "-s", metavar="S", help="A numeric form (default: those that fail, or the chosen)."),
    ] = None,
    engine: Annotated[
        Optional[Path],  # noqa: UP045  as above
        typer.Option("--engine", metavar="FILE", help="An engine from elsewhere (ONNX), instead of the store's."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Show the error of every layer.")] = False,
    checkpoint: Checkpoint = None,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Name the operator at which an engine departs from its model: module, source line, error, what to do."""
    found = _explained(recipe, checkpoint, target, scheme, engine, root)
    if as_json:
        print(json.dumps([one.plain() for one, _ in found], indent=2))
    else:
        for one, reasons in found:
            _show(one, reasons, layers=layers)
    if any(one.departures for one, _ in found):
        raise typer.Exit(ParityError.exit_code)


def _explained(
    recipe: str,
    checkpoint: Path | None,
    names: list[str] | None,
    scheme: str | None,
    engine: Path | None,
    root: Path,
) -> list[tuple[Explanation, tuple[str, ...]]]:
    """Each explanation, with why its engine failed parity, if it did."""
    if engine is not None and (names is None or len(names) != 1 or scheme is None):
        raise UsageError(
            "`--engine FILE` needs one `--target` and a `--scheme`", hint="say what the file was built for"
        )
    if engine is not None and not engine.is_file():
        raise UsageError(f"there is no engine `{engine}`", hint="give a model.onnx that ONNX Runtime runs")
    with console.progress() as report:
        job = chain.prepare(workspace.find(root), recipe, checkpoint=checkpoint, targets=names, report=report)
        job.folder.mkdir(parents=True, exist_ok=True)
        with turns.only_one(job.folder / ".export.lock", lambda: console.say(f"waiting for an export of `{recipe}`")):
            try:
                return [
                    (_one(job, row, each, engine), reasons)
                    for row in job.targets
                    for each, reasons in _schemes(job, row, scheme).items()
                ]
            finally:
                job.close()


def _one(job: Job, target: Target, scheme: Scheme, engine: Path | None) -> Explanation:
    if engine is None:
        return job.explanation_report(target, scheme)
    from pipeline.explain.explanation import explain as look

    return look(job.recipe, job.model(target, scheme, engine), target, scheme, None, job.report)


def _schemes(job: Job, target: Target, asked: str | None) -> dict[Scheme, tuple[str, ...]]:
    """The forms to look at: the one asked for, or all that fail parity and why, or the one that the row ships."""
    if asked is not None:
        if asked not in target.schemes:
            raise unknown("scheme", asked, target.schemes, where=f"target `{target.name}`")
        return {scheme: () for scheme in target.schemes if scheme == asked}
    verdict = chain.verdict(job, target)
    failing = {scheme: found.reasons for scheme, found in verdict.candidates.items() if not found.passed}
    return failing or {verdict.scheme or target.schemes[-1]: ()}


def _show(found: Explanation, reasons: tuple[str, ...], *, layers: bool) -> None:
    head = f"{found.target} {found.scheme}: "
    if found.departures:
        console.say(f"[red]{escape(head + sentence(found.departures[0]))}[/]")
        console.table(COLUMNS, [_row(one) for one in found.departures])
        for said in dict.fromkeys(one.suggestion for one in found.departures):
            print(said)
    else:
        looked = f"{found.compared} tensors" if found.compared else "its outputs"
        console.say(f"[green]{escape(head)}nothing departs:[/] {looked} compared")
        if reasons:
            console.say(
                f"[yellow]it fails parity all the same:[/] {escape('; '.join(reasons))}\n"
                f"no operator does worse than its numbers explain, so it is their sum that is too much; "
                f"`exportyard quantize {found.recipe} --explain` says what is in float and what else was tried"
            )
    if found.not_compared:
        console.say(f"[yellow]not looked into:[/] {escape(found.not_compared)}")
    shown = found.layers if layers else () if found.departures else worst(found.layers)
    if shown:
        if not layers:
            console.say("the operators that cost most:")
        console.table(LAYER_COLUMNS, [_layer(one) for one in shown], numbers=("after", "own"))


def sentence(one: Departure) -> str:
    """A departure in one line: where, and how far."""
    where = one.module or one.node
    at = f", {one.line}" if one.line else ""
    explained = "nothing should differ" if one.allowed == math.inf else f"rounding explains {_db(one.allowed)}"
    return (
        f"{where} ({one.operator}{at}) departs: {_db(one.before)} before, {_db(one.after)} after, "
        f"{_db(one.own)} on right inputs where {explained}: {one.kind}"
    )


def worst(layers: tuple[Layer, ...]) -> list[Layer]:
    """The layers that lose most by themselves, the worst first."""
    lossy = [one for one in layers if one.own_db is not None and one.own_db < math.inf]
    return sorted(lossy, key=lambda one: one.own_db or 0.0)[:WORST]


def _db(value: float) -> str:
    return f"{value:.0f} dB" if math.isfinite(value) else "exact" if value > 0 else "nothing right"


def _row(one: Departure) -> list[str]:
    operator = f"{one.operator} {one.node}" + (f" ({one.engine_node})" if one.engine_node else "")
    return [
        one.level,
        escape(operator),
        escape(one.module),
        escape(one.line),
        _db(one.before),
        _db(one.after),
        _db(one.own),
        _db(one.allowed),
        escape(f"{one.kind}: {one.because}"),
    ]


def _layer(one: Layer) -> list[str]:
    own = "" if one.own_db is None else _db(one.own_db)
    return [escape(one.output), one.operator, escape(one.module), escape(one.line), _db(one.after_db), own]
