"""The flow `export`: the command line's chain as Prefect tasks, one a stage and target.

Prefect is told what happens; whether there is something to do is decided by the store alone. Tasks run one after
the other in the flow's process: each of them uses all cores, and speed must not be measured beside a build.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from rich.text import Text

from pipeline import release, report, run, summary
from pipeline.errors import BuildError, ExportyardError, ParityError
from pipeline.job import Job
from pipeline.release import Published
from pipeline.run import Verdict, Watcher
from pipeline.store import Made
from pipeline.tags import Bump
from pipeline.types import ParityReport, Scheme, Target
from pipeline.workspace import find

Work = Callable[[Watcher], str | None]
"""A step: calls methods of a job, tells the watcher, and returns a note for the task's state."""

log = logging.getLogger("pipeline.flow")


@dataclass(frozen=True)
class Outcome:
    """What a flow that completed has to tell; kept in memory only, for a caller in the same process."""

    verdicts: tuple[Verdict, ...]
    report: Path
    published: Published | None


class TargetsFailedError(ExportyardError):
    """Some targets failed; the others' results stand. The exit code is the first failure's."""

    def __init__(self, verdicts: Sequence[Verdict], report: Path) -> None:
        failed = [verdict for verdict in verdicts if verdict.status == "failed"]
        lines = "\n".join(f"  {verdict.target.name}: {verdict.reason}" for verdict in failed)
        super().__init__(
            f"{len(failed)} of {len(verdicts)} targets failed, and nothing is published:\n{lines}",
            hint=f"`{report}` shows more; correct them, or name the targets to release with `targets`",
        )
        self.exit_code = failed[0].exit_code
        self.verdicts = tuple(verdicts)
        self.report = report


