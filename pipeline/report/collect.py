"""What the report says, gathered from the verdicts and from what lies beside them; without loading a library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError

from pipeline import candidates, failures, store, timeline
from pipeline.candidates import Candidate
from pipeline.errors import StoreError
from pipeline.report import release as releases
from pipeline.report.bounds import bounds_of, broken, tightest, uses
from pipeline.report.data import (
    Blocking,
    Cell,
    FailureLine,
    LastRelease,
    Parity,
    Report,
    Speed,
    StepLine,
    TargetLine,
    Timeline,
    Verdict,
    WhereTime,
)
from pipeline.report.numbers import numbers, where_time
from pipeline.types import (
    Bench,
    Compilation,
    Distance,
    Explanation,
    Frozen,
    ParityReport,
    ProfileReport,
    Recipe,
    SizeParity,
    Tolerance,
)

if TYPE_CHECKING:
    from pipeline import run
    from pipeline.job import Job

Document = TypeVar("Document", bound=Frozen)


def collect(job: Job, verdicts: Sequence[run.Verdict]) -> Report:
    """All that is known without a look into graphs and statistics."""
    rows = _rows(verdicts)
    tried = _once([one for verdict in verdicts for one in candidates.of(job, verdict)])
    failed = tuple(FailureLine(**one.plain()) for one in failures.of(job, verdicts))
    last = releases.since(job, verdicts)
    return Report(
        recipe=job.recipe.name,
        summary=job.recipe.summary,
        metric=job.recipe.evaluation.metric.rpartition(":")[2],
        higher_is_better=job.recipe.evaluation.higher_is_better,
        verdict=_verdict(job.recipe, verdicts, failed, last),
        failures=failed,
        warnings=tuple(dict.fromkeys(job.warnings())),
        targets=tuple(_target(job.recipe, one) for one in verdicts),
        tried=tuple(tried),
        speeds=tuple(speed for row in rows for speed in _speeds(row)),
        parity=tuple(_parity(job.recipe, row, found) for row in rows for found in row.candidates.values()),
        numbers=tuple(numbers(rows, tried)),
        explanations=tuple(_explanations(job, rows)),
        profiles=tuple(_profiles(job, rows)),
        compilation=_compilation(job),
        bench=_bench(job),
        timeline=_timeline(job),
        release=last,
        provenance=releases.provenance(job, verdicts),
    )


def _rows(verdicts: Sequence[run.Verdict]) -> list[run.Verdict]:
    """The rows that were built: of one that only chooses, those among which it does. Each one once."""
    each = [row for verdict in verdicts for row in (verdict.rows or (verdict,))]
    return list({row.target.name: row for row in each}.values())


def _once(tried: Iterable[Candidate]) -> list[Candidate]:
    """Forms, without those that a row that chooses repeats; what such a row says of them is said with its own line."""
    return list({(one.target, one.scheme): one for one in tried}.values())


def _verdict(
    recipe: Recipe, verdicts: Sequence[run.Verdict], failed: Sequence[FailureLine], last: LastRelease
) -> Verdict:
    blocking = failures.blocking(verdicts, recipe.require)
    passed = sum(one.status == "passed" for one in verdicts)
    worse = [text for one in last.targets for text in (f"{one.target}: {text}" for text in one.regressions)]
    state, told, todo = _ready(recipe, len(verdicts), passed, failed, last)
    if blocking:
        state = "not ready"
        of = len(verdicts) if recipe.require == "all" else len(recipe.require)
        which = "failed" if recipe.require == "all" else "that the recipe requires did not pass"
        told = f"{len(blocking)} of {of} targets {which}."
        todo = [text for one in failed if one.target in blocking for text in (one.explain, one.command) if text]
        todo += [f"{name}: {reason}" for name, reason in blocking.items() if name not in {one.target for one in failed}]
    elif passed and worse:
        state, told = "worse", f"{passed} of {len(verdicts)} targets passed, but {last.told}."
        todo = [*worse, f"`exportyard publish {recipe.name} --allow-regression` publishes it all the same"]
    return Verdict(
        state=state,
        told=told,
        next=tuple(todo),
        passed=passed,
        targets=len(verdicts),
        blocking=tuple(Blocking(target=name, reason=reason) for name, reason in blocking.items()),
    )


def _ready(
    recipe: Recipe, total: int, passed: int, failed: Sequence[FailureLine], last: LastRelease
) -> tuple[str, str, list[str]]:
    if not passed:
        todo = ["`exportyard targets` says why for each, `exportyard worker` builds them where they run"]
        return "nothing", "No target could be built and verified on this host.", todo
    others = "; the others failed, and are not required" if failed else ""
    if not failed and passed < total:
        others = "; the others were not built, or not verified on this host"
    same = bool(last.targets) and all(one.same for one in last.targets) and not last.changes
    todo = [f"nothing to publish: these are {last.told}"] if same else [f"`exportyard publish {recipe.name}`"]
    return "ready", f"{passed} of {total} targets passed{others}.", todo


def _target(recipe: Recipe, verdict: run.Verdict) -> TargetLine:
    target, scheme, parity = verdict.target, verdict.scheme, verdict.parity
    speeds = [one for one in _speeds(verdict) if one.scheme == scheme]
    used = uses(recipe, target, parity) if parity is not None else ()
    return TargetLine(
        target=target.name,
        backend=target.backend,
        status=verdict.status,
        reason=verdict.reason,
        required=recipe.require == "all" or target.name in recipe.require,
        scheme=scheme,
        built_for=verdict.built_for,
        engine=verdict.engine.digest if verdict.engine is not None else None,
        size_bytes=verdict.engine.size_bytes if verdict.engine is not None else None,
        metric=parity.metric if parity is not None else None,
        onnx_db=_worst(one for at in parity.sizes for one in at.vs_onnx) if parity is not None else None,
        eager_db=_worst(one for at in parity.sizes for one in at.vs_eager) if parity is not None else None,
        speed=speeds[0] if speeds else None,
        not_timed=verdict.latency.not_measured if verdict.latency is not None else None,
        uses=used,
        tightest=tightest(used),
    )


def _worst(found: Iterable[Distance]) -> float | None:
    return min((one.sqnr_db for one in found if one.kind != "indices"), default=None)


def _speeds(verdict: run.Verdict) -> Iterator[Speed]:
    for row in verdict.latency.rows if verdict.latency is not None else ():
        for scheme, time in row.engines.items():
            yield Speed(
                target=verdict.target.name,
                scheme=scheme,
                sizes=row.sizes,
                threads=row.threads,
                time=time,
                eager=row.eager,
                versus_eager=row.versus_eager.get(scheme),
                versus_fp32=row.versus_fp32.get(scheme),
            )


def _parity(recipe: Recipe, verdict: run.Verdict, found: ParityReport) -> Parity:
    bounds = bounds_of(recipe, verdict.target, found.scheme)
    least = {one.sqnr_db for one in bounds.values()}
    return Parity(
        target=verdict.target.name,
        scheme=found.scheme,
        passed=found.passed,
        reasons=found.reasons,
        bound_db=least.pop() if len(least) == 1 else None,
        cells=tuple(_cell(one, bounds) for one in found.sizes),
        stress=found.stress,
    )


def _cell(one: SizeParity, bounds: Mapping[str, Tolerance]) -> Cell:
    return Cell(
        sizes=one.sizes,
        onnx_db=_worst(one.vs_onnx),
        eager_db=_worst(one.vs_eager),
        vs_onnx=one.vs_onnx,
        vs_eager=one.vs_eager,
        broken=broken(one.vs_onnx, bounds),
        error=one.error,
    )


def _read(job: Job, step: str, name: str, kind: type[Document]) -> Document | None:
    """A document that another command has left as an artifact; None where there is none that is whole."""
    try:
        return kind.model_validate_json(store.load(job.folder / step).file(name).read_text())
    except (StoreError, ValidationError):
        return None


def _compilation(job: Job) -> Compilation | None:
    """That of the program which is here now."""
    about, program = store.peek(job.folder / "compilation"), job.made.get("program")
    if about is None or program is None or about.inputs.get("program") != program.stored.digest:
        return None
    return _read(job, "compilation", "compilation.json", Compilation)


def _bench(job: Job) -> Bench | None:
    """The last bench, if one of its engines is still here."""
    try:
        found = Bench.model_validate_json((job.folder / "bench" / "bench.json").read_text())
    except (OSError, UnicodeDecodeError, ValidationError):
        return None
    here = {made.stored.digest for step, made in job.made.items() if step.startswith("engine/")}
    return found if here.intersection(found.engines.values()) else None


def _explanations(job: Job, rows: Sequence[run.Verdict]) -> Iterator[Explanation]:
    """Those of the engines that are here now; one of an earlier engine would mislead."""
    for row in rows:
        for scheme in row.target.schemes:
            step = f"explanation/{row.target.name}/{scheme}"
            engine, about = job.made.get(f"engine/{row.target.name}/{scheme}"), store.peek(job.folder / step)
            if engine is None or about is None or about.inputs.get("engine") != engine.stored.digest:
                continue
            found = _read(job, step, "explanation.json", Explanation)
            if found is not None:
                yield found


def _profiles(job: Job, rows: Sequence[run.Verdict]) -> Iterator[WhereTime]:
    for row in rows:
        made = job.made.get(f"latency/{row.target.name}")
        if made is not None and "profile.json" in made.stored.artifact.files:
            found = ProfileReport.model_validate_json(made.stored.file("profile.json").read_text())
            yield from (where_time(row.target.name, one) for one in found.profiles)


def _timeline(job: Job) -> Timeline | None:
    keys = {step: made.stored.artifact.key for step, made in job.made.items()}
    found = timeline.read(job.folder, keys)
    if not found:
        return None
    begun = found[0].start
    known = {one.step for one in found}
    return Timeline(
        begun_s=begun,
        busy_s=_busy([(one.start, one.start + one.seconds) for one in found]),
        steps=tuple(
            StepLine(
                step=one.step,
                stage=one.step.partition("/")[0],
                start_s=one.start - begun,
                seconds=one.seconds,
                where=one.where,
            )
            for one in found
        ),
        unknown=tuple(step for step in keys if step not in known),
    )


def _busy(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds in which at least one of `spans`, which are sorted by their begin, goes on."""
    total, reached = 0.0, spans[0][0]
    for begin, end in spans:
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
