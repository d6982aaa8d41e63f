"""The whole chain in plain Python: what the command line, the Prefect flow and the tests call."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, Protocol, cast, get_args

from pipeline import backends, choice, errors, store
from pipeline import targets as rows_of
from pipeline.errors import BuildError, ExportyardError, LimitError, ParityError, ReleaseError, UnavailableError
from pipeline.job import Job, Maker, Work, check_checkpoint_file
from pipeline.processes import end_with_parent
from pipeline.store import Key, Made, Stored
from pipeline.types import (
    Audit,
    Chosen,
    LatencyReport,
    Limits,
    ParityReport,
    Recipe,
    Reporter,
    Scheme,
    Target,
    no_report,
)
from pipeline.workspace import Workspace

LONG_S = 4.0
PER_TARGET = ("tuning", "engine", "parity", "audit", "latency")
Status = Literal["passed", "failed", "not built here", "not verified"]


class Watcher(Protocol):
    """Told about each step as it ends; the command line prints a line."""

    def __call__(self, step: str, state: str, seconds: float, /) -> None:
        """`state` is cached, built, rebuilt or failed."""
        ...


def ignore(step: str, state: str, seconds: float, /) -> None:
    """A watcher that says nothing."""


@dataclass(frozen=True)
class Verdict:
    """What became of one target: the form that won, or why there is none.

    Attributes:
        candidates: every form that was built and compared.
        left_out: every form that measuring had no need to look at, and why.
        audits: of every form that was built.
        rows: for a row that chooses, the verdicts on those that it chose among.
        built_for: as in `Chosen`.
    """

    target: Target
    status: Status
    reason: str
    scheme: Scheme | None = None
    engine: Stored | None = None
    parity: ParityReport | None = None
    latency: LatencyReport | None = None
    candidates: Mapping[Scheme, ParityReport] = field(default_factory=dict)
    left_out: Mapping[Scheme, str] = field(default_factory=dict)
    audits: Mapping[Scheme, Audit] = field(default_factory=dict)
    exit_code: int = 0
    rows: tuple[Verdict, ...] = ()
    built_for: str | None = None

    def chosen(self) -> Chosen:
        """This as what a release ships."""
        assert self.engine is not None
        assert self.parity is not None
        assert self.latency is not None
        assert self.scheme is not None
        return Chosen(self.target, self.scheme, self.engine, self.parity, self.latency, self.reason, self.built_for)


def prepare(
    workspace: Workspace,
    recipe: str,
    *,
    checkpoint: Path | None = None,
    targets: Sequence[str] | None = None,
    report: Reporter = no_report,
    maker: Maker | None = None,
    limits: Limits | None = None,
) -> Job:
    """A job, with every name checked before anything runs.

    Args:
        workspace: where the recipe and the rows are.
        recipe: its name.
        checkpoint: instead of the recipe's own.
        targets: names of rows; None means the recipe's `targets`, or every row of the workspace.
        report: told how far long work is.
        maker: makes artifacts; the default makes them in the store.
        limits: what builders may take whose rows don't say it.

    Raises:
        UsageError: a recipe, target, backend or option that doesn't exist, with the nearest name.
        RecipeError, WorkspaceError: a file is wrong.
        CheckpointError: `checkpoint` can't be one.
    """
    rows = workspace.rows()
    found = workspace.recipe(recipe)
    names = targets or found.targets or tuple(rows)
    asked = rows_of.select(rows, names)
    chosen = rows_of.to_build(rows, asked)
    _check_required(found, rows)
    for target in (*asked, *chosen):
        rows_of.check_options(target, backends.find(target.backend).option_names)
    if checkpoint is not None:
        check_checkpoint_file(checkpoint)
    job = Job(workspace, found, chosen, checkpoint and checkpoint.resolve(), report, asked=asked, limits=limits)
    if maker is not None:
        job.maker = maker
    return job


def _check_required(recipe: Recipe, rows: Mapping[str, Target]) -> None:
    """Refuse a recipe that requires or judges a target that it doesn't have: it could never be released, or judged."""
    required = () if recipe.require == "all" else recipe.require
    judged = () if recipe.regression is None else recipe.regression.targets
    for setting, names in (("require", required), ("regression.targets", judged)):
        for name in names:
            if name not in (recipe.targets or rows):
                where = f"`{setting}` of recipe `{recipe.name}`"
                raise errors.unknown("target", name, recipe.targets or rows, where=where)


