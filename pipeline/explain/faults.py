"""What is wrong with an operator that departs: which node of the reference it is, and in a word how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from pipeline import compare
from pipeline.explain import operators as explain_operators
from pipeline.explain import pairs as explain_pairs
from pipeline.explain.operators import Operators
from pipeline.explain.steps import Step
from pipeline.graph import Graph, reads
from pipeline.macs import FAMILY

Array = NDArray[Any]

_CONVERSIONS = explain_pairs.CONVERSIONS
# what each input of an operator that multiplies is, by its place; scales and zero points of what is read come twice
_QLINEAR = ("x", "scale", "zero point", "weight", "scale", "zero point", "scale", "zero point", "bias")
_ROLES: Mapping[str, Sequence[str]] = {
    "Conv": ("x", "weight", "bias"),
    "FusedConv": ("x", "weight", "bias"),
    "Gemm": ("x", "weight", "bias"),
    "MatMul": ("x", "weight"),
    "FusedMatMul": ("x", "weight"),
    "Add": ("bias", "bias"),
    "BiasGelu": ("x", "bias"),
    "SkipLayerNormalization": ("x", "x", "weight", "bias", "bias"),
    "LayerNormalization": ("x", "weight", "bias"),
    "QLinearConv": _QLINEAR,
    "QLinearMatMul": _QLINEAR,
    "QGemm": ("x", "scale", "zero point", "weight", "scale", "zero point", "bias", "scale", "zero point"),
    "QLinearAdd": ("x", "scale", "zero point", "x", "scale", "zero point", "scale", "zero point"),
    "MatMulIntegerToFloat": ("x", "weight", "scale", "scale", "zero point", "zero point", "bias"),
    "DynamicQuantizeMatMul": ("x", "weight", "scale", "zero point", "bias"),
    "QuantizeLinear": ("x", "scale", "zero point"),
    "DequantizeLinear": ("weight", "scale", "zero point"),
}
# words for an attribute that differs
_ATTRIBUTES = {
    "epsilon": "epsilon",
    "perm": "layout",
    "axis": "axis",
    "axes": "axis",
    "alpha": "scale",
    "activation": "activation",
    "approximate": "operator differs",
}
_RESIZE = ("mode", "coordinate_transformation_mode", "nearest_mode", "cubic_coeff_a", "antialias")


@dataclass(frozen=True)
class Fault:
    """The node of the reference that is at fault, and how: `kind` in two or three words, `detail` in a clause."""

    node: onnx.NodeProto
    kind: str
    detail: str = ""


def of(step: Step, engine: Operators, reference: Operators) -> Fault:
    """The fault of a step that departs."""
    nodes = list(step.nodes) or _maker(reference.graph, step.view.name)
    found = next(_found(step, nodes, engine, reference), None)
    if found is not None:
        return found
    main = principal(step, reference.graph)
    return Fault(main, *by_numbers(step))


def principal(step: Step, reference: Graph) -> onnx.NodeProto:
    """The node that a step is about: the one that the engine's operator is named after, or the last that computes."""
    nodes = list(step.nodes) or _maker(reference, step.view.name)
    for runs in reversed(step.runs):
        for node in nodes:
            if node.op_type not in _CONVERSIONS and explain_pairs.alike(runs, node):
                return node
    computing = [node for node in nodes if node.op_type not in _CONVERSIONS]
    if computing:
        return next((node for node in computing if node.op_type in FAMILY), computing[-1])
    if nodes:
        return _source(reference, nodes[-1])
    readers = [node for node in reference.readers.get(step.view.name, []) if node.op_type not in _CONVERSIONS]
    return readers[0] if readers else onnx.NodeProto(name=step.view.name)


def _maker(reference: Graph, name: str) -> list[onnx.NodeProto]:
    maker = reference.makers.get(name)
    return [] if maker is None else [maker]


def _source(reference: Graph, node: onnx.NodeProto) -> onnx.NodeProto:
    """The node whose numbers `node` only converts; the one that reads them where nothing makes them."""
    start = node
    while node.op_type in _CONVERSIONS and node.input:
        maker = reference.makers.get(node.input[0])
        if maker is None:
            break
        node = maker
    while node.op_type in _CONVERSIONS:
        readers = [reader for name in start.output for reader in reference.readers.get(name, [])]
        if not readers:
            return start
        node = start = readers[0]
    return node


