"""Stage parity: is the engine still the model?

Two questions, since one number can't tell quantization loss from a miscompiled engine: how far the engine is from
the ONNX graph that it was built from (bounded by the target's tolerance: was the meaning kept?), and how far from
eager fp32 PyTorch (bounded by the recipe's budget: is it still the model?).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from pipeline import backends, buckets, compare, metrics, padding, samples
from pipeline.buckets import Bucket
from pipeline.errors import BuildError, ExportyardError, ParityError, RecipeError
from pipeline.reference import Answers, Outputs
from pipeline.store import Stored, write_json
from pipeline.stress import checks as stress
from pipeline.stress import subject as stress_subject
from pipeline.types import (
    Distance,
    MetricResult,
    OutputKind,
    ParityReport,
    Recipe,
    Reporter,
    Runner,
    Scheme,
    Signature,
    SizeParity,
    Sizes,
    StressCheck,
    Target,
    Tolerance,
)

SAME = Tolerance(max_over_peak=1e-4)  # padded or not, in fp32: kernels sum in another order at another size


def parity(
    recipe: Recipe,
    engine: Stored,
    model: Stored,
    answers: Answers,
    target: Target,
    scheme: Scheme,
    out: Path,
    report: Reporter,
) -> dict[str, JsonValue]:
    """Compare `engine` with `model`, the ONNX graph that it came from, and with eager fp32; write ``parity.json``.

    An engine that is too far, or that fails at some size, is a result (`passed` is False), not an exception.

    Raises:
        BuildError: the engine can't be loaded at all.
        RecipeError: the recipe's feeds or metric raised.
    """
    kinds = {spec.name: spec.kind for spec in recipe.outputs}
    axes, among = buckets.axes_of(recipe, engine), buckets.of(engine)
    combinations = samples.combinations(axes, buckets.edges(axes, among))
    steps = len(combinations) + 1
    with backends.loaded(engine, target) as run:
        sizes = []
        for done, combination in enumerate(combinations):
            report(done, steps, f"parity {target.name} {scheme} at {_spell(combination)}")
            sizes.append(_at(run, model, answers, combination, kinds))
        report(len(combinations), steps, f"parity {target.name} {scheme} on evaluation data")
        metric, failure = _evaluate(recipe, run, engine.signature(), answers, kinds)
        minds = {
            _spell(one): text for one in combinations if (text := _minds_padding(engine, among, answers, one, kinds))
        }
        subject = stress_subject.of(recipe, run, engine, model, answers, target, scheme)
        wrong = [*minds.values(), *_judge(sizes, minds, model, subject.bounds)]
        report(len(combinations), steps, f"parity {target.name} {scheme} under stress")
        checks = _stress(subject, combinations, wrong or failure)
    report(steps, steps, f"parity {target.name} {scheme}")
    reasons = [
        *wrong,
        *(failure or _judge_metric(recipe, metric)),
        *(f"under stress, {_told(one)}" for one in checks if one.verdict == "failed"),
    ]
    found = ParityReport(
        recipe=recipe.name,
        target=target.name,
        scheme=scheme,
        sizes=tuple(sizes),
        metric=metric,
        passed=not reasons,
        reasons=tuple(reasons),
        stress=checks,
    )
    write_json(out / "parity.json", found.plain())
    return {"passed": found.passed, "warnings": [*_warnings(found, len(answers.evaluation()))]}


def _stress(
    subject: stress_subject.Subject, compared: list[dict[str, int]], wrong: list[str]
) -> tuple[StressCheck, ...]:
    """Every check beyond usual inputs; none of an engine that is wrong with usual ones."""
    if wrong:
        return (stress_subject.not_asked("all", "the engine is wrong with usual inputs"),)
    return tuple(stress.checks(subject, compared))


def _told(check: StressCheck) -> str:
    what = f" ({check.compared})" if check.compared else ""
    return f"`{check.name}` at {_spell(check.sizes)}{what}: {check.why}"


def _warnings(found: ParityReport, samples: int) -> list[str]:
    """What to say about evaluation samples that the engine's buckets don't hold, and about a form that isn't invariant.

    Of that a caller must know: what it gets depends on what else is in the call.
    """
    few = samples - found.metric.samples
    told = [f"`{found.target}`: {few} of {samples} evaluation samples are larger than its buckets"] if few else []
    noted = [one for one in found.stress if one.verdict == "noted" and one.own]
    return [*told, *(f"`{found.target}` {found.scheme} under stress, {_told(one)}" for one in noted)]


def _at(
    run: Runner, model: Stored, answers: Answers, sizes: Mapping[str, int], kinds: Mapping[str, OutputKind]
) -> SizeParity:
    reference, written = answers.eager(sizes), answers.onnx(model, sizes)
    try:
        found = run(answers.feeds(sizes))
        return SizeParity(
            sizes=sizes,
            vs_onnx=compare.distances(written, found, kinds),
            vs_eager=compare.distances(reference, found, kinds),
        )
    except (ParityError, BuildError) as error:
        return SizeParity(sizes=sizes, error=error.message)
    except Exception as error:  # a backend's runtime may raise anything; whatever it is, it is the result
        return SizeParity(sizes=sizes, error=_first_line(error))


def _minds_padding(
    engine: Stored, among: Sequence[Bucket], answers: Answers, sizes: Sizes, kinds: Mapping[str, OutputKind]
) -> str | None:
    """Why the model itself answers something else when inputs of these sizes are padded to their bucket, or None."""
    signature, bucket = engine.signature(), buckets.smallest(among, sizes)
    grows = {name: size for name, size in (bucket.sizes if bucket else {}).items() if sizes[name] < size}
    if not grows or _padded(signature, answers, sizes, grows, kinds) is None:
        return None
    # one axis alone is to blame, as a rule
    blame = next((one for one in grows if _padded(signature, answers, sizes, {one: grows[one]}, kinds)), None)
    grown = {blame: grows[blame]} if blame is not None else grows
    said = " and ".join(f"`{name}` from {sizes[name]} to {size}" for name, size in grown.items())
    return (
        f"padding {said} changes the answer, of eager fp32 already: {_padded(signature, answers, sizes, grown, kinds)}"
    )


def _padded(
    signature: Signature, answers: Answers, sizes: Sizes, grown: Sizes, kinds: Mapping[str, OutputKind]
) -> str | None:
    """How far the program's answers are from its own when some axes are padded; None where they are the same."""
    whole = padding.padded(answers.feeds(sizes), signature, {**sizes, **grown})
    try:
        found = compare.distances(answers.eager(sizes), padding.cut(answers.ask(whole), signature, sizes), kinds)
    except Exception as error:  # torch's own: padding may be what the model can't take at all
        return _first_line(error)
    return "; ".join(text for one in found for text in compare.violations(one, SAME)) or None


