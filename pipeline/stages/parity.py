"""Stage parity: is the engine still the model?

Two questions, since one number can't tell quantization loss from a miscompiled engine: how far the engine is from
the ONNX graph that it was built from (bounded by the target's tolerance: was the meaning kept?), and how far from
eager fp32 PyTorch (bounded by the recipe's budget: is it still the model?).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from pipeline import backends, compare, metrics, samples
from pipeline.errors import BuildError, ExportyardError, ParityError, RecipeError
from pipeline.reference import Answers, Outputs
from pipeline.store import Stored, write_json
from pipeline.types import (
    Distance,
    MetricResult,
    OutputKind,
    ParityReport,
    Recipe,
    Reporter,
    Runner,
    Scheme,
    SizeParity,
    Target,
)


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
    combinations = samples.combinations(recipe)
    steps = len(combinations) + 1
    with backends.loaded(engine, target) as run:
        sizes = []
        for done, combination in enumerate(combinations):
            report(done, steps, f"parity {target.name} {scheme} at {_spell(combination)}")
            sizes.append(_at(run, model, answers, combination, kinds))
        report(len(combinations), steps, f"parity {target.name} {scheme} on evaluation data")
        metric, failure = _evaluate(recipe, run, answers, kinds)
    report(steps, steps, f"parity {target.name} {scheme}")
    reasons = [*_judge(sizes, target, scheme), *_judge_metric(recipe, metric), *failure]
    found = ParityReport(
        recipe=recipe.name,
        target=target.name,
        scheme=scheme,
        sizes=tuple(sizes),
        metric=metric,
        passed=not reasons,
        reasons=tuple(reasons),
    )
    write_json(out / "parity.json", found.plain())
    return {"passed": found.passed}


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


def _evaluate(
    recipe: Recipe, run: Runner, answers: Answers, kinds: Mapping[str, OutputKind]
) -> tuple[MetricResult, list[str]]:
    asked = answers.evaluation()
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


def _judge(sizes: list[SizeParity], target: Target, scheme: Scheme) -> list[str]:
    """Where the engine isn't the graph that it came from: at most one line a size."""
    reasons = []
    for one in sizes:
        if one.error is not None:
            reasons.append(f"fails at {_spell(one.sizes)}: {one.error}")
            continue
        broken = [text for found in one.vs_onnx for text in compare.violations(found, target.vs_onnx[scheme])]
        if broken:
            reasons.append(f"not its ONNX graph at {_spell(one.sizes)}: {'; '.join(broken)}")
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