def export(job: Job, jobs: int = 1, watch: Watcher = ignore) -> list[Verdict]:
    """The main job, from the checkpoint to a verdict for each target; one target's failure leaves the others.

    Args:
        job: what to do.
        jobs: how many targets to build at the same time, each in a process of its own.
        watch: told as each step ends.

    Raises:
        ExportyardError: what all targets need could not be made.
    """
    with closing(job):
        for step, make in upstream(job):
            timed(step, make, watch)
        buildable = [target for target in job.targets if job.missing(target) is None]
        if jobs > 1 and len(buildable) > 1:
            _build_at_once(job, buildable, jobs, watch)
        return resolved(job, [verdict(job, target, watch) for target in job.targets], watch)


def upstream(job: Job) -> Iterator[tuple[str, Callable[[], Made]]]:
    """What every target needs, in order."""
    yield "checkpoint", job.checkpoint
    yield "data", job.data
    yield "program", job.program
    yield "onnx/fp32", job.graph


def timed(step: str, make: Callable[[], Made], watch: Watcher) -> Made:
    """Make one step and tell the watcher how that went."""
    begun = time.perf_counter()
    try:
        made = make()
    except ExportyardError:
        watch(step, "failed", time.perf_counter() - begun)
        raise
    state = made.state if made.state != "rebuilt" else f"rebuilt ({made.reason})"
    seconds = time.perf_counter() - begun
    watch(step, state, seconds)
    if seconds > LONG_S:
        gc.collect()  # models and sessions in cycles, which Python alone would keep for the steps to come
    return made


def verdict(job: Job, target: Target, watch: Watcher = ignore) -> Verdict:
    """Build, check and measure every candidate of one target, and choose. A failure is a verdict, not an exception."""
    missing = job.missing(target)
    if missing is not None:
        return Verdict(target, "not built here", missing, exit_code=UnavailableError.exit_code)
    built, left_out = candidates(job, target, watch)
    stopped = job.not_runnable(target)
    if stopped is not None and built:
        return not_verified(job, target, built, left_out, watch)
    parities = compare(job, target, built, left_out, watch)
    return judge(job, target, parities, left_out, watch)


def resolved(job: Job, verdicts: Sequence[Verdict], watch: Watcher = ignore) -> list[Verdict]:
    """The verdicts on the rows that were asked for: one that chooses gets that on the best of its rows.

    Args:
        job: what was done.
        verdicts: on each of its targets.
        watch: told when rows were measured together.
    """
    found = {one.target.name: one for one in verdicts}
    return [
        _best(job, target, [found[name] for name in target.candidates], watch)
        if target.candidates
        else found[target.name]
        for target in job.asked or job.targets
    ]


def _best(job: Job, target: Target, rows: Sequence[Verdict], watch: Watcher) -> Verdict:
    """The verdict on a row that chooses: of its `rows`, that on the fastest which passed, under its own name.

    Those that passed are measured together; the ratios that each was chosen by are of different runs.
    """
    passed = {row.target.name: (row.target, row.scheme) for row in rows if row.scheme is not None and _timed_here(row)}
    others = [f"{row.target.name} {row.status}: {row.reason}" for row in rows if row.status != "passed"]
    if not passed:
        statuses: tuple[Status, ...] = ("failed", "not verified", "not built here")
        worst = next((row for status in statuses for row in rows if row.status == status), None)
        if worst is None:
            return Verdict(target, "not verified", "none of its rows is measured on this host", rows=tuple(rows))
        told = "; ".join(["none of its rows passed", *others])
        return Verdict(target, worst.status, told, rows=tuple(rows), exit_code=worst.exit_code)
    timed(f"latency/{target.name}", partial(job.comparison, target, passed), watch)
    name, reason = choice.fastest_row(job.comparison_report(target, passed))
    best = next(row for row in rows if row.target.name == name)
    assert best.parity is not None
    assert best.scheme is not None
    return replace(
        best,
        target=best.target.model_copy(update={"name": target.name, "summary": target.summary, "pool": target.pool}),
        reason="; ".join([reason, *others]),
        candidates={best.scheme: best.parity},
        left_out={},
        rows=tuple(rows),
        built_for=name,
    )


