"""The flow `build`: one target, on a worker that has the hardware and the packages for it."""

from __future__ import annotations

import logging
import shutil
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
from pipeline.exchange import Exchange
from pipeline.handover import SharedMaker
from pipeline.job import Job
from pipeline.run import Verdict, Watcher
from pipeline.store import Made

log = logging.getLogger("pipeline.flow")


@flow(name="build", persist_result=False, result_serializer="json")
def build(recipe: str, target: str, commit: str, inputs: dict[str, str]) -> State[Any]:
    """Build, check and measure the engines of one target, and hand them over.

    It works in a copy of the workspace as it is in `commit`, made for this run and removed after it; the workspace
    around the working directory is only read. What was found out is left in the exchange as a note with the run's id.

    Args:
        recipe: name of a folder below `recipes/`.
        target: a row of `targets/targets.toml`.
        commit: what the code and the rows are taken from, by its hash.
        inputs: what to build from: steps and the names that the exchange gave to what they made.
    """
    stages.listen()
    try:
        clone = entered().root
        shared = exchange.of(clone)
        folder = clone / ".scratch" / "runs" / str(flow_run.id)
        try:
            found = _built(clone, shared, folder, recipe, target, commit, inputs)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except ExportyardError as error:
        return Failed(message=str(error), data=error)
    if found.status == "failed":
        return Failed(message=found.reason, data=BuildError(found.reason))
    return Completed(message=f"{found.status}: {found.reason}")


def _built(
    clone: Path, shared: Exchange, folder: Path, recipe: str, target: str, commit: str, inputs: dict[str, str]
) -> Verdict:
    """The verdict on `target`, which has been left in the exchange."""
    maker = SharedMaker(shared)
    job = run.prepare(handover.check_out(clone, commit, folder), recipe, targets=[target], maker=maker)
    with closing(job):
        fetched = do("inputs", partial(_fetch, job, shared, inputs))
        raise_if_failed(fetched)
        given = dict(job.made)
        verdicts = [stages.one_target(job, row, [fetched])[0] for row in job.targets]
        found = run.resolved(job, verdicts)[0]
        shared.leave(str(flow_run.id), handover.outcome(job, found, maker, given).plain())
    return found


def _fetch(job: Job, shared: Exchange, inputs: dict[str, str], watch: Watcher) -> str:
    size = 0
    for step, reference in inputs.items():
        job.made[step] = Made(shared.get(reference, job.folder / handover.safe(step)), "cached")
        size += job.made[step].stored.size_bytes
    watch("inputs", "built", 0.0)
    return f"{len(inputs)} artifacts, {size / 1e6:.1f} MB"
