"""The report: one page for a recipe that stands alone, the same data as JSON and as Markdown, and a picture for a chat.

It is an artifact as others are: made again when what it says has changed, whole or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from pipeline import digest, host, store, timeline
from pipeline.report import collect, markdown
from pipeline.report.data import Report
from pipeline.store import Key

if TYPE_CHECKING:
    from pipeline.job import Job
    from pipeline.run import Verdict

PAGE, DATA, MARKDOWN, PICTURE = "index.html", "report.json", "report.md", "tradeoff.png"
FOLDER = "report"
_READ = ("onnx/", "statistics")  # steps that the page is drawn from, beside what `collect` finds


def write(job: Job, verdicts: Sequence[Verdict]) -> Path:
    """Make ``report/`` of the recipe, unless it says the same already; returns the page's path.

    No script, font or picture of the page comes from elsewhere.

    Raises:
        StoreError: it can't be written.
    """
    timeline.shorten(job.folder)
    found = collect.collect(job, verdicts)
    inputs = {step: made.stored.digest for step, made in job.made.items() if step.startswith(_READ)}
    inputs |= {"data": digest.of_bytes(found.model_dump_json().encode()), "page": _drawn_by()}
    tools = host.versions(["exportyard", "jinja2", "matplotlib", "numpy", "onnx"])

    def work(out: Path) -> Mapping[str, JsonValue]:
        return _draw(job, found, out)

    return store.make(job.folder / FOLDER, Key("report", inputs, {}, tools), work).stored.file(PAGE)


def _drawn_by() -> str:
    """Digest of all that decides what a page looks like."""
    here = Path(__file__).parent
    files = sorted([*here.glob("*.py"), *here.parent.glob("templates/report*")])
    return digest.of_json({path.name: digest.of_file(path) for path in files})


def _draw(job: Job, found: Report, out: Path) -> Mapping[str, JsonValue]:
    from pipeline.report import depth as report_depth
    from pipeline.report import page as report_page
    from pipeline.report import pictures as report_pictures

    whole = report_depth.deepened(job, found)
    (out / DATA).write_text(store.json_text(whole.plain()))
    (out / PAGE).write_text(report_page.page(whole))
    (out / MARKDOWN).write_text(markdown.markdown(whole))
    picture = report_pictures.overview_png(whole)
    if picture is not None:
        (out / PICTURE).write_bytes(picture)
    return {"verdict": whole.verdict.state}


def read(page: Path) -> Report:
    """The data beside a page that `write` has made."""
    return Report.model_validate_json(page.with_name(DATA).read_text())