def _found(step: Step, nodes: Sequence[onnx.NodeProto], engine: Operators, reference: Operators) -> Iterator[Fault]:
    """The faults that can be pointed at, the surest first."""
    yield from _dropped(step, nodes, reference)
    for runs in step.runs:
        yield from _constants(step, runs, nodes, engine, reference)
    for runs in step.runs:
        yield from _attributes(runs, nodes, reference)
    yield from _left_out(step, reference)


def _dropped(step: Step, nodes: Sequence[onnx.NodeProto], reference: Operators) -> Iterator[Fault]:
    for name in step.unread:
        reader = next((node for node in nodes if name in reads(node)), None)
        if reader is None:
            continue
        after = {node.op_type for node in nodes} | {
            one.op_type for made in reader.output for one in reference.graph.readers.get(made, [])
        }
        mask = reader.op_type in ("Add", "Where") and "Softmax" in after
        yield Fault(reader, "mask" if mask else "input dropped", f"`{name}` isn't read")


def _constants(
    step: Step, runs: onnx.NodeProto, nodes: Sequence[onnx.NodeProto], engine: Operators, reference: Operators
) -> Iterator[Fault]:
    roles = _ROLES.get(runs.op_type, ())
    main = next((node for node in nodes if explain_pairs.alike(runs, node)), None)
    for place, name in enumerate(runs.input):
        value = engine.value(name) if name else None
        if value is None:
            continue
        role = roles[place] if place < len(roles) else "constant"
        if role in ("scale", "zero point") and reference.value(name) is None:
            wanted = _among(role, nodes, reference)
        else:
            wanted = _wanted(runs, role, name, main, reference)
        value = explain_pairs.resigned(value, wanted[1][0].dtype) if wanted is not None else value
        same = np.array_equal if wanted is not None and wanted[0] == name else partial(_same, role)
        if wanted is None or any(same(value, one) for one in wanted[1]):
            continue
        holder = next((node for node in nodes if wanted[0] in node.input), None) or main
        if holder is None:
            continue
        if holder.op_type in _CONVERSIONS:
            holder = main or _source(reference.graph, holder)
        kind = _constant_kind(role, value, wanted[1][0])
        if kind == "scale" and value.size == wanted[1][0].size == 1 and value.item() < wanted[1][0].item():
            kind = by_numbers(step)[0] if step.made is not None else kind
            kind = kind if kind == "range saturates" else "scale"
        yield Fault(holder, kind, f"constant `{wanted[0]}` has other values")


def _wanted(
    runs: onnx.NodeProto, role: str, name: str, main: onnx.NodeProto | None, reference: Operators
) -> tuple[str, list[Array]] | None:
    """The constant of the reference that the engine's constant `name` is, each way it may be laid out."""
    same = reference.value(name)
    if same is not None:
        return name, [same]
    if main is None or role not in ("weight", "bias") or FAMILY.get(runs.op_type) is None:
        return None
    where = {"weight": 1, "bias": 2}[role]
    if len(main.input) <= where or not main.input[where]:
        return None
    found = reference.value(main.input[where])
    return None if found is None else (main.input[where], [found])


def _among(role: str, nodes: Sequence[onnx.NodeProto], reference: Operators) -> tuple[str, list[Array]] | None:
    """The scales (or zero points) of the reference's conversions, the last one first; the engine's is one of them."""
    place = 1 if role == "scale" else 2
    names = [
        node.input[place]
        for node in reversed(nodes)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > place
    ]
    found = [one for name in names if (one := reference.value(name)) is not None]
    return (names[0], found) if found and len(found) == len(names) else None


def _same(role: str, value: Array, wanted: Array) -> bool:
    """Whether two constants of different names hold the same, however laid out."""
    if value.shape == wanted.shape and np.array_equal(value, wanted):
        return True
    if value.size == wanted.size and value.ndim <= 1 >= wanted.ndim:
        return bool(np.array_equal(value.reshape(-1), wanted.reshape(-1)))
    if role == "bias" and value.ndim == 1 and value.size > wanted.size:  # filled up to whole blocks
        return bool(np.array_equal(value[: wanted.size], wanted.reshape(-1)))
    if value.ndim == 4 and wanted.ndim == 4:
        ways = explain_operators.unblocked_weights(value, wanted.shape)
        return any(way.shape == wanted.shape and np.array_equal(way, wanted) for way in ways)
    return value.ndim == 2 and value.T.shape == wanted.shape and bool(np.array_equal(value.T, wanted))


