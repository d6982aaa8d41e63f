"""Commands that compare what an export has made."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape

from pipeline import console
from pipeline.commands.options import HERE, AsJson, Folder, RecipeName, Targets, exported, leave, warn


def parity(recipe: RecipeName, target: Targets = None, root: Folder = HERE, as_json: AsJson = False) -> None:
    """Show how far each engine is from its ONNX graph and from eager PyTorch, size by size."""
    from pipeline import summary

    with exported(root, recipe, None, target, 1) as (_, verdicts):
        reports = [(verdict.target.name, found) for verdict in verdicts for found in verdict.candidates.values()]
        if as_json:
            print(json.dumps([found.plain() for _, found in reports], indent=2))
        else:
            console.table(summary.PARITY_COLUMNS, summary.parity_rows(reports), numbers=summary.PARITY_NUMBERS)
            for name, found in reports:
                for reason in found.reasons:
                    console.say(f"[red]failed[/] {name} {found.scheme}: {escape(reason)}")
                for check in found.stress:
                    if check.verdict == "noted":
                        console.say(f"[yellow]noted[/] {name} {found.scheme}: `{check.name}`: {escape(check.why)}")
            for verdict in verdicts:
                if not verdict.candidates:
                    console.say(f"[yellow]{verdict.status}[/] {verdict.target.name}: {escape(verdict.reason)}")
        code = next((verdict.exit_code for verdict in verdicts if verdict.status == "failed"), 0)
        if code:
            raise typer.Exit(code)


def quantize(
    recipe: RecipeName,
    target: Targets = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say which operators stay in float, and why.")] = False,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Show every numeric form that was tried for a target: speed, accuracy, share of INT8, and what came of it."""
    from pipeline import candidates, summary

    with exported(root, recipe, None, target, 1) as (job, verdicts):
        tried = [one for verdict in verdicts for one in candidates.of(job, verdict)]
        if as_json:
            print(json.dumps([one.plain() for one in tried], indent=2))
        else:
            rows = [summary.candidate_row(one) for one in tried]
            console.table(summary.CANDIDATE_COLUMNS, rows, numbers=summary.CANDIDATE_NUMBERS)
            if explain:
                console.table(summary.SPEED_COLUMNS, summary.speed_rows(tried), numbers=summary.SPEED_NUMBERS)
                console.table(summary.FLOAT_COLUMNS, summary.float_rows(tried))
                console.table(
                    summary.SENSITIVE_COLUMNS, summary.sensitive_rows(tried), numbers=summary.SENSITIVE_NUMBERS
                )
            for verdict in verdicts:
                if explain or not candidates.of(job, verdict):
                    print(f"{verdict.target.name}: {verdict.scheme or verdict.status}: {verdict.reason}")
        warn(job)
        leave(verdicts)
