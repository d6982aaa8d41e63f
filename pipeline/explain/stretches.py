"""A graph as stretches: what makes one known tensor out of others, and how often it rounds on the way."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import cast

import onnx

from pipeline.graph import Graph, attribute, inferred, reads
from pipeline.macs import FAMILY

Shapes = Mapping[str, tuple[int, ...]]

FUNCTIONS = frozenset(
    {
        *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Attention", "Celu", "Cos", "Cosh", "Elu", "Erf", "Exp"),
        *("Gelu", "GRU", "Log", "LogSoftmax", "LpNormalization", "LSTM", "Mish", "Pow", "ReduceLogSum"),
        *("ReduceLogSumExp", "RNN", "Selu", "Sigmoid", "Sin", "Sinh", "Softmax", "Softplus", "Softsign", "Swish"),
        *("Tan", "Tanh"),
    }
)
"""Operators that approximate a function, which IEEE 754 doesn't say how to round."""

ULPS = 16
"""How far such a function may be off, in units of the last place: the most that OpenCL's conformance table allows any
(for pow; the others are below)."""

_BEARING = frozenset(FAMILY) | frozenset({"Resize", "LayerNormalization", "BatchNormalization", "Softmax", "Gather"})


@dataclass(frozen=True)
class Stretch:
    """The nodes that make the tensor `output` from the known tensors `reads`, in the graph's order."""

    output: str
    nodes: tuple[onnx.NodeProto, ...]
    reads: tuple[str, ...]

    @property
    def bearing(self) -> onnx.NodeProto:
        """The node that does the work: the last one that multiplies, normalises or resamples, or else the last."""
        return next((node for node in reversed(self.nodes) if node.op_type in _BEARING), self.nodes[-1])


def stretches(graph: Graph, known: Collection[str]) -> list[Stretch]:
    """One for each of the tensors `known` that nodes make, in the graph's order."""
    order = {node.name: place for place, node in enumerate(graph.model.graph.node)}
    ends = [name for node in graph.model.graph.node for name in node.output if name in known]
    return [_stretch(graph, name, known, order) for name in ends]


def _stretch(graph: Graph, output: str, known: Collection[str], order: Mapping[str, int]) -> Stretch:
    found, edges, waiting = {}, dict[str, None](), [output]
    while waiting:
        maker = graph.makers[waiting.pop()]
        if maker.name in found:
            continue
        found[maker.name] = maker
        for name in reads(maker):
            if name in known or (name not in graph.makers and graph.constant(name) is None):
                edges[name] = None
            elif name in graph.makers:
                waiting.append(name)
    return Stretch(output, tuple(sorted(found.values(), key=lambda node: order[node.name])), tuple(edges))


def shapes(graph: Graph, given: Shapes) -> dict[str, tuple[int, ...]]:
    """Shapes of constants and, as far as shape inference finds them, of all tensors; `given` are known."""
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.model.graph.initializer}
    ends = {value.name for value in graph.model.graph.input}
    for value in inferred(graph.model, {name: shape for name, shape in given.items() if name in ends}):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    return {**found, **given}


def roundings(part: Stretch, known: Shapes) -> int:
    """How many numbers are rounded for one element that `part` makes: sums by their length, functions by `ULPS`."""
    return sum(_roundings(node, known) for node in part.nodes)


def _roundings(node: onnx.NodeProto, known: Shapes) -> int:
    function = ULPS**2 if node.op_type in FUNCTIONS else 0
    return 1 + function + _summands(node, [known.get(name, ()) for name in node.input], known.get(node.output[0], ()))


def _summands(node: onnx.NodeProto, read: list[tuple[int, ...]], made: tuple[int, ...]) -> int:
    """How many products or numbers are added up for one element; 0 where none are, or where no shape is known."""
    kind, first = node.op_type, read[0] if read else ()
    if kind in ("Conv", "ConvTranspose"):
        return math.prod(read[1]) // max(1, read[1][kind == "ConvTranspose"]) if len(read[1]) > 1 else 0
    if kind in ("MatMul", "Gemm"):
        return first[0 if attribute(node, "transA", 0) else -1] if first else 0
    if kind in ("LSTM", "GRU", "RNN"):
        return first[0] * (read[1][-1] + read[2][-1]) if first and read[1] and read[2] else 0
    if kind == "Attention":
        return first[-1] + read[1][-2] if first and len(read[1]) > 1 else 0
    if kind == "Einsum":
        return math.isqrt(math.prod(first) * math.prod(read[1]) // max(1, math.prod(made))) if len(read) == 2 else 0
    if kind in ("AveragePool", "LpPool"):
        return math.prod(int(size) for size in cast("list[int]", attribute(node, "kernel_shape", [])))
    if kind.startswith(("Reduce", "Global")):
        return math.prod(first) // max(1, math.prod(made))
    if kind.endswith("Normalization") or kind in ("Softmax", "LogSoftmax", "CumSum"):
        return max(first, default=0) if kind in ("Softmax", "LogSoftmax", "CumSum") else math.prod(first[1:])
    return 0
