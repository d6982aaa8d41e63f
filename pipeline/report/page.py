"""The report's page: all of it comes from ``report.json``, so that whoever has the data can draw the page again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup

from pipeline.report import pictures as report_pictures
from pipeline.report import spots
from pipeline.report.data import Report
from pipeline.report.spots import Spot

TEMPLATES = ("report.html.j2", "report_tables.html.j2", "report_details.html.j2", "report.css")
_CLEAN_DB = 140.0  # about where float32 ends: 24 bits are 144 dB


def source(name: str) -> str:
    """The text of one of `TEMPLATES`."""
    return (resources.files("pipeline") / "templates" / name).read_text()


def page(report: Report) -> str:
    """The whole page."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    pages = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        loader=DictLoader({name: source(name) for name in TEMPLATES}),
    )
    pages.filters |= spots.FILTERS
    pages.filters |= {"sizes": spots.sizes, "short": spots.short, "breakable": spots.breakable}
    pages.filters |= {"threads": _threads, "heat": _heat, "histogram": _histogram}
    pages.globals |= {"maps": maps, "common": _common}
    return pages.get_template(TEMPLATES[0]).render(
        data=Spot(report.plain()),
        style=Markup(source("report.css")),  # noqa: S704  ours
        pictures=report_pictures.pictures(report),
    )


def _threads(count: Spot) -> Markup:
    return spots.shown(count, f"{count.raw} thread{'s' if count.raw > 1 else ''}")


def _histogram(counts: Spot) -> Markup:
    return report_pictures.histogram(counts.raw)


def _heat(spot: Spot) -> str:
    """How dark a cell is, in percent: nothing at `_CLEAN_DB`, all of it where noise is as large as the signal."""
    if spot.raw is None:
        return "0"
    return f"{100 * (1 - min(max(spot.as_number, 0.0), _CLEAN_DB) / _CLEAN_DB):.0f}"


def _common(operators: Spot) -> str:
    return report_pictures.common([one.module.raw for one in operators])


@dataclass(frozen=True)
class Map:
    """Parity by axis sizes, to be drawn as a table of cells.

    Attributes:
        title: of a map that is of one form; empty where its rows are forms.
        columns: what the columns are, in words.
        rows: of each row its name, the target that it begins a group with, and its cells; None where nothing was run.
    """

    title: str
    passed: bool
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[Spot | None, ...]], ...]


def maps(data: Spot) -> list[Map]:
    """A grid for each form of a model with two axes; else one table, with a row for each form."""
    found = [*data.parity]
    axes = list(dict.fromkeys(name for one in found for cell in one.cells for name in cell.sizes.raw))
    if len(axes) == 2:
        return [_grid(one, *axes) for one in found]
    return [_strips(found)] if found else []


def _grid(one: Spot, down: str, across: str) -> Map:
    cells = {(cell.sizes.raw[down], cell.sizes.raw[across]): cell for cell in one.cells}
    columns = sorted({size for _, size in cells})
    rows = sorted({size for size, _ in cells})
    return Map(
        title=f"{one.target} {one.scheme}",
        passed=one.passed.raw,
        corner=f"{down} \\ {across}",
        columns=tuple(map(str, columns)),
        rows=tuple((str(row), "", tuple(cells.get((row, column)) for column in columns)) for row in rows),
    )


def _strips(found: Sequence[Spot]) -> Map:
    each = {tuple(cell.sizes.raw.items()): None for one in found for cell in one.cells}
    places = sorted(each, key=lambda sizes: [size for _, size in sizes])
    return Map(
        title="",
        passed=True,
        corner="",
        columns=tuple(" ".join(f"{name}={size}" for name, size in sizes) or "fixed" for sizes in places),
        rows=tuple(_strip_rows(found, places)),
    )


def _strip_rows(
    found: Sequence[Spot], places: Sequence[tuple[tuple[str, int], ...]]
) -> Iterator[tuple[str, str, tuple[Spot | None, ...]]]:
    last = ""
    for one in found:
        cells = {tuple(cell.sizes.raw.items()): cell for cell in one.cells}
        target = one.target.raw
        yield one.scheme.raw, target if target != last else "", tuple(cells.get(place) for place in places)
        last = target
