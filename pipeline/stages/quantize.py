"""Stage: the fp32 graph in another numeric form. Names, axes and order of inputs and outputs stay as they are."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
from pydantic import JsonValue

from pipeline import bfloat, calibrate, half, host, integer, qdq, samples
from pipeline import graph as graphs
from pipeline.errors import ConversionError, DataError, NotApplicable, unknown
from pipeline.graph import Graph
from pipeline.store import Stored
from pipeline.types import RangeMethod, Recipe, Reporter, Scheme

STATISTICS = "statistics.safetensors"
FORMS: Mapping[str, integer.Form] = {
    "int8-dynamic": "dynamic",
    "int8-u8s8": "u8s8",
    "int8-s8s8": "s8s8",
    "int8-u8u8": "u8u8",
}


def tools() -> dict[str, str]:
    """Versions of the libraries that decide the bytes."""
    return host.versions(["onnx", "onnxruntime", "onnxruntime-gpu", "numpy"])


def statistics(recipe: Recipe, fp32: Stored, data: Stored, out: Path, report: Reporter) -> dict[str, JsonValue]:
    """Write ``statistics.safetensors``: what calibration saw of each tensor, whatever scheme or method will ask.

    Raises:
        DataError: there is no calibration sample, or the model can't run one.
    """
    total = recipe.calibration.samples if recipe.calibration is not None else 0
    count = 0

    def said(done: int, _total: int, what: str) -> None:
        nonlocal count
        count = done
        report(done, total, what)

    feeds = (sample.feeds for sample in samples.samples(recipe, data, "calibration"))
    found = calibrate.collect(fp32.file("model.onnx"), feeds, said)
    calibrate.save(found, out / STATISTICS)
    strange = sorted(name for name, one in found.items() if one.stray)
    return {"samples": count, "tensors": len(found), "not_finite": list(strange)}


def quantize(
    recipe: Recipe,
    fp32: Stored,
    scheme: Scheme,
    statistics: Stored | None,
    out: Path,
    report: Reporter,
    exclude: tuple[str, ...] = (),
) -> dict[str, JsonValue]:
    """Write ``model.onnx`` in the numeric form `scheme`, and ``signature.json``.

    Args:
        recipe: gives the range method; ``auto`` is minmax here, since only a search can measure which is best.
        fp32: the ONNX artifact to start from.
        scheme: any but fp32.
        statistics: artifact that `statistics` wrote; static schemes need it.
        out: empty folder.
        report: told of each step.
        exclude: names of nodes that stay in float.

    Raises:
        NotApplicable: the model has no operator that this form would change.
        DataError: a static scheme without calibration.
        ConversionError: the form can't be written.
        UsageError: `exclude` names a node that the model doesn't have.
    """
    what = f"quantize {scheme}"
    report(0, 3, what)
    model = onnx.load(fp32.file("model.onnx"))
    graph = Graph(model)
    _check_names(graph, exclude)
    before = graphs.weight_bytes(model)
    report(1, 3, what)
    if FORMS.get(scheme) == "dynamic":
        facts = _dynamic(graph, scheme, exclude)
    elif scheme in FORMS:
        facts = static(graph, scheme, seen(recipe, scheme, statistics), fixed_method(recipe) or "minmax", exclude)
    elif scheme == "fp16":
        facts = _half(graph, exclude)
    else:
        facts = _bfloat(graph, exclude)
    report(2, 3, what)
    write(model, fp32, out)
    report(3, 3, what)
    excluded: list[JsonValue] = [*sorted(exclude)]
    return {
        **facts,
        "excluded": excluded,
        "weight_bytes_before": before,
        "weight_bytes_after": graphs.weight_bytes(model),
    }


def _check_names(graph: Graph, exclude: tuple[str, ...]) -> None:
    known = {node.name for node in graph.model.graph.node}
    for name in exclude:
        if name not in known:
            raise unknown("node", name, known)


def fixed_method(recipe: Recipe) -> RangeMethod | None:
    """The range method that the recipe asks for, None where a measurement is to decide."""
    method = recipe.calibration.method if recipe.calibration is not None else "auto"
    return None if method == "auto" else method


def seen(recipe: Recipe, scheme: Scheme, stored: Stored | None) -> calibrate.Statistics:
    """What `statistics` wrote.

    Raises:
        DataError: the recipe has no calibration.
    """
    if stored is None or recipe.calibration is None:
        raise DataError(
            f"scheme `{scheme}` needs calibration data, and recipe `{recipe.name}` gives none",
            hint='add `[calibration]` with `data = "calibration.npz"` to recipe.toml, or use `int8-dynamic`',
        )
    return calibrate.load(stored.file(STATISTICS))


def plan(graph: Graph, scheme: Scheme, known: calibrate.Statistics, exclude: Iterable[str] = ()) -> integer.Plan:
    """What `scheme` makes integer in `graph`.

    Raises:
        NotApplicable: nothing.
    """
    strange = [name for name, one in known.items() if one.stray]
    chosen = integer.plan(graph, form=FORMS[scheme], exclude=exclude, strange=strange)
    if not chosen.nodes:
        raise _nothing(graph, scheme, chosen)
    return chosen


def static(
    graph: Graph, scheme: Scheme, known: calibrate.Statistics, method: RangeMethod, exclude: Iterable[str] = ()
) -> dict[str, JsonValue]:
    """Rewrite the model of `graph` in place in a static scheme; returns facts about it.

    Args:
        graph: stale after this.
        scheme: a static one.
        known: statistics of all tensors that the plan needs.
        method: how ranges are read from them.
        exclude: names of nodes that stay in float.

    Raises:
        NotApplicable: the model has no operator that this form would change.
        ConversionError: `known` is of another graph.
    """
    chosen = plan(graph, scheme, known, exclude)
    facts: dict[str, JsonValue] = {"method": method, **_facts(graph, chosen)}
    try:
        qdq.insert(graph, chosen, calibrate.ranges(known, method), FORMS[scheme])
    except KeyError as error:
        raise ConversionError(
            f"the calibration statistics say nothing about tensor {error}: they are of another graph",
            hint="run `exportyard export` again, which calibrates this one",
        ) from None
    return facts


def _dynamic(graph: Graph, scheme: Scheme, exclude: Iterable[str]) -> dict[str, JsonValue]:
    chosen = plan(graph, scheme, {}, exclude)
    facts = _facts(graph, chosen)
    qdq.insert_dynamic(graph, chosen)
    return facts


def _facts(graph: Graph, chosen: integer.Plan) -> dict[str, JsonValue]:
    kinds = {node.name: node.op_type for node in graph.model.graph.node if node.op_type != "Constant"}
    names = set(chosen.nodes)
    return {
        "quantized": dict(_count(kinds[name] for name in chosen.nodes)),
        "float": dict(_count(kind for name, kind in kinds.items() if name not in names)),
        "float_because": dict(sorted(chosen.floats.items())),
        "nodes": list(chosen.nodes),
    }


def _count(kinds: Iterable[str]) -> list[tuple[str, int]]:
    return sorted(Counter(kinds).items())


def _nothing(graph: Graph, scheme: Scheme, chosen: integer.Plan) -> NotApplicable:
    kinds = "Convolutions and matrix products" if scheme != "int8-dynamic" else "Matrix products"
    if chosen.floats:
        name, reason = next(iter(chosen.floats.items()))
        why = f"{len(chosen.floats)} such operators stay in float, `{name}` for one because {reason}"
    else:
        why = f"it has none; it has {', '.join(sorted({node.op_type for node in graph.model.graph.node})[:12])}"
    return NotApplicable(
        f"scheme `{scheme}` changes nothing in this model. {kinds} with constant weights would be quantised: {why}",
        hint=f"remove `{scheme}` from the schemes for this recipe; fp32 is what there is to ship",
    )


def _half(graph: Graph, exclude: tuple[str, ...]) -> dict[str, JsonValue]:
    kinds = {node.name: node.op_type for node in graph.model.graph.node if node.op_type != "Constant"}
    nodes, clipped = half.convert(graph, exclude)
    narrow = set(nodes)
    return {
        "narrowed": dict(_count(kinds[name] for name in nodes)),
        "float": dict(_count(kind for name, kind in kinds.items() if name not in narrow)),
        "constants_clipped": clipped,
    }


def _bfloat(graph: Graph, exclude: tuple[str, ...]) -> dict[str, JsonValue]:
    kinds = {node.name: node.op_type for node in graph.model.graph.node if node.op_type != "Constant"}
    narrow = set(bfloat.convert(graph, exclude))
    return {
        "narrowed": dict(_count(kinds[name] for name in narrow)),
        "float": dict(_count(kind for name, kind in kinds.items() if name not in narrow)),
    }


def write(model: onnx.ModelProto, fp32: Stored, out: Path) -> None:
    """Write ``model.onnx``, checked, and the ``signature.json`` of `fp32`, which it shares.

    Raises:
        ConversionError: the model is not valid ONNX.
    """
    path = out / "model.onnx"
    graphs.save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConversionError(
            f"the quantised graph is not valid ONNX: {first}", hint="this is a fault of ours; remove the scheme for now"
        ) from error
    shutil.copyfile(fp32.file("signature.json"), out / "signature.json")
