"""Stage: the program in an INT8 form, for backends that read programs and not ONNX graphs.

PT2E puts quantize and dequantize operators around those that a backend's quantizer chooses; the backend finds them
again and runs what is between in integers. Weights have one scale a channel, activations one a tensor.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from torch.export import ExportedProgram

from pipeline import compare, evaluations, metrics, retrace, samples
from pipeline import program as programs
from pipeline import quantizers as known
from pipeline.errors import ConversionError, DataError, NotApplicable, first_line, root_line
from pipeline.quantizers import Reach
from pipeline.reference import Answers
from pipeline.store import Stored
from pipeline.types import Distance, Recipe, Reporter, Scheme, Signature

SIGNATURE = "signature.json"
TRIED = 32  # evaluation samples on which reaches are compared
QUANTIZE = "quantized_decomposed.quantize"


@dataclass(frozen=True)
class Trial:
    """How good a quantised program is on some of the evaluation data; see `evaluations.Measured`."""

    drop: float
    vs_eager: tuple[Distance, ...]


def quantize_program(
    recipe: Recipe,
    program: Stored,
    data: Stored,
    scheme: Scheme,
    quantizer: str,
    answers: Answers,
    out: Path,
    report: Reporter,
) -> dict[str, JsonValue]:
    """Write ``program.pt2`` in the INT8 form `scheme`, and ``signature.json``.

    A static form first takes in all that the quantizer can; where that breaks the recipe's budget on some of the
    evaluation data, only what has weights. If that breaks it, too, the better of the two is kept: parity will judge.

    Args:
        recipe: its budget decides how far the form reaches.
        program: in fp32.
        data: with the calibration samples.
        scheme: one that the quantizer has.
        quantizer: see `quantizers.make`.
        answers: of eager fp32.
        out: empty folder.
        report: told of each step.

    Raises:
        NotApplicable: the quantizer finds nothing in this model.
        DataError: a static form without calibration samples, or the model can't run one.
        ConversionError: PT2E can't take the program.
        UnavailableError: the quantizer's package is not installed.
    """
    reaches, what = known.reaches(quantizer, scheme), f"quantize program {scheme} for {quantizer}"
    best: tuple[tuple[int, float], Reach, ExportedProgram] | None = None
    for done, reach in enumerate(reaches):
        report(done, len(reaches), f"{what}: {reach}")
        made = _quantized(recipe, program, data, scheme, quantizer, reach)
        trial = _tried(recipe, made, program.signature(), answers)
        broken = len(evaluations.outside(recipe, trial))
        rank = broken, -min((one.sqnr_db for one in trial.vs_eager if one.kind != "indices"), default=0.0)
        if best is None or rank < best[0]:
            best = rank, reach, made
        if not broken:
            break
    report(len(reaches), len(reaches), what)
    assert best is not None
    _, reach, made = best
    counts = _counts(made)
    programs.save(made, out / programs.FILE, recipe.root)
    shutil.copyfile(program.file(SIGNATURE), out / SIGNATURE)
    return {"reach": reach, "method": "histogram" if scheme != known.DYNAMIC else None, "quantized": counts}


def _quantized(
    recipe: Recipe, program: Stored, data: Stored, scheme: Scheme, quantizer: str, reach: Reach
) -> ExportedProgram:
    signature, module = program.signature(), programs.load_program(program, recipe).module(check_guards=False)
    with programs.quiet():  # importing them is not quiet, either
        chooser = known.make(quantizer, scheme, reach)
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        try:
            observed: Any = prepare_pt2e(module, chooser)
        except Exception as error:  # a quantizer's pass over a graph that it didn't expect
            raise ConversionError(
                f"PT2E can't quantise the program for `{quantizer}`: {root_line(error)}",
                hint=f"remove `{scheme}` from the row, or change that part of the model",
            ) from error
    _calibrate(recipe, observed, signature, data, scheme)
    try:
        with programs.quiet():
            converted = convert_pt2e(observed, fold_quantize=known.folds(quantizer))
        made = retrace.retraced(converted, signature, {name: axis.opt for name, axis in signature.axes.items()})
    except Exception as error:  # as above
        raise ConversionError(
            f"the quantised program can't be traced: {root_line(error)}", hint=f"remove `{scheme}` from the row"
        ) from error
    if not _counts(made):
        raise NotApplicable(
            f"scheme `{scheme}` changes nothing in this model: quantizer `{quantizer}` finds no operator that it takes",
            hint=f"remove `{scheme}` from the row; fp32 is what there is to ship",
        )
    return made


def _calibrate(recipe: Recipe, observed: Any, signature: Signature, data: Stored, scheme: Scheme) -> None:
    """Let the observers see the samples; a dynamic form needs one call, by which they learn their shapes."""
    if scheme == known.DYNAMIC:
        calls: Iterable[tuple[torch.Tensor, ...]] = [programs.examples(signature)]
    else:
        found = samples.samples(recipe, data, "calibration")
        calls = (_arguments(sample.feeds, signature) for sample in found)
    count = 0
    with torch.inference_mode():
        for arguments in calls:
            try:
                observed(*arguments)
            except Exception as error:  # an index that the model has no row for, say
                raise DataError(
                    f"recipe `{recipe.name}`, [calibration] sample {count}: the model fails on it: {first_line(error)}",
                    hint="see whether its values and sizes are such as the model takes",
                ) from error
            count += 1
    if not count:
        raise DataError(f"recipe `{recipe.name}` has no calibration samples", hint="add [calibration] to recipe.toml")


def _arguments(feeds: Mapping[str, Any], signature: Signature) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(feeds[spec.name].copy()) for spec in signature.inputs)


def _tried(recipe: Recipe, made: ExportedProgram, signature: Signature, answers: Answers) -> Trial:
    run, asked = programs.runner(programs.runnable(made), signature), answers.evaluation()
    some = [asked[place] for place in evaluations.spread(len(asked), TRIED)]
    reference, labels = [outputs for _, outputs in some], [sample.labels for sample, _ in some]
    found = [run(sample.feeds) for sample, _ in some]
    better, worse = (metrics.evaluate(recipe, one, labels, reference) for one in (reference, found))
    drop = better - worse if recipe.evaluation.higher_is_better else worse - better
    kinds = {spec.name: spec.kind for spec in recipe.outputs}
    distances = tuple(
        compare.pooled(name, [one[name] for one in reference], [one[name] for one in found], kind)
        for name, kind in kinds.items()
    )
    return Trial(drop, distances)


def _counts(made: ExportedProgram) -> dict[str, JsonValue]:
    """How many operators of each kind have only quantised tensors to read."""
    counted: Counter[str] = Counter()
    for node in made.graph.nodes:
        name = str(node.target)
        mine = node.op == "call_function" and not name.startswith("quantized_decomposed")
        if mine and any(_dequantises(one) for one in node.all_input_nodes):
            counted[name] += 1
    return {name: counted[name] for name in sorted(counted)}


def _dequantises(node: torch.fx.Node) -> bool:
    return str(node.target).startswith("quantized_decomposed.dequantize")