def _evaluate(
    recipe: Recipe, run: Runner, signature: Signature, answers: Answers, kinds: Mapping[str, OutputKind]
) -> tuple[MetricResult, list[str]]:
    """The metric on the samples whose sizes are served, for the engine and for eager fp32 alike."""
    served = [pair for pair in answers.evaluation() if padding.fits(pair[0].feeds, signature, parts=True)]
    asked = served or answers.evaluation()  # if it serves none, the first says why
    run = padding.in_parts(run, signature)
    labels = [sample.labels for sample, _ in asked]
    reference = [outputs for _, outputs in asked]
    eager = metrics.evaluate(recipe, reference, labels, reference)
    try:
        found = [run(sample.feeds) for sample, _ in asked]
        pooled = tuple(_pool(name, kinds, reference, found) for name in reference[0])
        value, failure = metrics.evaluate(recipe, found, labels, reference), []
    except RecipeError:
        raise
    except Exception as error:  # as above: an engine that fails on evaluation data has failed
        message = error.message if isinstance(error, ExportyardError) else _first_line(error)
        pooled, value, failure = (), 0.0, [f"fails on the evaluation data: {message}"]
    fall = eager - value if recipe.evaluation.higher_is_better else value - eager
    result = MetricResult(
        name=recipe.evaluation.metric.rpartition(":")[2],
        eager=eager,
        engine=value,
        drop=fall,
        budget=recipe.budget.drop,
        samples=len(asked),
        vs_eager=pooled,
    )
    return result, failure


def _pool(name: str, kinds: Mapping[str, OutputKind], reference: list[Outputs], found: list[Outputs]) -> Distance:
    return compare.pooled(name, [one[name] for one in reference], [one[name] for one in found], kinds[name])


def _judge(
    sizes: list[SizeParity], known: Collection[str], model: Stored, bounds: Mapping[str, Tolerance]
) -> list[str]:
    """Where the engine isn't the model that it came from: at most one line a size, none for those in `known`."""
    what = "its ONNX graph" if "model.onnx" in model.artifact.files else "its quantised program"
    reasons = []
    for one in sizes:
        if _spell(one.sizes) in known:
            continue
        if one.error is not None:
            reasons.append(f"fails at {_spell(one.sizes)}: {one.error}")
            continue
        broken = [text for found in one.vs_onnx for text in compare.violations(found, bounds[found.output])]
        if broken:
            reasons.append(f"not {what} at {_spell(one.sizes)}: {'; '.join(broken)}")
    return reasons


def _judge_metric(recipe: Recipe, metric: MetricResult) -> list[str]:
    reasons = []
    if not metric.drop <= recipe.budget.drop:
        reasons.append(
            f"{metric.name} falls by {metric.drop:.4g} ({metric.eager:.4g} -> {metric.engine:.4g}), "
            f"the budget is {metric.budget:g}"
        )
    if recipe.budget.vs_eager is not None:
        broken = [text for found in metric.vs_eager for text in compare.violations(found, recipe.budget.vs_eager)]
        reasons += [f"too far from eager fp32: {text}" for text in broken]
    return reasons


def _spell(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items()) or "its one size"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
