"""Command `profile`: where an engine's time goes, and where compilers of PyTorch stop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.markup import escape

from pipeline import console, shares
from pipeline.commands.options import HERE, AsJson, Folder, RecipeName, Targets, exported, leave
from pipeline.errors import unknown
from pipeline.types import Compilation, Place, Profile, ProfileReport, Sizes

if TYPE_CHECKING:
    from pipeline.job import Job
    from pipeline.run import Verdict

FILE = "profile.json"
SLOWEST = 10  # operators shown; `--json` has all
MOST = 20  # modules shown
PLACE_COLUMNS = ("what", "sizes", "reason", "where", "what to do")


class By(StrEnum):
    """What a profile is added up by."""

    MODULE = "module"
    OPERATOR = "operator"


def profile(
    recipe: RecipeName,
    target: Targets = None,
    by: Annotated[By, typer.Option("--by", help="What times are added up by.")] = By.MODULE,
    depth: Annotated[
        Optional[int],  # noqa: UP045  see pipeline.commands.options
        typer.Option("--depth", min=1, metavar="N", help="Modules as deep as this (default: the innermost)."),
    ] = None,
    scheme: Annotated[
        Optional[str],  # noqa: UP045  likewise
        typer.Option("--scheme", metavar="S", help="Numeric form (default: the chosen one)."),
    ] = None,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Show which modules and operators take the time, and where torch.compile breaks the model or compiles again."""
    with exported(root, recipe, None, target, 1) as (job, verdicts):
        reports = [(verdict, report_of(job, verdict)) for verdict in verdicts]
        with console.progress() as tell:
            tell(0, 0, "what torch.compile would make of the model")
            compiled = job.compilation_report()
        if as_json:
            profiled = [report.plain() for _, report in reports if report is not None]
            print(json.dumps({"compilation": compiled.plain(), "profiles": profiled}, indent=2))
        else:
            for verdict, report in reports:
                _show_target(verdict, report, scheme, by, depth)
            _show_compilation(compiled)
        leave(verdicts)


def report_of(job: Job, verdict: Verdict) -> ProfileReport | None:
    """The profiles of a target's candidates; None where there are none."""
    made = job.made.get(f"latency/{verdict.built_for or verdict.target.name}")
    if made is None or FILE not in made.stored.artifact.files:
        return None
    return ProfileReport.model_validate_json(made.stored.file(FILE).read_text())


def _show_target(verdict: Verdict, report: ProfileReport | None, scheme: str | None, by: By, depth: int | None) -> None:
    name = verdict.target.name
    if report is None:
        why = "its backend has no profiler" if verdict.latency is not None else f"{verdict.status}: {verdict.reason}"
        console.say(f"[yellow]not profiled[/] {name}: {escape(why)}{_graph_breaks(verdict)}")
        return
    profiles = {one.scheme: one for one in report.profiles}
    wanted = scheme or verdict.scheme or report.profiles[0].scheme
    if wanted not in profiles:
        raise unknown("scheme", wanted, profiles, where=f"the candidates of `{name}`")
    chosen = profiles[wanted]
    if chosen.not_profiled is not None:
        console.say(f"[yellow]not profiled[/] {name} {wanted}: {escape(chosen.not_profiled)}")
        return
    print(headline(name, chosen))
    columns, rows = share_rows(chosen, by, depth)
    _table(columns, rows, columns[1:])
    columns, rows = slowest_rows(chosen)
    _table(columns, rows, columns[4:])


def _graph_breaks(verdict: Verdict) -> str:
    """What an engine that was built from a program knows of its graph."""
    count = verdict.engine.artifact.facts.get("graph_breaks") if verdict.engine is not None else None
    return f"; {_count(count, 'graph break')} in its program" if isinstance(count, int) else ""


def headline(name: str, profile: Profile) -> str:
    """What was profiled, and how its sum compares with a call."""
    at = ", ".join(f"{axis}={size}" for axis, size in profile.sizes.items())
    return (
        f"{name} {profile.scheme} at {at or 'its only size'}, {profile.threads} thread, {profile.calls} calls: "
        f"operators {profile.operators_ms:.3g} ms; "
        f"a call {profile.plain_ms:.3g} ms, {profile.call_ms:.3g} ms while profiled"
    )


def share_rows(profile: Profile, by: By, depth: int | None) -> tuple[Sequence[str], list[list[str]]]:
    """Columns and rows of times added up; those beyond `MOST` are one row."""
    found = shares.by_module(profile, depth) if by is By.MODULE else shares.by_operator(profile)
    shown, rest = found[:MOST], found[MOST:]
    rows = [[one.name, str(one.operators), f"{one.ms:.3g}", f"{one.share:.1%}"] for one in shown]
    if rest:
        total = sum(one.ms for one in rest), sum(one.share for one in rest)
        rows.append(
            [f"{len(rest)} more", str(sum(one.operators for one in rest)), f"{total[0]:.3g}", f"{total[1]:.1%}"]
        )
    return (by.value, "operators", "ms", "of time"), rows


def slowest_rows(profile: Profile) -> tuple[Sequence[str], list[list[str]]]:
    """Columns and rows of the operators that take most time."""
    rows = [
        [row.operator, row.name, shares.module_of(row), row.line, f"{row.ms:.3g}", f"{share:.1%}"]
        for row, share in shares.slowest(profile, SLOWEST)
    ]
    return ("operator", "name", "module", "line", "ms", "of time"), rows


def _show_compilation(found: Compilation) -> None:
    print(compilation_line(found))
    _table(PLACE_COLUMNS, [*place_rows(found)])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> None:
    console.table(columns, [[escape(cell) for cell in row] for row in rows], numbers=numbers)


def compilation_line(found: Compilation) -> str:
    """What torch.compile would make of the model, in one line."""
    if found.not_followed is not None:
        return f"torch.compile can't follow the model: {found.not_followed}"
    at = "; ".join(_sizes(sizes) for sizes in found.sizes)
    return (
        f"torch.compile: {_count(found.graphs, 'graph')}, {_count(len(found.graph_breaks), 'graph break')}, "
        f"{_count(len(found.recompilations), 'recompilation')} at {at}"
    )


def place_rows(found: Compilation) -> Iterator[list[str]]:
    """A row for each graph break, recompilation and guard."""
    for what, places in (
        ("graph break", found.graph_breaks),
        ("recompilation", found.recompilations),
        ("guard at capture", found.guards),
    ):
        yield from (_place_row(what, place) for place in places)


def _place_row(what: str, place: Place) -> list[str]:
    return [what, _sizes(place.sizes), place.reason, place.line, place.advice]


def _sizes(sizes: Sizes) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
