"""What people see: tables and progress on a terminal, plain text in a pipe. stdout is data, stderr is talk."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from pipeline.errors import ExportyardError
from pipeline.types import Reporter, no_report

PIPE_WIDTH = 240  # wide enough that no table cell is cut where there is no terminal


def console(stream: TextIO) -> Console:
    """A console on `stream`; NO_COLOR and dumb terminals are respected."""
    return Console(
        file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False, soft_wrap=not stream.isatty()
    )


def fail(error: ExportyardError) -> int:
    """Print an error and its hint on stderr; returns the exit code."""
    out = console(sys.stderr)
    out.print(f"[bold red]error:[/] {escape(error.message)}")
    if error.hint is not None:
        out.print(f"\n[bold cyan]hint:[/] {escape(error.hint)}")
    return error.exit_code


class Steps:
    """Prints a line for each step that did something, and counts those that had nothing to do."""

    def __init__(self) -> None:
        self._out = console(sys.stderr)
        self.cached = 0
        self.worked = 0
        self._seen: set[str] = set()

    def __call__(self, step: str, state: str, seconds: float, /) -> None:
        """A `run.Watcher`."""
        if step in self._seen:
            return
        self._seen.add(step)
        if state == "cached":
            self.cached += 1
            return
        self.worked += 1
        colour = {"built": "green", "failed": "red"}.get(state, "yellow")
        time = f"{seconds:8.1f} s" if seconds else " " * 10
        self._out.print(f"  {time}  {escape(step):<58} [{colour}]{escape(state)}[/]")

    def close(self) -> None:
        """Say how much there was to do."""
        if self.worked == 0:
            self._out.print(f"nothing to do: {self.cached} steps are up to date")
        elif self.cached:
            self._out.print(f"  {self.cached} steps were up to date")


@contextmanager
def progress() -> Iterator[Reporter]:
    """A reporter that draws a bar on a terminal, and nothing in a pipe."""
    if not sys.stderr.isatty():
        yield no_report
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    with Progress(*columns, console=console(sys.stderr), transient=True) as bars:
        task = bars.add_task("", total=None, visible=False)

        def report(done: int, total: int, what: str, /) -> None:
            bars.update(task, description=what, completed=done, total=total or None, visible=done < total)

        yield report


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[str] = ()) -> None:
    """Print a table on stdout; columns named in `numbers` are aligned to the right. Cells may hold markup."""
    if not rows:
        return
    drawn = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    console(sys.stdout).print(drawn)


def say(text: str) -> None:
    """A line of talk on stderr; may hold markup."""
    console(sys.stderr).print(text)


def size(number: int) -> str:
    """A size in bytes as people read it: ``91.2 MB``."""
    value = float(number)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
