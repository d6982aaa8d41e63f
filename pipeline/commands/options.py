"""What several commands share: options, an export to look into, and how a command ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from pipeline import console, run, turns, workspace
from pipeline.job import Job

# Typer reads annotations at run time and knows Optional[...] on every Python that we support
Folder = Annotated[Path, typer.Option("-C", metavar="DIR", help="Workspace (default: here or the nearest above).")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a folder below recipes/.")]
Checkpoint = Annotated[
    Optional[Path],  # noqa: UP045  see above
    typer.Option("--checkpoint", metavar="P", help="Trained weights, instead of the recipe's own."),
]
Targets = Annotated[
    Optional[list[str]],  # noqa: UP045  see above
    typer.Option("--target", "-t", metavar="T", help="A row of targets/targets.toml; may be repeated."),
]
Registry = Annotated[
    Optional[str],  # noqa: UP045  see above
    typer.Option("--registry", metavar="DIR|URL", help="Static registry (default: the DVC remote `registry`)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
PublicKey = Annotated[
    Optional[Path],  # noqa: UP045  see above
    typer.Option("--key", metavar="FILE", help="Public key that must have signed it (default: EXPORTYARD_KEY)."),
]
HERE = Path()


@contextlib.contextmanager
def exported(
    root: Path, recipe: str, checkpoint: Path | None, target: list[str] | None, jobs: int
) -> Iterator[tuple[Job, list[run.Verdict]]]:
    """What an export has made; inside, no other command exports this recipe, and makes something else of it."""
    steps = console.Steps()
    with contextlib.ExitStack() as stack:
        with console.progress() as report:
            job = run.prepare(workspace.find(root), recipe, checkpoint=checkpoint, targets=target, report=report)
            stack.enter_context(turns.only_one(job.folder / ".export.lock", partial(_wait, recipe)))
            verdicts = run.export(job, jobs, steps)
        steps.close()
        yield job, verdicts


def _wait(recipe: str) -> None:
    console.say(f"another export of `{recipe}` is at work in this workspace; waiting for its end (Ctrl-C leaves)")


def again(job: Job, verdicts: list[run.Verdict]) -> None:
    """Say how to see each failure again, and with what."""
    from pipeline import failures

    for one in failures.of(job, verdicts):
        console.say(escape(one.again))


def warn(job: Job) -> None:
    """Print what the artifacts say that a user should know."""
    for text in job.warnings():
        console.say(f"[yellow]warning:[/] {escape(text)}")


def leave(verdicts: list[run.Verdict]) -> None:
    """Exit with the first failure's code, or with that of a target that isn't for this host when none is."""
    code = next((verdict.exit_code for verdict in verdicts if verdict.status == "failed"), 0)
    if code == 0 and not any(verdict.status == "passed" for verdict in verdicts):
        code = next((verdict.exit_code for verdict in verdicts if verdict.exit_code), 10)
    if code:
        raise typer.Exit(code)


def short(path: Path) -> str:
    """The path as one would type it here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
