"""Commands that make: a workspace, artifacts of a recipe, and what helps to see what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from pipeline import backends, console, run, workspace
from pipeline.commands.options import (
    HERE,
    AsJson,
    Checkpoint,
    Folder,
    RecipeName,
    Targets,
    again,
    exported,
    leave,
    short,
    warn,
)
from pipeline.errors import ExportyardError
from pipeline.job import Job


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the workspace shall be.")],
    remote: Annotated[
        Optional[Path],  # noqa: UP045  see above
        typer.Option("--remote", metavar="DIR", help="A folder to be the DVC remote that releases are pushed to."),
    ] = None,
) -> None:
    """Make a workspace: recipes/ targets/ artifacts/ dvc.yaml, under git and DVC."""
    from pipeline import initial

    for line in initial.init(folder, remote):
        print(line)
    console.say(f"\nnext: `cd {folder}` and `exportyard export example`")


def recipes(root: Folder = HERE, as_json: AsJson = False) -> None:
    """List the recipes of the workspace."""
    found = workspace.find(root)
    loaded = [found.recipe(name) for name in found.recipe_names()]
    if as_json:
        print(json.dumps([recipe.model_dump(mode="json") for recipe in loaded], indent=2))
        return
    rows = [
        [
            recipe.name,
            ", ".join(f"{name} {axis.min}..{axis.max}" for name, axis in recipe.axes.items()),
            escape(recipe.summary),
        ]
        for recipe in loaded
    ]
    console.table(["recipe", "axes", "summary"], rows)


def targets(root: Folder = HERE, as_json: AsJson = False) -> None:
    """List the target rows: what each is, whether this host can build it, and if not why."""
    rows = workspace.find(root).rows()
    state = {name: backends.find(row.backend).missing(row) for name, row in rows.items()}
    running = {name: backends.find(row.backend).not_runnable(row) for name, row in rows.items()}
    if as_json:
        found = [row.plain() | {"missing": state[name], "not_runnable": running[name]} for name, row in rows.items()]
        print(json.dumps(found, indent=2))
        return
    lines = []
    for name, row in rows.items():
        verdict = "[green]builds here[/]"
        missing, stopped = state[name], running[name]
        if missing is not None:
            verdict = f"[yellow]not here:[/] {escape(missing)}"
        elif stopped is not None:
            verdict = f"[yellow]builds here, not run:[/] {escape(stopped)}"
        lines.append([name, row.backend, ", ".join(row.schemes), verdict, escape(row.summary)])
    console.table(["target", "backend", "schemes", "this host", "summary"], lines)


def export(
    recipe: RecipeName,
    checkpoint: Checkpoint = None,
    target: Targets = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Targets to build at the same time.")] = 1,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Build, check and measure an engine for each target; what is up to date is not made again."""
    with exported(root, recipe, checkpoint, target, jobs) as (job, verdicts):
        _show(job, verdicts, as_json=as_json)


def _show(job: Job, verdicts: list[run.Verdict], *, as_json: bool) -> None:
    """Print what became of each target, write the report, and exit with the first failure's code."""
    from pipeline import summary
    from pipeline.report import files as report

    if as_json:
        print(json.dumps([summary.plain(verdict) for verdict in verdicts], indent=2))
    else:
        console.table(summary.COLUMNS, [summary.row(verdict) for verdict in verdicts], numbers=summary.NUMBERS)
    warn(job)
    page = report.write(job, verdicts)
    console.say(f"report: {short(page)}")
    again(job, verdicts)
    failed = [verdict for verdict in verdicts if verdict.status == "failed"]
    if failed:
        first = failed[0]
        console.fail(
            ExportyardError(
                f"{len(failed)} of {len(verdicts)} targets failed; `{first.target.name}`: {first.reason}",
                hint="`--target T` exports some targets only; `targets = [...]` in recipe.toml says which a recipe has",
            )
        )
    leave(verdicts)


def status(
    recipe: RecipeName,
    checkpoint: Checkpoint = None,
    target: Targets = None,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Show what is stale and why; makes nothing."""
    job = run.prepare(workspace.find(root), recipe, checkpoint=checkpoint, targets=target, maker=run.Inspector())
    states = run.status(job)
    if as_json:
        print(json.dumps([{"step": one.step, "fresh": one.fresh, "reason": one.reason} for one in states], indent=2))
        return
    rows = [[one.step, "[green]fresh[/]" if one.fresh else "[yellow]stale[/]", escape(one.reason)] for one in states]
    console.table(["step", "state", "why"], rows)


def make(
    recipe: RecipeName,
    step: Annotated[str, typer.Argument(help="Folder below artifacts/RECIPE/, such as program or engine/TARGET.")],
    root: Folder = HERE,
) -> None:
    """Make one step and what it needs; this is what the stages of dvc.yaml run."""
    steps = console.Steps()
    with console.progress() as report:
        job = run.prepare(workspace.find(root), recipe, report=report)
        folder = run.make_step(job, step, steps)
    steps.close()
    print(short(folder))