def _constant_kind(role: str, value: Array, wanted: Array) -> str:
    if role != "weight":
        return role
    one, two = (np.sort(each[each != 0].reshape(-1)) for each in (value, wanted))
    return "layout" if one.shape == two.shape and np.array_equal(one, two) else "weights differ"


def _attributes(runs: onnx.NodeProto, nodes: Sequence[onnx.NodeProto], reference: Operators) -> Iterator[Fault]:
    own = {entry.name: helper.get_attribute_value(entry) for entry in runs.attribute}
    for node in nodes:
        if not explain_pairs.alike(runs, node):
            continue
        for entry in node.attribute:
            value = helper.get_attribute_value(entry)
            if entry.name not in own or _plain(own[entry.name]) == _plain(value) or entry.name == "transB":
                continue
            if entry.name == "axis" and isinstance(value, int) and (own["axis"] < 0) != (value < 0):
                continue  # counted from the other end, perhaps
            if entry.name == "alpha" and runs.op_type == "FusedMatMul":
                continue
            kind = "resize" if node.op_type == "Resize" else _ATTRIBUTES.get(entry.name, "attribute")
            yield Fault(node, kind, f"`{entry.name}` is {_said(own[entry.name])} instead of {_said(value)}")
    active = _plain(own.get("activation", ""))
    fused = [node for node in nodes if node.op_type in explain_pairs.ACTIVE]
    if fused and active and fused[-1].op_type != active:
        yield Fault(fused[-1], "operator differs", f"the engine has {active} instead")
    yield from _factor(runs, own, nodes, reference)


def _factor(
    runs: onnx.NodeProto, own: Mapping[str, Any], nodes: Sequence[onnx.NodeProto], reference: Operators
) -> Iterator[Fault]:
    """A factor that was fused into a product."""
    if runs.op_type != "FusedMatMul":
        return
    wanted, holder = 1.0, None
    for node in nodes:
        factor = next(
            (one for name in node.input if (one := reference.value(name)) is not None and one.size == 1), None
        )
        if node.op_type in ("Mul", "Div") and factor is not None:
            number = float(factor.item())
            wanted, holder = (wanted * number if node.op_type == "Mul" else wanted / number), node
    if holder is not None and not np.isclose(wanted, own.get("alpha", 1.0), rtol=np.finfo(np.float32).eps * len(nodes)):
        yield Fault(holder, "scale", f"the factor is {own.get('alpha', 1.0):g} instead of {wanted:g}")


def _left_out(step: Step, reference: Operators) -> Iterator[Fault]:
    """The node without which the reference makes the very numbers that the engine makes."""
    if step.made is None or len(step.nodes) < 2:
        return
    for node in step.nodes:
        if node.op_type in (*_CONVERSIONS, *explain_pairs.MOVERS) or node.op_type in FAMILY:
            continue
        for name in node.input:
            found = _without(step, node, name, reference)
            if found is None or found.shape != step.made.shape:
                continue
            if compare.distance(step.view.name, found, step.made).sqnr_db >= step.allowed:
                yield Fault(node, "left out", f"the engine has the numbers of `{name}` behind it")
                return


def _without(step: Step, left: onnx.NodeProto, name: str, reference: Operators) -> Array | None:
    """What `step` would be if the node `left` returned its input `name`."""
    values = dict(step.inputs)
    for node in step.nodes:
        if node.name != left.name:
            try:
                values |= reference.run(node, values)
            except Exception:  # it can't do without: what it gets instead has another shape or dtype
                return None
        elif name in values:
            values[node.output[0]] = values[name]
        else:
            return None
    return values.get(step.view.name)


def _plain(value: object) -> object:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _said(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(_plain(value))


def by_numbers(step: Step) -> tuple[str, str]:
    """What the tensor itself says is wrong with it: a kind, and a clause."""
    made, wanted = step.made, step.wanted
    if made is None:
        return "layout", "its shape is another one, or it can't run at all"
    if np.issubdtype(made.dtype, np.floating):
        lost = int(np.count_nonzero(~np.isfinite(made) & np.isfinite(wanted)))
        if lost:
            half = made.dtype == np.float16 or any("16" in run.name for run in step.runs)
            return "overflow" if half or np.isinf(
                made
            ).any() else "not finite", f"{lost:,} of {made.size:,} are not finite"
        return "operator differs", ""
    ends = np.iinfo(made.dtype)
    more = int(np.count_nonzero(((made == ends.min) | (made == ends.max)) & (made != wanted)))
    if more:
        return "range saturates", f"{more:,} of {made.size:,} values have come to an end of the range"
    return "operator differs", ""
