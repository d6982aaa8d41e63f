"""Command `stress`: search for the input with which an engine is farthest from its form."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.markup import escape

from pipeline import backends, console, run, turns, vectors, workspace
from pipeline.commands.options import HERE, AsJson, Folder, RecipeName, short
from pipeline.errors import NotApplicable, ParityError, UsageError, unknown

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.job import Job
    from pipeline.stress.subject import Subject
    from pipeline.stress.worst import Worst
    from pipeline.types import Scheme, Target


def stress(
    recipe: RecipeName,
    target: Annotated[str, typer.Option("--target", "-t", metavar="T", help="A row of targets/targets.toml.")],
    scheme: Annotated[
        Optional[str],  # noqa: UP045  see pipeline.commands.options
        typer.Option("--scheme", metavar="S", help="Numeric form (default: the row's first that this model has)."),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, metavar="N", help="How long to search.")] = 30,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Where the search begins.")] = 0,
    keep: Annotated[
        Optional[bool],  # noqa: UP045  likewise
        typer.Option("--keep/--no-keep", help="Keep what is found (default: if it is worse than all that is known)."),
    ] = None,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Search for the input that takes an engine farthest from its form, and keep it for later comparisons."""
    with console.progress() as report:
        job = run.prepare(workspace.find(root), recipe, targets=[target], report=report)
        wait = partial(console.say, f"another export of `{recipe}` is at work in this workspace; waiting for its end")
        with turns.only_one(job.folder / ".export.lock", wait), contextlib.closing(job):
            row, form = _chosen(job, target, scheme)
            with _subject(job, row, form) as subject:
                from pipeline.stress import worst

                before = _before(job, row, form, subject)
                found = worst.search(subject, seconds, report, seed)
                path = _kept(job, found, before, keep)
    if as_json:
        print(json.dumps(_plain(job, row, form, found, before, path), indent=2))
    else:
        _show(job, row, form, found, before, path)
    if found.beyond > 1:
        what = found.error or f"{found.beyond:.3g} times what its tolerance allows"
        raise ParityError(
            f"`{row.name}` {form} is not its form with {found.case}: {what}",
            hint=f"`exportyard explain {recipe} --target {row.name}` looks for the operator; "
            f"`exportyard tolerance {recipe}` says what the engines of this model show",
        )


def _chosen(job: Job, name: str, scheme: str | None) -> tuple[Target, Scheme]:
    """The row and the numeric form.

    Raises:
        UsageError: the row has no engine of its own, or no such form.
        NotApplicable: this model has no such form.
    """
    asked = job.asked[0]
    if asked.candidates:
        raise UsageError(f"`{name}` only chooses among rows", hint=f"name one of {', '.join(asked.candidates)}")
    row = job.targets[0]
    if scheme is not None:
        if scheme not in row.schemes:
            raise unknown("scheme", scheme, row.schemes, where=f"`{row.name}`")
        why = job.left_out(row, scheme)
        if why is not None:
            raise NotApplicable(f"recipe `{job.recipe.name}` has no `{scheme}`: {why}", hint="name another `--scheme`")
        return row, scheme
    form = next((one for one in row.schemes if job.left_out(row, one) is None), None)
    if form is None:
        raise NotApplicable(f"recipe `{job.recipe.name}` has none of {', '.join(row.schemes)}", hint="name another row")
    return row, form


@contextlib.contextmanager
def _subject(job: Job, row: Target, form: Scheme) -> Iterator[Subject]:
    """The engine, made, compared at usual inputs and loaded."""
    job.parity(row, form)
    from pipeline.stress import subject as stress_subject

    engine, model = job.engine(row, form).stored, job.form(row, form).stored
    with backends.loaded(engine, row) as loaded:
        yield stress_subject.of(job.recipe, loaded, engine, model, job.answers(), row, form)


def _before(job: Job, row: Target, form: Scheme, subject: Subject) -> float:
    """How much of what is allowed the engine takes at most with inputs that it is compared with anyway."""
    from pipeline.stress import worst

    compared = [one.sizes for one in job.parity_report(row, form).sizes]
    return worst.known(subject, vectors.read(job.recipe), compared)


def _kept(job: Job, found: Worst, before: float, keep: bool | None) -> Path | None:
    """The file that the input was written to, if it was."""
    wanted = found.beyond > before if keep is None else keep
    return vectors.keep(job.recipe, found.feeds) if wanted else None


def _show(job: Job, row: Target, form: Scheme, found: Worst, before: float, path: Path | None) -> None:
    from pipeline import summary

    print(f"{found.tried} inputs of {job.recipe.name} on {row.name} {form}, against the form that it was built from")
    print(f"worst: {found.beyond:.3g} of what is allowed (without the search: {before:.3g})")
    if found.rounding:
        print(f"       {found.share:.3g}, less {found.rounding:.3g} by which eager fp32 is away from the form itself")
    print(f"with:  {found.case}")
    if found.error is not None:
        console.say(f"[red]fails:[/] {escape(found.error)}")
    rows = [
        [
            one.output,
            summary.decibels(one.sqnr_db),
            f"{one.max_abs:.2g}",
            f"{one.max_over_peak:.2g}",
            f"{one.cosine:.6f}",
        ]
        for one in found.found
    ]
    console.table(
        ["output", "vs form", "max abs", "of peak", "cosine"], rows, numbers=("vs form", "max abs", "of peak", "cosine")
    )
    if path is not None:
        print(f"kept:  {short(path)} ({path.stat().st_size:,} bytes); every later comparison looks at it")
        console.say(f"next: `git add {short(path)}`; removing it forgets it")
    else:
        print("kept:  no" + ("" if found.beyond > before else ", since it is no worse than what is known"))


def _plain(job: Job, row: Target, form: Scheme, found: Worst, before: float, path: Path | None) -> dict[str, Any]:
    return {
        "recipe": job.recipe.name,
        "target": row.name,
        "scheme": form,
        "tried": found.tried,
        "share": found.share if math.isfinite(found.share) else "Infinity",
        "rounding": found.rounding,
        "beyond": found.beyond if math.isfinite(found.beyond) else "Infinity",
        "before": before if math.isfinite(before) else "Infinity",
        "sizes": dict(found.case.sizes),
        "case": str(found.case),
        "error": found.error,
        "distances": [one.plain() for one in found.found],
        "kept": None if path is None else path.relative_to(job.workspace.root).as_posix(),
    }
