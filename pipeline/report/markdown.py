"""The report in short, as Markdown: for a pull request, a chat, or the page of a Prefect server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline import console
from pipeline.report.data import Report, Since, TargetLine
from pipeline.report.spots import decibels, fixed, milliseconds, percent, signed, times

_STATES = {
    "ready": "✅ Ready for release",
    "worse": "❌ Not ready for release",
    "not ready": "❌ Not ready for release",
    "nothing": "⚪ Nothing to release",
}
_MARKS = {"passed": "✅", "failed": "❌"}


def markdown(report: Report) -> str:
    """All of it."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    verdict = report.verdict
    yield f"# {_cell(report.recipe)}: {_STATES[verdict.state]}"
    yield ""
    yield f"{_text(verdict.told)} Last release: {_text(report.release.told)}."
    yield ""
    yield from (f"- {_text(text) if '`' in text else f'`{text}`'}" for text in verdict.next)
    yield ""
    columns = ["target", "scheme", "size", "latency", "vs eager", report.metric, "parity", "budget used"]
    yield from _table(columns, [_target(line) for line in report.targets])
    yield ""
    yield from (
        f"- {_MARKS.get(line.status, '⚪')} **{_cell(line.target)}** {line.status}: {_text(line.reason)}"
        for line in report.targets
    )
    yield from _departures(report)
    if report.release.targets and not all(one.same for one in report.release.targets):
        yield ""
        yield f"## Since {_cell(report.release.tag or '')}"
        yield ""
        yield from _table(
            ["target", report.metric, "latency", "size", "verdict"], [_since(one) for one in report.release.targets]
        )
    if report.warnings:
        yield ""
        yield from (f"> **Warning:** {_text(text)}" for text in report.warnings)


def _target(line: TargetLine) -> list[str]:
    speed, metric = line.speed, line.metric
    use = None if line.tightest is None else line.uses[line.tightest]
    return [
        line.target,
        line.scheme or "",
        "" if line.size_bytes is None else console.size(line.size_bytes),
        "" if speed is None else milliseconds(speed.time.median_ms),
        "" if speed is None or speed.versus_eager is None else times(speed.versus_eager.median),
        "" if metric is None else f"{fixed(metric.engine)} ({signed(-metric.drop)})",
        "" if line.onnx_db is None else decibels(line.onnx_db),
        "" if use is None or use.share is None else f"{percent(use.share)} ({use.bound})",
    ]


def _departures(report: Report) -> Iterator[str]:
    for found in report.explanations:
        for one in found.departures[:1]:
            where = " at ".join(f"`{part}`" for part in (one.module, one.line) if part)
            yield (
                f"- **{_cell(found.target)}** {found.scheme}: first departs at {one.operator} {where}: "
                f"{_text(one.kind)}. {_text(one.suggestion)}"
            )


def _since(one: Since) -> list[str]:
    before, after = one.before, one.after
    if before is None or after is None:
        return [one.target, "", "", "", "new" if before is None else "gone"]
    return [
        one.target,
        f"{fixed(before.metric)} → {fixed(after.metric)}",
        one.not_compared or "" if one.time_ratio is None else f"{times(one.time_ratio)} of the time",
        f"{console.size(before.size_bytes)} → {console.size(after.size_bytes)}",
        "; ".join(one.regressions) or ("same files" if one.same else "ok"),
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (columns, ["---"] * len(columns), *rows):
        yield "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    """Text that can't end a cell, or begin markup."""
    return _text(text).replace("|", "\\|")


def _text(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")