def _timed_here(row: Verdict) -> bool:
    """Whether a row passed, and its engine was timed beside eager PyTorch: not on a board, nor under an emulator."""
    return row.latency is not None and bool(row.latency.rows) and row.latency.rows[0].eager is not None


def candidates(job: Job, target: Target, watch: Watcher = ignore) -> tuple[list[Scheme], dict[Scheme, str]]:
    """Build each candidate of `target`; those that could be built, and why the others could not."""
    built: list[Scheme] = []
    left_out: dict[Scheme, str] = {}
    for scheme in target.schemes:
        try:
            for step, make in job.form_steps(target, scheme):
                timed(step, make, watch)
            reason = job.left_out(target, scheme)
            if reason is not None:
                left_out[scheme] = reason
                continue
            if job.tunes(target):
                timed(f"tuning/{target.name}/{scheme}", partial(job.tuning, target, scheme), watch)
            timed(f"engine/{target.name}/{scheme}", partial(job.engine, target, scheme), watch)
            built.append(scheme)
        except (BuildError, UnavailableError, errors.ConversionError) as error:
            left_out[scheme] = error.message
    return built, left_out


def compare(
    job: Job, target: Target, built: Sequence[Scheme], left_out: dict[Scheme, str], watch: Watcher = ignore
) -> dict[Scheme, ParityReport]:
    """Compare each candidate with what it came from; one that can't be loaded moves to `left_out`."""
    parities: dict[Scheme, ParityReport] = {}
    for scheme in built:
        try:
            timed(f"parity/{target.name}/{scheme}", partial(job.parity, target, scheme), watch)
            parities[scheme] = job.parity_report(target, scheme)
        except BuildError as error:
            left_out[scheme] = error.message
    return parities


def audit(job: Job, target: Target, built: Iterable[Scheme], watch: Watcher = ignore) -> dict[Scheme, Audit]:
    """What each candidate really runs in INT8."""
    found: dict[Scheme, Audit] = {}
    for scheme in built:
        timed(f"audit/{target.name}/{scheme}", partial(job.audit, target, scheme), watch)
        found[scheme] = job.audit_report(target, scheme)
    return found


def not_verified(
    job: Job, target: Target, built: Sequence[Scheme], left_out: Mapping[Scheme, str], watch: Watcher = ignore
) -> Verdict:
    """The verdict on a target whose engines were built, and that this host can't run."""
    reason = f"built, but not measured on the device: {job.not_runnable(target)}"
    return Verdict(target, "not verified", reason, left_out=left_out, audits=audit(job, target, built, watch))


def _shallow(job: Job, audits: Mapping[Scheme, Audit]) -> dict[Scheme, str]:
    """Candidates with less INT8 in them than the recipe asks for, and how much that is."""
    found = {scheme: choice.too_little_int8(one, job.recipe.budget.min_int8_share) for scheme, one in audits.items()}
    return {scheme: reason for scheme, reason in found.items() if reason is not None}


