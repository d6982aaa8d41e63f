"""Command `tolerance`: what the engines of a model show, and tolerances that fit."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from pipeline import console, vectors
from pipeline.commands.options import HERE, AsJson, Folder, RecipeName, Targets, exported
from pipeline.errors import UnavailableError
from pipeline.job import STATIC_SCHEMES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.job import Job
    from pipeline.proposal import Bound, Seen
    from pipeline.run import Verdict

COLUMNS = ("scheme", "output", "kind", "measure", "worst", "of", "with", "in force", "proposed")


def tolerance(
    recipe: RecipeName,
    target: Targets = None,
    margin: Annotated[
        float, typer.Option("--margin", min=1, metavar="N", help="How many times the measured noise to allow.")
    ] = 4,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Measure how far right engines are from their forms, and propose tolerances to paste into recipe.toml."""
    with exported(root, recipe, None, target, 1) as (job, verdicts):
        from pipeline import proposal

        with console.progress() as report:
            job.report = report
            found, left_out = _measured(job, verdicts)
        if not found:
            raise UnavailableError(
                f"no engine of `{recipe}` was measured: {'; '.join(left_out) or 'none runs on this host'}",
                hint=f"`exportyard export {recipe}` says what became of each target",
            )
        bounds = proposal.bounds(job.recipe, job.targets, found, margin)
        if as_json:
            print(json.dumps({"margin": margin, "bounds": [one.plain() for one in bounds]}, indent=2))
            return
        console.table(COLUMNS, [_row(one) for one in bounds], numbers=("worst", "in force", "proposed"))
        for text in left_out:
            console.say(f"[yellow]left out:[/] {escape(text)}")
        static = sorted({one.scheme for one in bounds} & STATIC_SCHEMES)
        if static and not vectors.files(job.recipe):
            console.say(
                f"[yellow]note:[/] no input is kept, and usual ones seldom lie between steps of {', '.join(static)}; "
                f"`exportyard stress {recipe} --target T` finds such inputs, and these proposals then hold there, too"
            )
        print(f"\n{proposal.toml(bounds, margin)}")


def _measured(job: Job, verdicts: Sequence[Verdict]) -> tuple[list[Seen], list[str]]:
    """What the engines that passed show; and those that didn't, which say nothing about what is right."""
    from pipeline import proposal

    found, left_out = list[proposal.Seen](), []
    each = {row.target.name: row for one in verdicts for row in (one.rows or (one,))}
    for verdict in each.values():
        if not verdict.candidates:
            left_out.append(f"{verdict.target.name}: {verdict.status}: {verdict.reason}")
        for scheme, report in verdict.candidates.items():
            row = next(one for one in job.targets if one.name == report.target)
            if not report.passed:
                left_out.append(f"{row.name} {scheme} fails: {report.reasons[0]}")
                continue
            job.report(0, 0, f"{row.name} {scheme} on evaluation data")
            found += proposal.seen(report)
            engine, model = job.engine(row, scheme).stored, job.form(row, scheme).stored
            found += proposal.on_data(job.recipe, engine, model, job.answers(), row, scheme)
    return found, left_out


def _row(one: Bound) -> list[str]:
    known = sorted({"none" if value is None else f"{value:.6g}" for value in one.in_force.values()})
    proposed = f"{one.proposed:.12g}" if one.proposed is not None else "only told" if one.worst else "no difference"
    worst = f"{one.worst:.10g}" if one.measure in ("cosine", "argmax_agreement") else f"{one.worst:.3g}"
    return [one.scheme, one.output, one.kind, one.measure, worst, one.target, one.where, ", ".join(known), proposed]
