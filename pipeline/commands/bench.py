"""Command `bench`: engines timed against what users would run without them."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.markup import escape

from pipeline import console, host, store, targets
from pipeline.commands.options import HERE, AsJson, Folder, RecipeName, Targets, exported, leave, short
from pipeline.errors import UsageError
from pipeline.types import Bench, BenchRow, Ratio, Timing, WarmUp

if TYPE_CHECKING:
    from pipeline.job import Job
    from pipeline.run import Verdict
    from pipeline.store import Stored
    from pipeline.types import Scheme, Target

FILE = "bench/bench.json"
WARM_UP_COLUMNS = (
    *("before timing", "threads", "build or load", "first calls"),
    *("graphs", "graph breaks", "recompiled", "vs eager"),
)


def bench(
    recipe: RecipeName,
    target: Targets = None,
    threads: Annotated[
        Optional[list[int]],  # noqa: UP045  see pipeline.commands.options
        typer.Option("--threads", metavar="N", help="Threads of a runner (default: 1, and every core); repeatable."),
    ] = None,
    seconds: Annotated[
        Optional[float],  # noqa: UP045  likewise
        typer.Option("--seconds", metavar="S", help="Timing of each runner at each sizes and threads (default: 1)."),
    ] = None,
    baseline: Annotated[
        Optional[str],  # noqa: UP045  likewise
        typer.Option(
            "--baseline",
            metavar="B,B",
            help="eager, compile, max-autotune, max-autotune-freezing, aotinductor; or none (default: all).",
        ),
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Keep threads on as many cores (hurts OpenVINO).")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every candidate of a target, not only the chosen one.")] = False,
    root: Folder = HERE,
    as_json: AsJson = False,
) -> None:
    """Time engines against eager PyTorch, torch.compile and AOTInductor, turn by turn in one run."""
    counts = checked_threads(threads)
    budget = checked_seconds(seconds)
    with exported(root, recipe, None, target, 1) as (job, verdicts):
        from pipeline import baselines
        from pipeline.stages import bench as stage

        engines, left_out = contenders(job, verdicts, every=every)
        asked = stage.Asked(
            recipe=job.recipe,
            checkpoint=job.checkpoint().stored,
            program=job.program().stored,
            engines=engines,
            names=baselines.chosen(baseline),
            threads=counts,
            seconds=budget,
            pin=pin,
        )
        with console.progress() as report, tempfile.TemporaryDirectory(prefix="exportyard-") as folder:
            found = stage.bench(asked, Path(folder), report)
        found = found.model_copy(update={"left_out": {**left_out, **found.left_out}})
        path = job.folder / FILE
        store.write_whole(path, store.json_text(found.plain()))
        if as_json:
            print(json.dumps(found.plain(), indent=2))
        else:
            _show(found)
            console.say(f"written: {escape(short(path))}")
        leave(verdicts)


def checked_threads(given: Sequence[int] | None) -> list[int]:
    """Numbers of threads, ascending.

    Raises:
        UsageError: one is below 1, or above the cores that there are.
    """
    most = host.cpu_count()
    for count in given or ():
        if not 1 <= count <= most:
            raise UsageError(
                f"`--threads {count}`: this process may use {most} cores", hint=f"expected 1 to {most}; more would wait"
            )
    return sorted(set(given)) if given else sorted({1, most})


def checked_seconds(given: float | None) -> float:
    """Seconds for each runner.

    Raises:
        UsageError: not above 0.
    """
    if given is not None and not 0 < given < float("inf"):
        raise UsageError(f"`--seconds {given:g}`", hint="expected a number of seconds above 0")
    return host.measure_s() if given is None else given


def contenders(
    job: Job, verdicts: Sequence[Verdict], *, every: bool
) -> tuple[dict[str, tuple[Stored, Target]], dict[str, str]]:
    """The engines to time, by what the result calls them; and what isn't timed, with the reason."""
    engines: dict[str, tuple[Stored, Target]] = {}
    left_out: dict[str, str] = {}
    rows = {row.target.name: row for verdict in verdicts for row in (verdict.rows or (verdict,))}
    for name, verdict in rows.items():
        schemes: list[Scheme] = list(verdict.candidates) if every else [verdict.scheme] if verdict.scheme else []
        if verdict.target.device is not None:
            left_out[name] = "its engines run on a device, where `exportyard export` times them"
        elif not schemes or job.not_runnable(verdict.target) is not None:
            left_out[name] = f"{verdict.status}: {verdict.reason}"
        elif (emulated := targets.not_measured(verdict.target)) is not None:
            left_out[name] = emulated
        else:
            for scheme in schemes:
                engines[f"{name} {scheme}"] = (job.engine(verdict.target, scheme).stored, verdict.target)
    return engines, left_out


