"""Steps of an export as task runs of Prefect, one a stage and target.

Prefect is told what happens; whether there is something to do is decided by the store alone. Tasks run one after
the other in the flow's process: each of them uses all cores, and speed must not be measured beside a build.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from pipeline import run
from pipeline.errors import BuildError, ExportyardError, ParityError
from pipeline.job import Job
from pipeline.run import Verdict, Watcher
from pipeline.store import Made
from pipeline.types import ParityReport, Scheme, Target

Work = Callable[[Watcher], str | None]
"""A step: calls methods of a job, tells the watcher, and returns a note for the task's state."""

log = logging.getLogger("pipeline.flow")


def listen() -> None:
    """Show what stages log with the run; and don't log a user's mistake with a traceback."""
    logging.getLogger("pipeline").setLevel(logging.INFO)
    for name in ("prefect.task_runs", "prefect.flow_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(_is_news)


def key_of(name: str) -> str:
    """A name as Prefect wants it in the key of an artifact."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


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


def do(title: str, work: Work, after: Sequence[State[Any]] = ()) -> State[Any]:
    """Run `work` as a task run called `title`, such as ``engine linux-x86_64-tvm``."""
    stage = title.split()[0]
    named = _stage.with_options(name=stage, task_run_name=title)
    state: State[Any] = named(stage, work, return_state=True, wait_for=list(after))
    return state


def skip(title: str, reason: str, after: Sequence[State[Any]] = ()) -> State[Any]:
    """A task run called `title` for what this host can't do."""
    named = _skipped.with_options(name=title.split()[0], task_run_name=title)
    state: State[Any] = named(reason, return_state=True, wait_for=list(after))
    return state


def raise_if_failed(state: State[Any]) -> None:
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


def making(step: str, make: Callable[[], Made], watch: Watcher) -> None:
    """A `Work` that makes one step."""
    run.timed(step, make, watch)


@dataclass
class _Candidates:
    """What is known about one target so far."""

    built: list[Scheme] = field(default_factory=list)
    left_out: dict[Scheme, str] = field(default_factory=dict)
    parities: dict[Scheme, ParityReport] = field(default_factory=dict)
    verdict: Verdict | None = None


def one_target(job: Job, target: Target, ready: Sequence[State[Any]]) -> tuple[Verdict, State[Any]]:
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
        state = skip(f"engine {target.name}", missing)
        return run.verdict(job, target), state
    state = do(f"engine {target.name}", engine, [one for one in ready if one.is_completed()])
    stopped = job.not_runnable(target)
    if state.is_completed() and stopped is not None:
        skipped = skip(f"parity {target.name}", stopped, [state])
        return run.not_verified(job, target, found.built, found.left_out), skipped
    for stage, work in (("parity", parity), ("latency", latency)):
        if state.is_completed():
            state = do(f"{stage} {target.name}", work, [state])
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
