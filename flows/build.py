"""The flow `build`: one target, on a worker that has the hardware and the packages for it."""

from __future__ import annotations

import logging
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows import stages
from flows.stages import do, raise_if_failed
from flows.steps import entered
from pipeline import exchange, handover, run
from pipeline.errors import BuildError, ExportyardError
from pipeline.exchange import AbsentError, Exchange
from pipeline.handover import SharedMaker
from pipeline.job import LOGS, Job
from pipeline.run import Verdict, Watcher
from pipeline.store import Made
from pipeline.types import Limits, Minutes
from pipeline.workspace import Workspace

log = logging.getLogger("pipeline.flow")


@flow(name="build", persist_result=False, result_serializer="json")
def build(recipe: str, target: str, commit: str, inputs: dict[str, str], build_minutes: Minutes = 120.0) -> State[Any]:
    """Build, check and measure the engines of one target, and hand them over.

    It works in a copy of the workspace as it is in `commit`, made for this run and removed after it; the workspace
    around the working directory is only read. What was found out is left in the exchange as a note with the run's id.

    Args:
        recipe: name of a folder below `recipes/`.
        target: a row of `targets/targets.toml`.
        commit: what the code and the rows are taken from, by its hash.
        inputs: what to build from: steps and the names that the exchange gave to what they made.
        build_minutes: how long building an engine may take whose row has no `limits.minutes`.
    """
    stages.listen()
    try:
        clone = entered().root
        shared = exchange.of(clone)
        with handover.scratch(clone, str(flow_run.id)) as folder:
            limits = Limits(minutes=build_minutes)
            found = _built(clone, shared, folder, recipe, target, commit, inputs, limits)
    except ExportyardError as error:
        return Failed(message=str(error), data=error)
    if found.status == "failed":
        return Failed(message=found.reason, data=BuildError(found.reason))
    return Completed(message=f"{found.status}: {found.reason}")


def _built(
    clone: Path,
    shared: Exchange,
    folder: Path,
    recipe: str,
    target: str,
    commit: str,
    inputs: dict[str, str],
    limits: Limits,
) -> Verdict:
    """The verdict on `target`, which has been left in the exchange."""
    maker = SharedMaker(shared)
    job = run.prepare(handover.check_out(clone, commit, folder), recipe, targets=[target], maker=maker, limits=limits)
    job.logs = Workspace(clone).artifacts / recipe / LOGS  # to be read when the copy is gone
    with closing(job):
        fetched = do("inputs", partial(_fetch, job, shared, inputs))
        raise_if_failed(fetched)
        given = dict(job.made)
        verdicts = [stages.one_target(job, row, [fetched])[0] for row in job.targets]
        found = run.resolved(job, verdicts)[0]
        shared.leave(str(flow_run.id), handover.outcome(job, found, maker, given).plain())
    return found


def _fetch(job: Job, shared: Exchange, inputs: dict[str, str], watch: Watcher) -> str:
    size, lost = 0, None
    for step, reference in inputs.items():
        try:
            job.made[step] = Made(shared.get(reference, job.folder / handover.safe(step)), "cached")
        except AbsentError as error:  # the others are tried, too: a leader that is run again then repairs them all
            lost = lost or error
            continue
        size += job.made[step].stored.size_bytes
    if lost is not None:
        raise lost
    watch("inputs", "built", 0.0)
    return f"{len(inputs)} artifacts, {size / 1e6:.1f} MB"
