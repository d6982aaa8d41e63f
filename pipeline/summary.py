"""Verdicts as people read them: rows of tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from pipeline import candidates, console
from pipeline.candidates import Candidate
from pipeline.types import Distance, LatencyReport, ParityReport, Scheme, SizeParity, Speed

if TYPE_CHECKING:
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
CANDIDATE_COLUMNS = (
    "target",
    "scheme",
    "ranges",
    "float ops",
    "size",
    "metric",
    "drop",
    "SQNR",
    "cosine",
    "latency",
    "vs fp32",
    "in int8",
    "outcome",
)
CANDIDATE_NUMBERS = CANDIDATE_COLUMNS[3:12]
SPEED_COLUMNS = ("target", "scheme", "timed at", "latency", "vs fp32")
SPEED_NUMBERS = SPEED_COLUMNS[3:]
SENSITIVE_COLUMNS = ("target", "scheme", "rank", "operator", "module", "own SQNR", "of compute")
SENSITIVE_NUMBERS = ("rank", "own SQNR", "of compute")
MOST_SENSITIVE = 10
FLOAT_COLUMNS = ("target", "scheme", "in float", "why")
COLOURS = {"passed": "green", "failed": "red", "not built here": "yellow", "not verified": "yellow"}


def row(verdict: Verdict) -> list[str]:
    """One line of the export table: parity is the worst SQNR over all sizes and outputs."""
    colour = COLOURS[verdict.status]
    told = f"[{colour}]{verdict.status}[/]: {escape(verdict.reason)}"
    if verdict.scheme is None or verdict.parity is None or verdict.latency is None or verdict.engine is None:
        return [verdict.target.name, "", "", "", "", "", "", told]
    metric = verdict.parity.metric
    return [
        verdict.target.name,
        verdict.scheme,
        console.size(verdict.engine.size_bytes),
        decibels(worst_sqnr_db(verdict.parity.sizes)),
        f"{metric.engine:.4f} ({metric.engine - metric.eager:+.4f})",
        *_speed(verdict.latency, verdict.scheme),
        told,
    ]


def _speed(latency: LatencyReport, scheme: Scheme) -> list[str]:
    """Time of one call at the first timing, and how many times faster than eager PyTorch that is, as far as known."""
    if not latency.rows:
        return ["not measured", ""]
    first = latency.rows[0]
    ratio = f"{first.versus_eager[scheme].median:.2f}x" if first.versus_eager else ""
    return [f"{first.engines[scheme].median_ms:.3g} ms", ratio]


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


def candidate_row(one: Candidate) -> list[str]:
    """One line of the table of candidates; what wasn't found out stays empty."""
    colour = "green" if one.chosen else "dim"
    ratio = candidates.versus_fp32(one)
    inside = f"{len(one.left_in_float) + len(one.fell_back)}" if one.scheme.startswith("int8") else ""
    return [
        one.target,
        one.scheme,
        one.method or "",
        inside if one.size_bytes is not None else "",
        console.size(one.size_bytes) if one.size_bytes is not None else "",
        _fixed(one.metric, 4),
        "" if one.drop is None else f"{one.drop:+.4f} of {one.budget:g}",
        decibels(one.sqnr_db) if one.sqnr_db is not None else "",
        _fixed(one.cosine, 6),
        f"{one.speeds[0].median_ms:.3g} ms" if one.speeds else "",
        f"{ratio:.2f}x" if ratio is not None else "",
        share(one),
        f"[{colour}]{escape(one.outcome)}[/]",
    ]


def speed_rows(tried: Sequence[Candidate]) -> list[list[str]]:
    """One line for each timing of each candidate."""
    return [
        [
            one.target,
            one.scheme,
            timing(speed),
            f"{speed.median_ms:.3g} ms",
            "" if speed.versus_fp32 is None else f"{speed.versus_fp32:.2f}x",
        ]
        for one in tried
        for speed in one.speeds
    ]


def float_rows(tried: Sequence[Candidate]) -> list[list[str]]:
    """One line for each operator that multiplies in float in an INT8 form, those that fell back first."""
    return [
        [
            one.target,
            one.scheme,
            escape(f"{found.module} ({found.node})" if found.module else found.node),
            escape(found.why),
        ]
        for one in tried
        for found in (*one.fell_back, *one.left_in_float)
    ]


def sensitive_rows(tried: Sequence[Candidate]) -> list[list[str]]:
    """The operators that 8 bits cost most, of each form that was searched for them."""
    return [
        [
            one.target,
            one.scheme,
            str(rank),
            escape(found.operator or found.node),
            escape(found.module or found.node),
            decibels(found.sqnr_db),
            "" if found.macs_share is None else f"{found.macs_share:.1%}",
        ]
        for one in tried
        for rank, found in enumerate(one.sensitive[:MOST_SENSITIVE], start=1)
    ]


def share(one: Candidate) -> str:
    """The share of compute that runs in INT8, or that it isn't known; nothing for an engine that was not built."""
    if one.int8_share is not None:
        return f"{one.int8_share:.1%}"
    return "not audited" if one.not_audited is not None else ""


def timing(speed: Speed) -> str:
    """What one timing was taken at: ``batch=1 seq=64, 2 threads``."""
    sizes = " ".join(f"{name}={size}" for name, size in speed.sizes.items())
    threads = f"{speed.threads} thread{'s' if speed.threads > 1 else ''}"
    return f"{sizes}, {threads}" if sizes else threads


def _fixed(value: float | None, digits: int, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.{digits}f}"


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
        "audits": {scheme: found.plain() for scheme, found in verdict.audits.items()},
    }
