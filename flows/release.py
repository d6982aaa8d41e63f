"""The flow `release`: publish what is built and has passed; nothing is built, compared or measured for it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from flows import stages
from flows.steps import entered
from pipeline import handover, run, store
from pipeline import release as releases
from pipeline.errors import BuildError, ExportyardError
from pipeline.job import Job, Maker, Work
from pipeline.run import Verdict
from pipeline.store import Key, Made
from pipeline.tags import Bump


class Found(Maker):
    """Takes what is in the store, and makes nothing: a form without an engine is left out, like one that failed."""

    def make(self, folder: Path, key: Key, work: Work) -> Made:
        """The stored artifact; `work` is never called.

        Raises:
            BuildError: it isn't there, or was made from something else.
        """
        del work
        stored, reason = store.state_of(folder, key)
        if stored is None:
            raise BuildError(
                f"`{folder.parent.name}/{folder.name}` is not up to date: {reason}", hint="run the flow `export` first"
            )
        return Made(stored, "cached")


def _known(job: Job, found: Verdict) -> Verdict:
    """`found`, or what a worker has answered about that target: its tools may be others than those of this host."""
    if found.status == "passed":
        return found
    known = handover.known(job, found.target, handover.request(job, found.target))
    return found if known is None else known[0]


@flow(name="release", persist_result=False, result_serializer="json")
def release(
    recipe: str,
    checkpoint: str | None = None,
    targets: list[str] | None = None,
    workspace: str | None = None,
    bump: Bump = "patch",
) -> State[Any]:
    """Publish the engines of a recipe that are built and have passed.

    Args:
        recipe: name of a folder below `recipes/`.
        checkpoint: file with the trained weights that they were built from, if not the recipe's own.
        targets: rows of `targets/targets.toml`; by default the recipe's own choice, or all rows.
        workspace: a folder in the workspace; by default the working directory.
        bump: which number of the version to raise.
    """
    stages.listen()
    weights = Path(checkpoint) if checkpoint else None
    try:
        found = run.prepare(entered(workspace), recipe, checkpoint=weights, targets=targets, maker=Found())
        with closing(found) as job:
            published = releases.publish(job, [_known(job, verdict) for verdict in run.export(job)], bump)
    except ExportyardError as error:
        # returned, not raised: a user's mistake needs its message, not our traceback
        return Failed(message=str(error), data=error)
    return Completed(message=f"{'published' if published.fresh else 'unchanged since'} {published.tag}", data=published)
