"""What people see: tables and progress on a terminal, plain text in a pipe. stdout is data, stderr is talk."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from pipeline.errors import ExportyardError
from pipeline.types import Reporter, no_report

PIPE_WIDTH = 240  # wide enough that no table cell is cut where there is no terminal
_READABLE = 40  # letters of a line that one reads without effort
_GAP = 2  # blanks between columns


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
    """Print a table on stdout; columns named in `numbers` are aligned to the right. Cells may hold markup.

    On a terminal that is too narrow for it, the last column goes below its row if it is text; then the first goes
    above; then each row becomes lines of names and values. So nothing is cut, and no number is broken.
    """
    if not rows:
        return
    out = console(sys.stdout)
    cells = [[Text.from_markup(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, (name, *(row[at].plain for row in cells)))) for at, name in enumerate(columns)]
    last_is_text = columns[-1] not in numbers
    least = min(widths[-1], _READABLE) if last_is_text else widths[-1]
    if not sys.stdout.isatty() or sum(widths[:-1]) + least + _GAP * len(columns) <= out.width:
        _whole(out, columns, rows, numbers)
        return
    below = len(columns) - 1 if last_is_text and len(columns) > 1 else len(columns)
    for above in (0, 1):
        lines = range(above, below)
        if lines and sum(widths[at] + _GAP for at in lines) + _GAP * above - _GAP <= out.width:
            _aligned(out, columns, cells, numbers, widths, above, below)
            return
    _stacked(out, columns, cells, below)


def _whole(out: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str]) -> None:
    drawn = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, header_style="bold")
    for at, column in enumerate(columns):
        side: Literal["left", "right"] = "right" if column in numbers else "left"
        drawn.add_column(column, justify=side, overflow="fold", no_wrap=sys.stdout.isatty() and at < len(columns) - 1)
    for row in rows:
        drawn.add_row(*row)
    out.print(drawn)


def _aligned(
    out: Console,
    columns: Sequence[str],
    cells: Sequence[Sequence[Text]],
    numbers: Sequence[str],
    widths: Sequence[int],
    above: int,
    below: int,
) -> None:
    """Columns from `above` to `below` side by side; those before on a line of their own, those after below them."""
    inset = " " * _GAP * above

    def line(row: Sequence[Text]) -> Text:
        parts = [Text(inset)]
        for at in range(above, below):
            cell = row[at].copy()
            space = " " * (widths[at] - cell.cell_len)
            right = columns[at] in numbers
            parts += [Text(space), cell] if right else [cell, Text(space)]
            parts.append(Text(" " * _GAP))
        found = Text("").join(parts)
        found.rstrip()
        return found

    head = line([Text(name, style="bold") for name in columns])
    out.print(head)
    group = ""
    for row in cells:
        if above and row[0].plain != group:
            group = row[0].plain
            out.print(row[0])
        if above == 0 or any(cell.plain for cell in row[above:below]):
            out.print(line(row))
        _tail(out, row[below:])


def _stacked(out: Console, columns: Sequence[str], cells: Sequence[Sequence[Text]], below: int) -> None:
    """Each row as lines of names and values; what is empty is left out."""
    group = ""
    for row in cells:
        if row[0].plain != group:
            group = row[0].plain
            out.print(row[0])
        line = Text()
        for name, cell in zip(columns[1:below], row[1:below], strict=True):
            part = Text(f"{name} ", style="dim").append_text(cell)
            if line and line.cell_len + _GAP + part.cell_len > out.width - _GAP:
                out.print(Padding(line, (0, 0, 0, _GAP), expand=False))
                line = Text()
            if cell.plain:
                line = Text(" " * _GAP).join([line, part]) if line else part
        if line:
            out.print(Padding(line, (0, 0, 0, _GAP), expand=False))
        _tail(out, row[below:])


def _tail(out: Console, rest: Sequence[Text]) -> None:
    for cell in rest:
        if cell.plain:
            out.print(Padding(cell, (0, 0, 0, 2 * _GAP), expand=False))


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
