"""Verdicts as people read them: rows of a table, and the report's page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from pipeline import console, host, store
from pipeline.choice import speed
from pipeline.types import Distance, LatencyReport, ParityReport, Scheme, SizeParity

if TYPE_CHECKING:
    from pipeline.job import Job
    from pipeline.run import Verdict

COLUMNS = ("target", "scheme", "size", "vs ONNX", "metric", "latency", "vs eager", "verdict")
NUMBERS = ("size", "vs ONNX", "metric", "latency", "vs eager")
PARITY_COLUMNS = (
    "target",
    "scheme",
    "sizes",
    "output",
    "vs ONNX",
    "max abs",
    "vs eager",
    "max abs ",
    "cosine",
    "agree",
)
PARITY_NUMBERS = PARITY_COLUMNS[4:]
COLOURS = {"passed": "green", "failed": "red", "not built here": "yellow", "not verified": "yellow"}


def row(verdict: Verdict) -> list[str]:
    """One line of the export table: parity is the worst SQNR over all sizes and outputs."""
    colour = COLOURS[verdict.status]
    told = f"[{colour}]{verdict.status}[/]: {escape(verdict.reason)}"
    if verdict.scheme is None or verdict.parity is None or verdict.latency is None or verdict.engine is None:
        return [verdict.target.name, "", "", "", "", "", "", told]
    metric = verdict.parity.metric
    first = verdict.latency.rows[0]
    return [
        verdict.target.name,
        verdict.scheme,
        console.size(verdict.engine.size_bytes),
        decibels(worst_sqnr_db(verdict.parity.sizes)),
        f"{metric.engine:.4f} ({metric.engine - metric.eager:+.4f})",
        f"{first.engines[verdict.scheme].median_ms:.3g} ms",
        f"{first.versus_eager[verdict.scheme].median:.2f}x",
        told,
    ]


def parity_rows(reports: Sequence[tuple[str, ParityReport]]) -> list[list[str]]:
    """One line for each target, scheme, combination of sizes and output."""
    rows = []
    for target, found in reports:
        for one in found.sizes:
            sizes = spell(one)
            if one.error is not None:
                rows.append([target, found.scheme, sizes, f"[red]{escape(one.error)}[/]", "", "", "", "", "", ""])
            for onnx, eager in zip(one.vs_onnx, one.vs_eager, strict=True):
                rows.append([target, found.scheme, sizes, onnx.output, *_numbers(onnx)[:2], *_numbers(eager)])
    return rows


def _numbers(found: Distance) -> list[str]:
    agree = "" if found.argmax_agreement is None else f"{found.argmax_agreement:.4f}"
    return [decibels(found.sqnr_db), f"{found.max_abs:.2g}", f"{found.cosine:.6f}", agree]


def spell(one: SizeParity) -> str:
    """Axis sizes on one line."""
    return " ".join(f"{name}={size}" for name, size in one.sizes.items()) or "fixed"


def worst_sqnr_db(sizes: Sequence[SizeParity]) -> float:
    """The least SQNR of an engine against its ONNX graph, over all sizes and all outputs that aren't indices."""
    found = [one.sqnr_db for at in sizes for one in at.vs_onnx if one.kind != "indices"]
    return min(found, default=math.inf)


def decibels(value: float) -> str:
    """An SQNR for a table; two equal tensors have no noise at all."""
    return "equal" if value == math.inf else "broken" if value == -math.inf else f"{value:.1f} dB"


def plain(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON data."""
    return {
        "target": verdict.target.name,
        "status": verdict.status,
        "scheme": verdict.scheme,
        "reason": verdict.reason,
        "engine": str(verdict.engine.path) if verdict.engine else None,
        "size_bytes": verdict.engine.size_bytes if verdict.engine else None,
        "parity": verdict.parity.plain() if verdict.parity else None,
        "latency": verdict.latency.plain() if verdict.latency else None,
        "left_out": dict(verdict.left_out),
        "candidates": {scheme: found.plain() for scheme, found in verdict.candidates.items()},
    }


def write_report(job: Job, verdicts: Sequence[Verdict]) -> Path:
    """Write ``report/index.html`` and ``report/report.json`` for the recipe; returns the page's path.

    The page stands alone: no script, no font and no picture comes from elsewhere.
    """
    from jinja2 import Environment

    text = (resources.files("pipeline") / "templates" / "report.html.j2").read_text()
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    folder = job.folder / "report"
    found = [plain(verdict) for verdict in verdicts]
    context: dict[str, Any] = {
        "recipe": job.recipe,
        "verdicts": verdicts,
        "rows": [_strip(row(verdict)) for verdict in verdicts],
        "columns": COLUMNS,
        "numbers": NUMBERS,
        "candidates": [line for verdict in verdicts for line in _candidates(verdict)],
        "parity_columns": [column.strip() for column in PARITY_COLUMNS],
        "parity_rows": [
            _strip(line)
            for verdict in verdicts
            for line in parity_rows([(verdict.target.name, item) for item in verdict.candidates.values()])
        ],
        "provenance": _provenance(job),
        "cpu": f"{host.cpu_name()}, {host.cpu_count()} threads",
        "good": sum(verdict.status == "passed" for verdict in verdicts),
        "bad": [verdict for verdict in verdicts if verdict.status == "failed"],
    }
    store.write_whole(folder / "report.json", store.json_text({"recipe": job.recipe.name, "targets": found}))
    store.write_whole(folder / "index.html", page.render(context))
    return folder / "index.html"


def _candidates(verdict: Verdict) -> list[list[str]]:
    """Every form that was tried for a target, with what came of it."""
    lines = []
    for scheme in verdict.target.schemes:
        if scheme in verdict.left_out:
            lines.append([verdict.target.name, scheme, "", "", "", verdict.left_out[scheme]])
        found = verdict.candidates.get(scheme)
        if found is None:
            continue
        timed = _latency(verdict.latency, scheme)
        outcome = (
            "chosen" if scheme == verdict.scheme else "within budget" if found.passed else "; ".join(found.reasons)
        )
        metric = f"{found.metric.engine:.4f} ({found.metric.engine - found.metric.eager:+.4f})"
        lines.append([verdict.target.name, scheme, metric, *timed, outcome])
    return lines


def _latency(latency: LatencyReport | None, scheme: Scheme) -> list[str]:
    if latency is None or scheme not in latency.rows[0].engines:
        return ["", ""]
    middle = ", ".join(f"{at.engines[scheme].median_ms:.3g}" for at in latency.rows)
    return [f"{middle} ms", f"{speed(latency, scheme):.2f}x"]


def _provenance(job: Job) -> list[tuple[str, str]]:
    found = []
    for step in ("checkpoint", "data", "program", "onnx/fp32"):
        made = job.made.get(step)
        if made is not None:
            tools = ", ".join(f"{name} {version}" for name, version in made.stored.artifact.tools.items())
            found.append((step, f"{made.stored.digest[:16]} · {tools}" if tools else made.stored.digest[:16]))
    return found


def _strip(cells: list[str]) -> list[str]:
    """Cells without the markup that colours them on a terminal."""
    from rich.text import Text

    return [Text.from_markup(cell).plain for cell in cells]
