"""Where an engine stops being its model: the operators that depart, level by level, and why nothing else is to blame.

Three levels, each looked at on its own: the engine against the form that it was built from, that form against the
fp32 graph, and the fp32 graph against the program.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from pydantic import JsonValue

from pipeline import buckets, calibrate, probe, samples, targets
from pipeline import graph as graphs
from pipeline.errors import ConversionError
from pipeline.explain import engine as explain_engine
from pipeline.explain import form as explain_form
from pipeline.reference import Answers
from pipeline.stages.quantize import FORMS, STATISTICS
from pipeline.store import Stored, write_json
from pipeline.types import Departure, Explanation, Layer, ParityReport, Recipe, Reporter, Scheme, Sizes, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Feeds = Mapping[str, NDArray[Any]]
    Silent = tuple[tuple[Departure, ...], str | None]

FILE = "explanation.json"
GRAPH = "model.onnx"
SEARCH = "search.json"
SAMPLES = 1  # of the evaluation data: an operator at fault is so for all; sizes differ more than samples do


@dataclass(frozen=True)
class Model:
    """What a recipe's model is at each level.

    Attributes:
        engine: artifact, or None for `file`, an engine that came from elsewhere.
        form: what the engine is compared with: a graph, or a program.
        source: what it was built from, where that is another one: the program, where there is a graph to compare with.
        tuning: the folder with the schedules that it was built with, if it was tuned.
        graph: in fp32; None for a model that has none.
        program: as captured.
        statistics: of calibration, for static INT8.
        data: samples.
    """

    engine: Stored | None
    form: Stored
    graph: Stored | None
    program: Stored
    data: Stored
    statistics: Stored | None = None
    file: Path | None = None
    source: Stored | None = None
    tuning: Path | None = None


def explanation(
    recipe: Recipe,
    model: Model,
    target: Target,
    scheme: Scheme,
    parity: ParityReport | None,
    out: Path,
    report: Reporter,
) -> dict[str, JsonValue]:
    """The stage: write ``explanation.json`` of an engine.

    Args:
        recipe: whose model it is.
        model: at each level.
        target: the engine's row.
        scheme: its numeric form.
        parity: of the engine, if it could be run: sizes at which it fails are looked at.
        out: where to write.
        report: told how far it is.
    """
    found = explain(recipe, model, target, scheme, parity, report)
    write_json(out / FILE, found.plain())
    return {"departures": len(found.departures), "compared": found.compared}


def explain(
    recipe: Recipe, model: Model, target: Target, scheme: Scheme, parity: ParityReport | None, report: Reporter
) -> Explanation:
    """See `explanation`, which writes this down."""
    asked = sizes(recipe, parity)
    feeds = inputs(recipe, model, asked)
    found: list[Departure] = []
    silent: list[str] = []
    layers: tuple[Layer, ...] = ()
    compared = 0
    unlike = _not_a_graph(model, target)
    if unlike is None:
        departures, layers, compared, reason = _engine(model, target, feeds, report)
    else:
        departures, reason = _cut(recipe, model, target, scheme, feeds, unlike, report)
    found += departures
    silent += [reason] if reason else []
    elsewhere = targets.unfit(target)
    if unlike is None and elsewhere is not None:
        silent.append(f"the kernels of `{target.name}` ({elsewhere}): its operators were run by this host's")
    departures, of_form, reason = _form(model, scheme, feeds, report)
    found += departures
    layers = of_form or layers
    silent += [reason] if reason else []
    departures, reason = _conversion(recipe, model, feeds)
    found += departures
    silent += [reason] if reason else []
    return Explanation(
        recipe=recipe.name,
        target=target.name,
        scheme=scheme,
        sizes=tuple(asked),
        departures=tuple(found),
        layers=layers,
        compared=compared,
        not_compared="; ".join(silent) or None,
    )


def inputs(recipe: Recipe, model: Model, asked: Sequence[Sizes]) -> list[Feeds]:
    """What the model is asked: the first evaluation sample, and inputs of the sizes `asked`; the same at every call."""
    drawn = itertools.islice(samples.samples(recipe, model.data, "evaluation"), SAMPLES)
    found: list[Feeds] = [_bounded(recipe, model, sample.feeds) for sample in drawn]
    return found + [Answers(recipe, model.program, model.data).feeds(one) for one in asked]


def _bounded(recipe: Recipe, model: Model, feeds: Feeds) -> Feeds:
    """The first rows of a sample: as many as keep all tensors of a call within a segment's memory of `probe`."""
    first = {spec.shape[0] if spec.shape else None for spec in recipe.inputs}
    axis = next(iter(first))
    if model.graph is None or len(first) > 1 or not isinstance(axis, str):
        return feeds
    graph = onnx.load(model.graph.file(GRAPH), load_external_data=False)
    _, held = graphs.infer(graph, {name: one.shape for name, one in feeds.items()})
    rows = len(next(iter(feeds.values())))
    kept = max(rows * probe.SEGMENT_BYTES // max(sum(held.values()), 1), recipe.axes[axis].min)
    return {name: one[:kept] for name, one in feeds.items()}


def sizes(recipe: Recipe, parity: ParityReport | None) -> list[Sizes]:
    """The axis sizes to look at: the least ones, and the smallest at which parity is worst."""
    least: Sizes = {name: axis.min for name, axis in recipe.axes.items()}
    if parity is None or parity.passed:
        return [least]
    broken = [one.sizes for one in parity.sizes if one.error is not None]
    worst = min(broken, key=lambda one: math.prod(one.values()), default=_worst(parity))
    return [least] if worst is None or dict(worst) == dict(least) else [least, worst]


def _worst(parity: ParityReport) -> Sizes | None:
    """The sizes at which the engine is farthest from its form."""
    known = [(min(found.sqnr_db for found in one.vs_onnx), one.sizes) for one in parity.sizes if one.vs_onnx]
    return min(known, key=lambda one: one[0])[1] if known else None


def _not_a_graph(model: Model, target: Target) -> str | None:
    """Why the engine can't be looked into operator by operator, or None if it can."""
    if model.file is not None:
        return None
    if target.backend != "onnxruntime" or target.options.get("provider", "cpu") != "cpu":
        return f"engines of `{target.name}` don't show what is inside"
    if GRAPH not in model.form.artifact.files:
        return "there is no graph that it was built from"
    assert model.engine is not None
    return "its engines are for fixed sizes, one for each bucket" if buckets.of(model.engine) else None


def _engine(
    model: Model, target: Target, feeds: Sequence[Feeds], report: Reporter
) -> tuple[tuple[Departure, ...], tuple[Layer, ...], int, str | None]:
    """The engine against its form, operator by operator."""
    source = model.form.file(GRAPH)
    if model.file is not None:
        path = model.file
    else:
        assert model.engine is not None
        path = model.engine.file("model.ort" if target.options.get("format") == "ort" else GRAPH)
    # what isn't for this processor is read as it is; a portable engine gets its layout where it is loaded
    finished = target.options.get("optimization") == "all" or targets.unfit(target) is not None
    made = explain_engine.as_run(path, source, finished=finished)
    try:
        return *explain_engine.departures(made, onnx.load(source), feeds, report), None
    except ConversionError as error:
        return (), (), 0, f"the engine: {error.message}"


def _cut(
    recipe: Recipe,
    model: Model,
    target: Target,
    scheme: Scheme,
    feeds: Sequence[Feeds],
    why: str,
    report: Reporter,
) -> Silent:
    """An engine that doesn't show what is inside: built again in parts."""
    if model.engine is None:
        return (), why
    from pipeline.explain import cutting  # with the backends' compilers, which nothing else here needs

    source = model.source or model.form
    return cutting.departures(recipe, source, model.engine, target, scheme, feeds, report, tuning=model.tuning)


def _form(
    model: Model, scheme: Scheme, feeds: Sequence[Feeds], report: Reporter
) -> tuple[tuple[Departure, ...], tuple[Layer, ...], str | None]:
    """The numeric form against fp32."""
    if scheme == "fp32":
        return (), (), None
    if model.graph is None or GRAPH not in model.form.artifact.files:
        return (), (), f"`{scheme}` isn't a form of an fp32 graph here, but of the program"
    if scheme == "bf16":
        return (), (), "ONNX Runtime hands out no bfloat16 numbers, so that the form can't be looked into"
    chosen: dict[str, Any] = {}
    if SEARCH in model.form.artifact.files:
        chosen = json.loads(model.form.file(SEARCH).read_text())["chosen"]
    form, fp32 = (onnx.load(one.file(GRAPH)) for one in (model.form, model.graph))
    seen = {} if model.statistics is None else calibrate.load(model.statistics.file(STATISTICS))
    corrected, smooth = bool(chosen.get("correct")), bool(chosen.get("smooth"))
    try:
        found, layers, _ = explain_form.departures(
            form, fp32, FORMS.get(scheme), feeds, seen, corrected=corrected, smooth=smooth, report=report
        )
    except ConversionError as error:
        return (), (), f"the form: {error.message}"
    return found, layers, None


def _conversion(recipe: Recipe, model: Model, feeds: Sequence[Feeds]) -> Silent:
    """The fp32 graph against the program."""
    if model.graph is None:
        return (), None
    from pipeline.explain import program as explain_program  # with torch, which nothing else here needs

    return explain_program.departures(recipe, model.program, model.graph, feeds), None