def _show(found: Bench) -> None:
    print(machine_line(found))
    for text in found.warnings:
        console.say(f"[yellow]warning:[/] {escape(text)}")
    columns = ["runner", *(_column(row) for row in found.rows)]
    for title, cells in (
        ("median ms (p25-p75)", _times(found)),
        ("times as fast as eager", _ratios(found, [row.versus_eager for row in found.rows])),
        ("times as fast as torch.compile", _ratios(found, [row.versus_compile for row in found.rows])),
    ):
        rows = [[escape(cell) for cell in line] for line in cells]
        if rows:
            console.table([title, *columns[1:]], rows, numbers=columns[1:])
    rows = [[escape(cell) for cell in warm_up_row(one)] for one in found.warm_ups]
    console.table(WARM_UP_COLUMNS, rows, numbers=WARM_UP_COLUMNS[1:])
    for name, reason in found.left_out.items():
        console.say(f"[yellow]left out[/] {escape(name)}: {escape(reason)}")


def machine_line(found: Bench) -> str:
    """On what it was measured, in one line."""
    one = found.machine
    clock = f"governor {one.governor or 'not told'}, turbo {'not told' if one.turbo is None else _switch(one.turbo)}"
    loads = f"load average {_number(one.load_before)} before, {_number(one.load_after)} after"
    pinned = any(row.pinned for row in found.rows)
    return (
        f"{one.cpu}, {one.cores} cores, {clock}, {loads}, other work {_number(one.others)} cores; "
        f"threads {'kept on as many cores' if pinned else 'free to move'}, {found.seconds:g} s for each runner"
    )


def _switch(on: bool) -> str:
    return "on" if on else "off"


def _number(value: float | None) -> str:
    return "not told" if value is None else f"{value:.2f}"


def _column(row: BenchRow) -> str:
    sizes = ", ".join(f"{axis}={size}" for axis, size in row.sizes.items())
    return f"{sizes}\n{row.threads} thread{'' if row.threads == 1 else 's'}"


def _runners(found: Bench) -> list[str]:
    return list(dict.fromkeys(name for row in found.rows for name in row.times))


def _times(found: Bench) -> Iterator[list[str]]:
    for name in _runners(found):
        yield [name, *(_time(row.times.get(name)) for row in found.rows)]


def _time(found: Timing | None) -> str:
    return "" if found is None else f"{found.median_ms:.3g} ({found.p25_ms:.3g}-{found.p75_ms:.3g})"


def _ratios(found: Bench, rows: Sequence[Mapping[str, Ratio]]) -> Iterator[list[str]]:
    if not any(rows):
        return
    for name in _runners(found):
        yield [name, *(f"{row[name].median:.2f}" if name in row else "" for row in rows)]


def warm_up_row(one: WarmUp) -> list[str]:
    """One line of what a runner took before it was timed."""
    counts = ("" if count is None else str(count) for count in (one.graphs, one.graph_breaks, one.recompilations))
    close = "" if one.sqnr_db is None else "equal" if one.sqnr_db == math.inf else f"{one.sqnr_db:.1f} dB"
    return [one.runner, str(one.threads), f"{one.build_s:.2f} s", f"{one.first_s:.2f} s", *counts, close]
