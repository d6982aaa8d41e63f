"""Operators that multiply matrices, and how much: multiply-accumulates of a call, counted on standard ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from pipeline import probe
from pipeline.graph import Graph, attribute, inferred
from pipeline.types import Signature

Shape = tuple[int, ...]

INTEGER = {
    **dict.fromkeys(("QLinearConv", "ConvInteger"), "Conv"),
    **dict.fromkeys(("QLinearMatMul", "MatMulInteger", "MatMulInteger16", "QGemm"), "MatMul"),
    **dict.fromkeys(("MatMulIntegerToFloat", "DynamicQuantizeMatMul"), "MatMul"),
    "QAttention": "Attention",
    "DynamicQuantizeLSTM": "LSTM",
}
_FLOAT = {
    **dict.fromkeys(("Conv", "FusedConv", "NhwcFusedConv"), "Conv"),
    **dict.fromkeys(("MatMul", "FusedMatMul", "FusedMatMulActivation", "Gemm", "FusedGemm"), "MatMul"),
    **dict.fromkeys(("Attention", "MultiHeadAttention", "GroupQueryAttention"), "Attention"),
    **{name: name for name in ("ConvTranspose", "Einsum", "LSTM", "GRU", "RNN")},
}
FAMILY = INTEGER | _FLOAT
"""Operators that multiply matrices, of ONNX and of ONNX Runtime, and what they are in essence."""

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


class UnclearError(Exception):
    """Why an engine can't be audited; caught by the stage, which writes it down."""


def shapes(graph: Graph, nodes: Sequence[onnx.NodeProto], source: Path, signature: Signature) -> dict[str, Shape]:
    """Shapes of all that `nodes` read and make, at the opt sizes: inferred, or measured where that is not enough."""
    sizes = {name: axis.opt for name, axis in signature.axes.items()}
    given = {
        spec.name: tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape) for spec in signature.inputs
    }
    found: dict[str, Shape] = dict(given)
    found |= {tensor.name: tuple(tensor.dims) for tensor in graph.model.graph.initializer}
    for value in inferred(graph.model, given):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = tuple(dim.dim_value for dim in dims)
    wanted = {name for node in nodes for name in (*node.input, *node.output) if name}
    if wanted - set(found):
        feeds = {spec.name: np.ones(given[spec.name], spec.dtype) for spec in signature.inputs}
        for tensors in probe.over(source, [feeds], sorted(wanted - set(found))):
            found.update({name: array.shape for name, array in tensors})
    return found


def count(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Multiply-accumulates of one call of a node of the source graph."""
    try:
        read, made = [shapes[name] for name in node.input if name], shapes[node.output[0]]
    except KeyError as missing:
        raise UnclearError(f"nothing tells the shape of {missing}, which `{node.name}` reads or makes") from None
    kind = node.op_type
    if kind in ("Conv", "QLinearConv", "ConvInteger", "ConvTranspose"):
        weight = read[3 if kind == "QLinearConv" else 1]
        return _product(read[0] if kind == "ConvTranspose" else made) * _product(weight[1:])
    if kind == "Gemm":
        return _product(made) * read[0][0 if attribute(node, "transA", 0) else 1]
    if FAMILY[kind] == "MatMul":
        return _product(made) * read[0][-1]
    if kind == "Attention":  # q times k, and that times v: both as long as there are keys
        return (_product(read[0]) + _product(made)) * read[1][-2]
    if kind in _GATES:
        steps, batch, width = read[0]
        hidden = int(str(attribute(node, "hidden_size", 0)))
        return read[1][0] * steps * batch * _GATES[kind] * hidden * (width + hidden)
    if kind == "Einsum":
        return _einsum(node, read)
    raise UnclearError(f"nothing is known about the compute of `{node.name}` ({kind})")


def _einsum(node: onnx.NodeProto, read: Sequence[Shape]) -> int:
    equation = attribute(node, "equation", b"")
    text = equation.decode() if isinstance(equation, bytes) else str(equation)
    terms = text.replace(" ", "").partition("->")[0].split(",")
    if "." in text or len(terms) != 2:
        raise UnclearError(f"`{node.name}` is an Einsum with equation `{text}`, whose compute isn't counted")
    sizes = {
        label: size for term, shape in zip(terms, read, strict=True) for label, size in zip(term, shape, strict=True)
    }
    return _product(tuple(sizes.values()))


def _product(shape: Shape) -> int:
    return int(np.prod(shape, dtype=np.int64))
