"""The report: one page for a recipe that stands alone, and the same data as JSON."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import candidates, digest, failures, host, pictures, store, summary
from pipeline.candidates import Candidate

if TYPE_CHECKING:
    from pipeline.job import Job
    from pipeline.run import Verdict

PAGE, DATA = "index.html", "report.json"


def write(job: Job, verdicts: Sequence[Verdict]) -> Path:
    """Write ``report/index.html`` and ``report/report.json`` for the recipe; returns the page's path.

    All of the page comes from the data, so that a page whose data are the same is not drawn again. No script, no font
    and no picture comes from elsewhere.
    """
    text = (resources.files("pipeline") / "templates" / "report.html.j2").read_text()
    folder = job.folder / "report"
    tried = [one for verdict in verdicts for one in candidates.of(job, verdict)]
    data = {
        "recipe": job.recipe.name,
        "targets": [summary.plain(verdict) for verdict in verdicts],
        "failures": [one.plain() for one in failures.of(job, verdicts)],
        "blocking": dict(failures.blocking(verdicts, job.recipe.require)),
        "tried": [one.plain() for one in tried],
        "warnings": job.warnings(),
        "provenance": _provenance(job),
        "cpu": f"{host.cpu_name()}, {host.cpu_count()} threads",
        "template": digest.of_bytes(text.encode()),
    }
    written = store.json_text(data)
    if not _is(folder / DATA, written) or not (folder / PAGE).is_file():
        # the data last: they say that the page is theirs
        (folder / DATA).unlink(missing_ok=True)
        store.write_whole(folder / PAGE, _page(text, job, verdicts, tried, data))
        store.write_whole(folder / DATA, written)
    return folder / PAGE


def _is(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except (OSError, UnicodeDecodeError):
        return False


def _page(text: str, job: Job, verdicts: Sequence[Verdict], tried: Sequence[Candidate], data: dict[str, Any]) -> str:
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    parities = [(verdict.target.name, found) for verdict in verdicts for found in verdict.candidates.values()]
    return page.render(
        recipe=job.recipe,
        verdicts=verdicts,
        rows=[_strip(summary.row(verdict)) for verdict in verdicts],
        columns=summary.COLUMNS,
        numbers=summary.NUMBERS,
        candidate_columns=summary.CANDIDATE_COLUMNS,
        candidate_numbers=summary.CANDIDATE_NUMBERS,
        candidate_groups=_groups([summary.candidate_row(one) for one in tried]),
        speed_columns=summary.SPEED_COLUMNS,
        speed_numbers=summary.SPEED_NUMBERS,
        speed_groups=_groups(summary.speed_rows(tried)),
        sensitive_columns=summary.SENSITIVE_COLUMNS,
        sensitive_numbers=summary.SENSITIVE_NUMBERS,
        sensitive_groups=_groups(summary.sensitive_rows(tried)),
        float_columns=summary.FLOAT_COLUMNS,
        float_groups=_groups(summary.float_rows(tried)),
        not_audited=_not_audited(tried),
        pictures=[_picture(job, place, verdict, tried) for place, verdict in enumerate(verdicts) if _drawable(verdict)],
        parity_columns=[column.strip() for column in summary.PARITY_COLUMNS],
        parity_groups=_groups(summary.parity_rows(parities)),
        good=sum(verdict.status == "passed" for verdict in verdicts),
        **{name: data[name] for name in ("failures", "blocking", "warnings", "provenance", "cpu")},
    )


def _groups(rows: Sequence[list[str]]) -> list[tuple[str, list[list[str]]]]:
    """Rows by target, which is what is in their first cells; in the order they come in, without markup."""
    plain = [_strip(row) for row in rows]
    return [(target, list(found)) for target, found in itertools.groupby(plain, key=lambda row: row[0])]


def _not_audited(tried: Sequence[Candidate]) -> list[str]:
    """Why some engines were not audited, one line a target."""
    return list(dict.fromkeys(f"{one.target}: {one.not_audited}" for one in tried if one.not_audited is not None))


def _drawable(verdict: Verdict) -> bool:
    """Whether there is something to compare in a picture."""
    return len(verdict.candidates) > 1


def _picture(job: Job, place: int, verdict: Verdict, tried: Sequence[Candidate]) -> dict[str, str]:
    shown = [one for one in tried if one.target == verdict.target.name and one.metric is not None]
    metric = next(iter(verdict.candidates.values())).metric
    timed = next((one.speeds[0] for one in shown if one.speeds), None)
    fall = metric.budget if job.recipe.evaluation.higher_is_better else -metric.budget
    svg = pictures.tradeoff(
        [
            pictures.Point(
                label=one.scheme,
                latency_ms=one.speeds[0].median_ms if one.speeds else None,
                metric=one.metric or 0.0,
                passed=verdict.candidates[one.scheme].passed,
                chosen=one.chosen,
            )
            for one in shown
        ],
        eager=metric.eager,
        budget=metric.eager - fall,
        metric=metric.name,
        latency="latency in ms" if timed is None else f"latency in ms ({summary.timing(timed)})",
        name=f"picture-{place}",
    )
    return {"target": verdict.target.name, "svg": svg, "reason": verdict.reason}


def _provenance(job: Job) -> list[list[str]]:
    found = []
    for step in ("checkpoint", "data", "program", "onnx/fp32"):
        made = job.made.get(step)
        if made is not None:
            tools = ", ".join(f"{name} {version}" for name, version in sorted(made.stored.artifact.tools.items()))
            found.append([step, f"{made.stored.digest[:16]} · {tools}" if tools else made.stored.digest[:16]])
    return found


def _strip(cells: list[str]) -> list[str]:
    """Cells without the markup that colours them on a terminal."""
    from rich.text import Text

    return [Text.from_markup(cell).plain for cell in cells]