def judge(
    job: Job,
    target: Target,
    parities: Mapping[Scheme, ParityReport],
    left_out: Mapping[Scheme, str],
    watch: Watcher = ignore,
) -> Verdict:
    """Measure the candidates that passed and choose among them."""
    audits = audit(job, target, parities, watch)
    shallow = _shallow(job, audits)
    deep = {scheme: found for scheme, found in parities.items() if scheme not in shallow}
    left_out = {**left_out, **shallow}
    passed = tuple(scheme for scheme, found in deep.items() if found.passed)
    latency = None
    if passed:
        timed(f"latency/{target.name}", lambda: job.latency(target, passed), watch)
        latency = job.latency_report(target, passed)
    scheme, reason = choice.choose(target, deep, latency, left_out)
    if scheme is None:
        code = ParityError.exit_code if parities else BuildError.exit_code
        return Verdict(target, "failed", reason, candidates=parities, left_out=left_out, audits=audits, exit_code=code)
    return Verdict(
        target,
        "passed",
        reason,
        scheme,
        job.engine(target, scheme).stored,
        parities[scheme],
        latency,
        parities,
        left_out,
        audits,
    )


def _build_at_once(job: Job, buildable: Sequence[Target], jobs: int, watch: Watcher) -> None:
    """Build and compare targets in worker processes; what they made is then found in the store.

    Measuring is not done there: two engines measured at once would measure each other.
    """
    common = job.workspace.root, job.recipe.name, job.given_checkpoint, job.limits
    count, context = min(jobs, len(buildable)), get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=end_with_parent) as pool:
        running = [pool.submit(_worker, *common, target.name) for target in buildable]
        try:
            for future in running:
                steps, ended = future.result()
                for step, state, seconds in steps:
                    watch(step, state, seconds)
                job.ended |= ended
        except BrokenProcessPool:
            raise BuildError(
                "a builder process died (killed, or out of memory)",
                hint="run again with `--jobs 1`, or with fewer targets, to see which one",
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _worker(
    root: Path, recipe: str, checkpoint: Path | None, limits: Limits | None, target: str
) -> tuple[list[tuple[str, str, float]], dict[str, LimitError]]:
    """One target in a process of its own: what was done, and what had to be ended.

    Other failures are left to the parent, which meets them again.
    """
    steps: list[tuple[str, str, float]] = []
    job = prepare(Workspace(root), recipe, checkpoint=checkpoint, targets=[target], limits=limits)
    row = job.targets[0]
    with closing(job):
        built, _ = candidates(job, row, lambda step, state, seconds: steps.append((step, state, seconds)))
        if job.not_runnable(row) is None:
            for scheme in built:
                with suppress(BuildError):
                    job.parity(row, scheme)
    return [entry for entry in steps if entry[1] != "cached"], job.ended


class _StaleError(Exception):
    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(reason)
        self.folder, self.reason = folder, reason


class Inspector(Maker):
    """Looks instead of making: what isn't as it should be is raised."""

    def make(self, folder: Path, key: Key, work: Work) -> Made:
        """The stored artifact; `work` is never called."""
        del work
        stored, reason = store.state_of(folder, key)
        if stored is None:
            raise _StaleError(folder, reason)
        return Made(stored, "cached")


@dataclass(frozen=True)
class StepState:
    """Whether one step would be made by the next export, and why."""

    step: str
    fresh: bool
    reason: str


def status(job: Job) -> list[StepState]:
    """The state of every step of `job`, which must have been prepared with an `Inspector`; makes nothing."""
    found = [_look(job, step, make) for step, make in upstream(job)]
    for target in job.targets:
        missing = job.missing(target)
        if missing is not None:
            found.append(StepState(f"engine/{target.name}", True, f"not built here: {missing}"))
            continue
        compared = [state for scheme in target.schemes for state in _look_at_candidate(job, target, scheme)]
        found += compared
        if job.not_runnable(target) is None:
            found.append(_look_at_latency(job, target, compared))
    unique = {entry.step: entry for entry in found}
    return list(unique.values())


def _look_at_candidate(job: Job, target: Target, scheme: Scheme) -> list[StepState]:
    found = []
    for step, make in job.form_steps(target, scheme):
        found.append(_look(job, step, make))
    if found and found[-1].fresh and job.left_out(target, scheme) is not None:
        return found
    if job.tunes(target):
        found.append(_look(job, f"tuning/{target.name}/{scheme}", lambda: job.tuning(target, scheme)))
    found.append(_look(job, f"engine/{target.name}/{scheme}", lambda: job.engine(target, scheme)))
    if job.not_runnable(target) is None:
        found.append(_look(job, f"parity/{target.name}/{scheme}", lambda: job.parity(target, scheme)))
    found.append(_look(job, f"audit/{target.name}/{scheme}", lambda: job.audit(target, scheme)))
    return found


def _look_at_latency(job: Job, target: Target, compared: Sequence[StepState]) -> StepState:
    step = f"latency/{target.name}"
    stale = next((state for state in compared if not state.fresh), None)
    if stale is not None:
        return StepState(step, False, f"waits for {stale.step}")
    left = [scheme for scheme in target.schemes if job.left_out(target, scheme) is None]
    shallow = _shallow(job, {scheme: job.audit_report(target, scheme) for scheme in left})
    passed = tuple(scheme for scheme in left if scheme not in shallow and job.parity_report(target, scheme).passed)
    if not passed:
        return StepState(step, True, "no form passed, so there is nothing to measure")
    return _look(job, step, lambda: job.latency(target, passed))


def _look(job: Job, step: str, make: Callable[[], Made]) -> StepState:
    try:
        make()
    except _StaleError as stale:
        if stale.folder == job.folder / step:
            return StepState(step, False, stale.reason)
        return StepState(step, False, f"waits for {stale.folder.relative_to(job.folder).as_posix()}")
    except ExportyardError as error:
        return StepState(step, False, error.message)
    return StepState(step, True, "up to date")


def make_step(job: Job, step: str, watch: Watcher = ignore) -> Path:
    """Make one step by its folder's name (``program``, ``onnx/fp32``, ``engine/TARGET``): what DVC's stages run.

    Raises:
        UsageError: there is no such step.
        ExportyardError: it can't be made.
    """
    simple = dict(upstream(job)) | {"statistics": job.statistics}
    kind, _, rest = step.partition("/")
    with closing(job):
        if step in simple:
            timed(step, simple[step], watch)
        elif kind == "onnx" and rest:
            timed(step, partial(job.onnx, _scheme(rest)), watch)
        elif kind == "programs" and rest:
            scheme, _, quantizer = rest.rpartition("-")
            timed(step, partial(job.quantized_program, _scheme(scheme), quantizer), watch)
        elif kind in PER_TARGET and rest:
            _make_for_target(job, kind, rows_of.select(job.workspace.rows(), [rest])[0], watch)
        elif step == "release":
            raise ReleaseError(
                f"what the newest release of `{job.recipe.name}` was made from has changed",
                hint=f"`exportyard publish {job.recipe.name}` makes the next one",
            )
        else:
            raise errors.unknown("step", step, [*simple, *(f"{one}/TARGET" for one in PER_TARGET)])
    return job.folder / step


def _make_for_target(job: Job, kind: str, target: Target, watch: Watcher) -> None:
    if target.candidates:
        raise errors.UsageError(
            f"`{target.name}` has no {kind} of its own: it chooses among {', '.join(target.candidates)}",
            hint="name one of these rows",
        )
    missing = job.missing(target)
    if missing is not None:
        raise UnavailableError(f"`{target.name}` can't be built on this host: {missing}", hint="`exportyard doctor`")
    built, left_out = candidates(job, target, watch)
    if not built:
        raise BuildError(f"`{target.name}`: {'; '.join(left_out.values())}", hint="`exportyard export` tells more")
    if kind == "audit":
        audit(job, target, built, watch)
    elif kind not in ("tuning", "engine"):
        parities = compare(job, target, built, left_out, watch)
        if kind == "latency":
            judge(job, target, parities, left_out, watch)


def _scheme(name: str) -> Scheme:
    if name in get_args(Scheme):
        return cast("Scheme", name)
    raise errors.unknown("scheme", name, get_args(Scheme))