@flow(name="export", persist_result=False, result_serializer="json")
def export(
    recipe: str,
    checkpoint: str | None = None,
    targets: list[str] | None = None,
    workspace: str | None = None,
    publish: bool = True,
    bump: Bump = "patch",
) -> State[Any]:
    """From the checkpoint of a recipe to a published release, with an engine for each target.

    Args:
        recipe: name of a folder below `recipes/`.
        checkpoint: file with trained weights, instead of the recipe's own.
        targets: rows of `targets/targets.toml`; by default the recipe's own choice, or all rows.
        workspace: a folder in the workspace; by default the working directory.
        publish: make a release when every target that this host can build has passed.
        bump: which number of the version to raise.
    """
    log.setLevel(logging.INFO)
    for name in ("prefect.task_runs", "prefect.flow_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(_is_news)
    try:
        job = run.prepare(
            find(Path(workspace or ".")), recipe, checkpoint=Path(checkpoint) if checkpoint else None, targets=targets
        )
        with closing(job):
            outcome = _all(job, bump if publish else None)
    except ExportyardError as error:
        return Failed(message=str(error), data=error)
    return Completed(message=_told(job, outcome), data=outcome)


def _all(job: Job, bump: Bump | None) -> Outcome:
    """Every stage; `bump` is None when nothing shall be published.

    Raises:
        ExportyardError: what all targets need could not be made, a target failed, or the release was refused.
    """
    ready = _upstream(job)
    verdicts, states = [], []
    for target in job.targets:
        verdict, state = _one_target(job, target, ready)
        verdicts.append(verdict)
        states.append(state)
    verdicts = run.resolved(job, verdicts)
    page = _report(job, verdicts)
    if any(verdict.status == "failed" for verdict in verdicts):
        raise TargetsFailedError(verdicts, page)
    published = None if bump is None else _publish(job, verdicts, bump, states)
    return Outcome(tuple(verdicts), page, published)


def _upstream(job: Job) -> list[State[Any]]:
    """Tasks for what the targets share; the value is the states to wait for.

    Raises:
        ExportyardError: one of them failed, without which no target can be built.
    """
    done: list[State[Any]] = []
    for step, make in run.upstream(job):
        state = _step(step.replace("/", " "), partial(_make, step, make), done[-1:])
        _raise_if_failed(state)
        done.append(state)
    # a form that can't be made is no reason to stop: its targets may have others
    others = [
        _step(step.replace("/", " "), partial(_make, step, make), done[-1:]) for step, make in _forms(job).items()
    ]
    return [done[-1], *others]


def _forms(job: Job) -> dict[str, Callable[[], Made]]:
    """Steps that make the numeric forms, beside fp32, that some target of this host wants."""
    found: dict[str, Callable[[], Made]] = {}
    for target in job.targets:
        if job.missing(target) is None:
            for scheme in target.schemes:
                found |= dict(job.form_steps(target, scheme))
    return found


def _make(step: str, make: Callable[[], Made], watch: Watcher) -> None:
    run.timed(step, make, watch)


@dataclass
class _Candidates:
    """What is known about one target so far."""

    built: list[Scheme] = field(default_factory=list)
    left_out: dict[Scheme, str] = field(default_factory=dict)
    parities: dict[Scheme, ParityReport] = field(default_factory=dict)
    verdict: Verdict | None = None


def _one_target(job: Job, target: Target, ready: Sequence[State[Any]]) -> tuple[Verdict, State[Any]]:
    """Tasks engine, parity and latency of one target; its verdict and last state. A failure stays in here."""
    found = _Candidates()

    def engine(watch: Watcher) -> str | None:
        found.built, found.left_out = run.candidates(job, target, watch)
        if not found.built:
            raise BuildError("; ".join(f"{scheme} {reason}" for scheme, reason in found.left_out.items()))
        return "; ".join(f"without {scheme}: {reason}" for scheme, reason in found.left_out.items())

    def parity(watch: Watcher) -> str | None:
        found.parities = run.compare(job, target, found.built, found.left_out, watch)
        failed = [f"{scheme} {report.reasons[0]}" for scheme, report in found.parities.items() if not report.passed]
        if len(failed) == len(found.parities):
            found.verdict = run.judge(job, target, found.parities, found.left_out)
            raise ParityError(found.verdict.reason)
        return "; ".join(failed)

    def latency(watch: Watcher) -> str | None:
        found.verdict = run.judge(job, target, found.parities, found.left_out, watch)
        return f"{found.verdict.scheme}: {found.verdict.reason}"

    missing = job.missing(target)
    if missing is not None:
        state = _skip(f"engine {target.name}", missing)
        return run.verdict(job, target), state
    state = _step(f"engine {target.name}", engine, [one for one in ready if one.is_completed()])
    stopped = job.not_runnable(target)
    if state.is_completed() and stopped is not None:
        skipped = _skip(f"parity {target.name}", stopped, [state])
        return run.not_verified(job, target, found.built, found.left_out), skipped
    for stage, work in (("parity", parity), ("latency", latency)):
        if state.is_completed():
            state = _step(f"{stage} {target.name}", work, [state])
    if found.verdict is None or not state.is_completed():
        found.verdict = found.verdict or _failed(target, found, state)
    return found.verdict, state


def _failed(target: Target, found: _Candidates, state: State[Any]) -> Verdict:
    error = state.result(raise_on_failure=False)
    if isinstance(error, ExportyardError):
        code, reason = error.exit_code, error.message
    else:
        code, reason = ExportyardError.exit_code, f"{type(error).__name__}: {error}"
    return Verdict(target, "failed", reason, candidates=found.parities, left_out=found.left_out, exit_code=code)


def _report(job: Job, verdicts: Sequence[Verdict]) -> Path:
    """Write the report, and show its essence in Prefect's UI."""
    pages: list[Path] = []

    def work(_: Watcher) -> str | None:
        pages.append(report.write(job, verdicts))
        key = re.sub(r"[^a-z0-9]+", "-", job.recipe.name.lower()).strip("-")
        rows = [dict(zip(summary.COLUMNS, _plain(summary.row(verdict)), strict=True)) for verdict in verdicts]
        create_table_artifact(
            rows, key=f"{key}-summary", description=f"What became of each target of {job.recipe.name}"
        )
        create_markdown_artifact(_markdown(job, verdicts, pages[0]), key=f"{key}-report")
        return str(pages[0])

    _raise_if_failed(_step("report", work))
    return pages[0]


def _plain(cells: Sequence[str]) -> list[str]:
    """Cells of a rich table without their markup."""
    return [Text.from_markup(cell).plain for cell in cells]


def _markdown(job: Job, verdicts: Sequence[Verdict], page: Path) -> str:
    rows = [summary.COLUMNS, ["---"] * len(summary.COLUMNS), *(_plain(summary.row(verdict)) for verdict in verdicts)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    reasons = "\n".join(f"- **{verdict.target.name}** {verdict.status}: {verdict.reason}" for verdict in verdicts)
    return f"# {job.recipe.name}\n\n{table}\n\n{reasons}\n\nThe whole report: `{page}`\n"


def _publish(job: Job, verdicts: Sequence[Verdict], bump: Bump, after: Sequence[State[Any]]) -> Published:
    found: list[Published] = []

    def work(watch: Watcher) -> str | None:
        found.append(release.publish(job, verdicts, bump))
        watch("publish", "built" if found[0].fresh else "cached", 0.0)
        return found[0].tag

    _raise_if_failed(_step("publish", work, [one for one in after if one.is_completed()]))
    return found[0]


def _told(job: Job, outcome: Outcome) -> str:
    """One line for the flow run's state."""
    passed = [verdict.target.name for verdict in outcome.verdicts if verdict.status == "passed"]
    others = [f"{verdict.target.name} ({verdict.status})" for verdict in outcome.verdicts if verdict.status != "passed"]
    parts = [f"{len(passed)} of {len(outcome.verdicts)} targets passed"]
    if outcome.published is not None:
        fresh = outcome.published.fresh
        parts.insert(0, f"published {outcome.published.tag}" if fresh else f"unchanged since {outcome.published.tag}")
    else:
        parts.insert(0, f"{job.recipe.name} is not published")
    if others:
        parts.append(f"not in it: {', '.join(others)}")
    return "; ".join(parts)


# --- a step as a task run ------------------------------------------------------------------------------------------


class _States:
    """A watcher that remembers what the steps of one task run ended in, and logs those that did something.

    Steps of other stages, which a stage asks for first, have had task runs of their own.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.found: list[str] = []

    def __call__(self, step: str, state: str, seconds: float, /) -> None:
        if step.partition("/")[0] != self.stage:
            return
        self.found.append(state)
        if state != "cached":
            log.info("%s %s (%.1f s)", step, state, seconds)


# own staleness, hence no cache of Prefect's; nothing is persisted, and if it were, then not as pickle
@task(cache_policy=NO_CACHE, persist_result=False, result_serializer="json")
def _stage(stage: str, work: Work) -> State[Any]:
    """Do `work` and end in a state that says what it was: Cached, Rebuilt, Completed, or Failed with the reason."""
    states = _States(stage)
    try:
        note = work(states)
    except ExportyardError as error:
        # returned, not raised: a user's mistake needs its message, not our traceback
        return Failed(message=str(error), data=error)
    if states.found and set(states.found) == {"cached"}:
        return Completed(name="Cached", message="inputs unchanged" + (f" ({note})" if note else ""))
    rebuilt = [state for state in states.found if state.startswith("rebuilt")]
    return Completed(name="Rebuilt" if rebuilt else None, message="; ".join(filter(None, [*rebuilt, note])) or None)


@task(cache_policy=NO_CACHE, persist_result=False, result_serializer="json")
def _skipped(reason: str) -> State[Any]:
    """What this host can't do."""
    return Completed(name="Skipped", message=reason)


def _step(title: str, work: Work, after: Sequence[State[Any]] = ()) -> State[Any]:
    """Run `work` as a task run called `title`, such as ``engine linux-x86_64-tvm``."""
    stage = title.split()[0]
    named = _stage.with_options(name=stage, task_run_name=title)
    state: State[Any] = named(stage, work, return_state=True, wait_for=list(after))
    return state


def _skip(title: str, reason: str, after: Sequence[State[Any]] = ()) -> State[Any]:
    named = _skipped.with_options(name=title.split()[0], task_run_name=title)
    state: State[Any] = named(reason, return_state=True, wait_for=list(after))
    return state


def _raise_if_failed(state: State[Any]) -> None:
    """Raise what a step failed with; a bug of ours is raised as it is, so that its traceback is kept."""
    if state.is_completed():
        return
    error = state.result(raise_on_failure=False)
    raise error if isinstance(error, BaseException) else ExportyardError(str(state.message))


def _is_news(record: logging.LogRecord) -> bool:
    """A filter: a user's mistake is told once, in ``Finished in state Failed(...)``, and needs no traceback.

    Prefect logs a task that returns `Failed` with the traceback of an exception that isn't there, and the failure of a
    deployment's run as an unexpected exception, twice.
    """
    if not record.exc_info:
        return True
    error = record.exc_info[1]
    return error is not None and not isinstance(error, ExportyardError)
