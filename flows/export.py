"""The flow `export`: from a checkpoint to a release, in one process or with a worker for each target."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from rich.text import Text

from flows import fanout, stages
from flows.api import patiently
from flows.stages import do, making, raise_if_failed
from flows.steps import entered
from pipeline import exchange, failures, handover, recipes, release, run, summary, turns
from pipeline.errors import ExportyardError
from pipeline.exchange import Exchange
from pipeline.handover import SharedMaker
from pipeline.job import Job
from pipeline.release import Published
from pipeline.report import files as report
from pipeline.run import Verdict, Watcher
from pipeline.store import Made
from pipeline.tags import Bump
from pipeline.types import Limits, Minutes, Target
from pipeline.workspace import Workspace

Where = Literal["here", "pools"]
IN_EXCHANGE = re.compile(r"sha256:(?P<digest>[0-9a-f]{64})/(?P<name>[^/]+)")

log = logging.getLogger("pipeline.flow")


@dataclass(frozen=True)
class Outcome:
    """What a flow that completed has to tell; kept in memory only, for a caller in the same process."""

    verdicts: tuple[Verdict, ...]
    report: Path
    published: Published | None


class TargetsFailedError(ExportyardError):
    """Some targets failed; the others' results stand. The exit code is the first failure's."""

    def __init__(self, job: Job, verdicts: Sequence[Verdict], report: Path) -> None:
        failed = [verdict for verdict in verdicts if verdict.status == "failed"]
        lines = "\n".join(f"  {one.target}: {one.reason}\n    {one.again}" for one in failures.of(job, verdicts))
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
    where: Where = "here",
    wait_for_pool_s: float = 300.0,
    refresh: bool = False,
    build_minutes: Minutes | None = None,
) -> State[Any]:
    """From the checkpoint of a recipe to a published release, with an engine for each target.

    Args:
        recipe: name of a folder below `recipes/`.
        checkpoint: file with trained weights, instead of the recipe's own; or ``sha256:DIGEST/NAME``, a file that was
            handed over to the exchange.
        targets: rows of `targets/targets.toml`; by default the recipe's own choice, or all rows.
        workspace: a folder in the workspace; by default the working directory.
        publish: make a release when the targets that the recipe requires have passed.
        bump: which number of the version to raise.
        where: `here` builds every target in this process; `pools` lets a worker of each target's pool do it.
        wait_for_pool_s: how long to wait for a worker of a pool that has none, in seconds.
        refresh: ask the workers even about targets that they have built from the same inputs before.
        build_minutes: how long building an engine may take whose row has no `limits.minutes`; not limited by default,
            but for workers of a pool, which allow two hours.
    """
    stages.listen()
    try:
        found = entered(workspace)
        shared = exchange.of(found.root) if where == "pools" else None
        job = run.prepare(
            found,
            recipe,
            checkpoint=_checkpoint(found, shared, checkpoint),
            targets=targets,
            maker=None if shared is None else SharedMaker(shared),
            limits=None if build_minutes is None else Limits(minutes=build_minutes),
        )
        waiting = partial(log.info, "another export of %s is at work in this workspace; waiting for its end", recipe)
        with closing(job), turns.only_one(job.folder / ".export.lock", waiting):
            built = partial(_here, job) if shared is None else partial(_on_pools, job, shared, wait_for_pool_s, refresh)
            outcome = _all(job, built, bump if publish else None)
    except ExportyardError as error:
        return Failed(message=str(error), data=error)
    return Completed(message=_told(job, outcome), data=outcome)


def _checkpoint(found: Workspace, shared: Exchange | None, named: str | None) -> Path | None:
    """The checkpoint's file; one that was handed over is fetched first.

    Raises:
        AbsentError: it isn't in the exchange.
    """
    if named is None:
        return None
    handed = IN_EXCHANGE.fullmatch(named)
    if handed is None:
        return Path(named)
    path = found.root / ".scratch" / "checkpoints" / handed["digest"] / handed["name"]
    if not path.exists():
        (shared or exchange.of(found.root)).fetch_file(handed["digest"], path)
    return path


Built = Callable[[], tuple[list[Verdict], list[State[Any]]]]
"""Makes all that targets share, then the targets; their verdicts, and the states to wait for."""


def _all(job: Job, built: Built, bump: Bump | None) -> Outcome:
    """Every stage; `bump` is None when nothing shall be published.

    Raises:
        ExportyardError: what all targets need could not be made, a target failed, or the release was refused.
    """
    verdicts, states = built()
    page = _report(job, verdicts)
    blocking = failures.blocking(verdicts, "all" if bump is None else job.recipe.require)
    if any(verdict.status == "failed" and verdict.target.name in blocking for verdict in verdicts):
        raise TargetsFailedError(job, verdicts, page)
    published = None if bump is None else _publish(job, verdicts, bump, states)
    return Outcome(tuple(verdicts), page, published)


def _here(job: Job) -> tuple[list[Verdict], list[State[Any]]]:
    ready = _upstream(job, [target for target in job.targets if job.missing(target) is None])
    verdicts, states = [], []
    for target in job.targets:
        verdict, state = stages.one_target(job, target, ready)
        verdicts.append(verdict)
        states.append(state)
    return run.resolved(job, verdicts), states


def _on_pools(
    job: Job, shared: Exchange, wait_for_pool_s: float, refresh: bool
) -> tuple[list[Verdict], list[State[Any]]]:
    commit = handover.check_code(job, recipes.code_of(job.recipe))
    ready = _upstream(job, job.targets)
    return fanout.built(job, shared, commit, wait_for_pool_s=wait_for_pool_s, refresh=refresh), ready


def _upstream(job: Job, targets: Sequence[Target]) -> list[State[Any]]:
    """Tasks for what `targets` share; the value is the states to wait for.

    Raises:
        ExportyardError: one of them failed, without which no target can be built.
    """
    done: list[State[Any]] = []
    for step, make in run.upstream(job):
        state = do(step.replace("/", " "), partial(making, step, make), done[-1:])
        raise_if_failed(state)
        done.append(state)
    # a form that can't be made is no reason to stop: its targets may have others
    others = [
        do(step.replace("/", " "), partial(making, step, make), done[-1:])
        for step, make in _forms(job, targets).items()
    ]
    return [done[-1], *others]


def _forms(job: Job, targets: Sequence[Target]) -> dict[str, Callable[[], Made]]:
    """Steps that make the numeric forms, beside fp32, that some target wants."""
    found: dict[str, Callable[[], Made]] = {}
    for target in targets:
        for scheme in target.schemes:
            found |= dict(job.form_steps(target, scheme))
    return found


def _report(job: Job, verdicts: Sequence[Verdict]) -> Path:
    """Write the report, and show its essence in Prefect's UI."""
    pages: list[Path] = []

    def work(_: Watcher) -> str | None:
        pages.append(report.write(job, verdicts))
        key = stages.key_of(job.recipe.name)
        rows = [dict(zip(summary.COLUMNS, _plain(summary.row(verdict)), strict=True)) for verdict in verdicts]
        table = {"key": f"{key}-summary", "description": f"What became of each target of {job.recipe.name}"}
        patiently(partial(create_table_artifact, rows, **table))
        patiently(partial(create_markdown_artifact, _markdown(pages[0]), key=f"{key}-report"))
        return str(pages[0])

    raise_if_failed(do("report", work))
    return pages[0]


def _plain(cells: Sequence[str]) -> list[str]:
    """Cells of a rich table without their markup."""
    return [Text.from_markup(cell).plain for cell in cells]


def _markdown(page: Path) -> str:
    """What lies beside the page, and where that is."""
    return f"{page.with_name(report.MARKDOWN).read_text()}\nThe whole report: `{page}`\n"


def _publish(job: Job, verdicts: Sequence[Verdict], bump: Bump, after: Sequence[State[Any]]) -> Published:
    found: list[Published] = []

    def work(watch: Watcher) -> str | None:
        begun = time.perf_counter()
        found.append(release.publish(job, verdicts, bump))
        watch("publish", "built" if found[0].fresh else "cached", time.perf_counter() - begun)
        return found[0].tag

    raise_if_failed(do("publish", work, [one for one in after if one.is_completed()]))
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
