"""Fan-out and join: a run of the deployment ``build/<pool>`` for each target, and the verdicts that come back.

One thread watches all runs. Each is asked for with a key that says what for, so that a leader that is run again, after
it was killed or has failed, finds the runs of its first attempt.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled

from flows import stages
from flows.api import patiently
from pipeline import handover
from pipeline.errors import BuildError, UnavailableError
from pipeline.exchange import AbsentError, Exchange
from pipeline.handover import SharedMaker
from pipeline.job import Job
from pipeline.run import Verdict, Watcher
from pipeline.types import Target

ATTEMPTS = 2  # how often a run is started whose worker dies with it
_POLL_S = 1.0
_POOL_POLL_S = 5.0

log = logging.getLogger("pipeline.flow")


@dataclass(frozen=True)
class _Child:
    """A run that builds one target.

    Attributes:
        asked: the request, see `handover.request`.
        number: of the run among those with the same request and the same leader.
        started: how many of them were started by this process.
    """

    target: Target
    asked: str
    id: UUID
    number: int
    started: int


def built(job: Job, shared: Exchange, commit: str, *, wait_for_pool_s: float, refresh: bool) -> list[Verdict]:
    """Verdicts on all rows that were asked for, in their order.

    Raises:
        UnavailableError: the server, or the remote, is away for too long.
    """
    targets = job.asked or job.targets
    found: dict[str, Verdict] = {}
    running: list[_Child] = []
    board = _Board(job, targets)
    pools = _Pools(wait_for_pool_s)
    for target in targets:
        asked = handover.request(job, target)
        known = None if refresh else _known(job, target, asked)
        if known is not None:
            found[target.name] = known
            continue
        child = _start(job, target, asked, commit)
        if isinstance(child, Verdict):
            found[target.name] = child
        else:
            running.append(child)
    board.show(found)
    # one client for all the waiting: a new one asks the server for more, each time
    with get_client(sync_client=True) as client:
        while running:
            time.sleep(_POLL_S)
            still = []
            for child, run in zip(running, _read(client, running), strict=True):
                after = _after(job, shared, child, run, pools, commit)
                if isinstance(after, Verdict):
                    found[child.target.name] = after
                    log.info("%s %s: %s", child.target.name, after.status, after.reason)
                else:
                    still.append(after)
            if len(still) < len(running):
                board.show(found)  # once for all that have ended: a busy server takes seconds to write it down
            running = still
    return [found[target.name] for target in targets]


def _known(job: Job, target: Target, asked: str) -> Verdict | None:
    """The verdict of a time when the same was asked, if all that it says lies here."""
    found = handover.known(job, target, asked)
    if found is None:
        return None
    verdict, worker = found

    def work(watch: Watcher) -> str:
        watch("engine", "cached", 0.0)
        return f"built by {worker}; `refresh` asks again"

    stages.do(f"engine {target.name}", work)
    return verdict


def _start(job: Job, target: Target, asked: str, commit: str, number: int = 1, started: int = 0) -> _Child | Verdict:
    """A run for `target`: one of an earlier attempt of this leader that may still come to something, or a new one."""
    maker = job.maker
    assert isinstance(maker, SharedMaker)
    given = {step: maker.references[job.folder / step] for step in handover.inputs(job, target)}
    parameters: dict[str, Any] = {"recipe": job.recipe.name, "target": target.name, "commit": commit, "inputs": given}
    if job.limits is not None and job.limits.minutes is not None:
        parameters["build_minutes"] = job.limits.minutes
    while True:
        start = partial(
            run_deployment,
            f"build/{target.pool}",
            parameters=parameters,
            timeout=0,
            flow_run_name=f"{job.recipe.name} {target.name}",
            idempotency_key=f"{asked[:32]}:{flow_run.id}:{number}",
        )
        try:
            run: Any = patiently(start)  # not a coroutine, since there is no event loop in this thread
        except ObjectNotFound:
            return _not_built(
                target, f"the server has no deployment `build/{target.pool}`; `exportyard deploy` makes it"
            )
        if run.state is None or not run.state.is_final() or run.state.is_completed():
            return _Child(target, asked, run.id, number, started + 1)
        number += 1


def _not_built(target: Target, reason: str) -> Verdict:
    return Verdict(target, "not built here", reason, exit_code=UnavailableError.exit_code)


def _read(client: SyncPrefectClient, running: Sequence[_Child]) -> list[FlowRun | None]:
    """The runs as the server knows them; None is one that somebody has deleted.

    Raises:
        UnavailableError: the server is away for too long.
    """
    only = FlowRunFilter(id=FlowRunFilterId(any_=[child.id for child in running]))
    found = {run.id: run for run in patiently(partial(client.read_flow_runs, flow_run_filter=only))}
    return [found.get(child.id) for child in running]


def _after(
    job: Job, shared: Exchange, child: _Child, run: FlowRun | None, pools: _Pools, commit: str
) -> _Child | Verdict:
    """What becomes of a run that the server has just told about: the same, another one, or a verdict."""
    target = child.target
    if run is None:
        return _failed(target, "its run was deleted from the server")
    state = run.state
    if state is None or not state.is_final():
        if state is None or state.is_scheduled():  # when it is pending, a worker has taken it
            reason = pools.closed(target.pool)
            if reason is not None:
                _cancel(child, reason)
                return _not_built(target, reason)
        return child
    note = shared.note(str(child.id))
    if note is not None:
        outcome = handover.read(note)
        try:
            verdict = handover.accept(job, target, outcome, shared)
        except AbsentError as error:
            if child.started < ATTEMPTS:
                log.warning("%s: what its worker made is lost (%s), starting it again", target.name, error.message)
                return _start(job, target, child.asked, commit, child.number + 1, child.started)
            return _failed(target, f"what its worker made is lost: {error.message}")
        handover.keep(job, target, child.asked, outcome)
        return verdict
    if state.is_crashed() and child.started < ATTEMPTS:
        log.warning("%s: its run crashed (%s), starting it again", target.name, state.message)
        return _start(job, target, child.asked, commit, child.number + 1, child.started)
    ended = f"its run ended as {state.name}" + (f" {child.started} times" if state.is_crashed() else "")
    return _failed(target, state.message if state.is_failed() and state.message else f"{ended}: {state.message}")


def _failed(target: Target, reason: str) -> Verdict:
    return Verdict(target, "failed", reason, exit_code=BuildError.exit_code)


def _cancel(child: _Child, reason: str) -> None:
    def cancel() -> None:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(child.id, Cancelled(message=reason), force=True)

    patiently(cancel)


class _Pools:
    """Which pools have had no worker for too long."""

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self.seen: dict[str, float] = {}
        self.asked: dict[str, float] = {}

    def closed(self, pool: str) -> str | None:
        """Why there is no use in waiting for a worker of `pool`, or None while there is."""
        now = time.monotonic()
        self.seen.setdefault(pool, now)
        if now - self.asked.get(pool, -math.inf) >= min(_POOL_POLL_S, self.patience_s / 4):
            self.asked[pool] = now
            if patiently(partial(_has_worker, pool)):
                self.seen[pool] = now
        if now - self.seen[pool] < self.patience_s:
            return None
        return f"the pool `{pool}` had no worker for {self.patience_s:.0f} s (`exportyard worker {pool}` starts one)"


def _has_worker(pool: str) -> bool:
    with get_client(sync_client=True) as client:
        workers = client.read_workers_for_work_pool(pool)
    return any(worker.status == WorkerStatus.ONLINE for worker in workers)


class _Board:
    """What Prefect's page shows while the targets are built: how many are done, and what came of each."""

    def __init__(self, job: Job, targets: Sequence[Target]) -> None:
        self.key = stages.key_of(job.recipe.name)
        self.targets = targets
        bar = {"key": f"{self.key}-progress", "description": f"Targets of {job.recipe.name}"}
        self.bar: Any = patiently(partial(create_progress_artifact, 0.0, **bar))

    def show(self, found: dict[str, Verdict]) -> None:
        """Bring it up to date."""
        patiently(partial(update_progress_artifact, self.bar, 100.0 * len(found) / len(self.targets)))
        rows = [
            {"target": one.name, "pool": one.pool, "state": found[one.name].status, "reason": found[one.name].reason}
            if one.name in found
            else {"target": one.name, "pool": one.pool, "state": "under way", "reason": ""}
            for one in self.targets
        ]
        table = {"key": f"{self.key}-targets", "description": "What has become of each target so far"}
        patiently(partial(create_table_artifact, rows, **table))
