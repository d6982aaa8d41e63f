"""The bfloat16 form of a float32 graph: what is multiplied is rounded to bfloat16, sums and all else stay float32.

That is what processors with bfloat16 dot products do. It is written with casts there and back, as Q/DQ pairs write
INT8: any runtime computes the same by doing what the file says, and one that knows the pattern uses the instructions.
Weights are kept in bfloat16, which halves them.
"""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import NotApplicable
from pipeline.graph import Graph, drop_unused

MULTIPLIES = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})


def convert(graph: Graph, exclude: Iterable[str] = ()) -> list[str]:
    """Rewrite the model of `graph` in place; returns the names of the nodes whose operands are now rounded.

    Args:
        graph: a float32 model.
        exclude: names of nodes that stay as they are.

    Raises:
        NotApplicable: the model has no product to round for.
    """
    model, kept = graph.model, set(exclude)
    chosen = [node for node in model.graph.node if _multiplies(node) and node.name not in kept]
    if not chosen:
        raise NotApplicable(
            "scheme `bf16` changes nothing in this model: it has no convolution or matrix product",
            hint="remove `bf16` from the schemes for this recipe",
        )
    names = {node.name for node in chosen}
    operands = dict.fromkeys(name for node in chosen for name in node.input[:2])
    casts = {name: list(_rounded(graph, name)) for name in operands}
    nodes: list[onnx.NodeProto] = []
    for name in operands:
        if name not in graph.makers:
            nodes += casts[name]
    for node in model.graph.node:
        fresh = onnx.NodeProto()
        fresh.CopyFrom(node)
        if node.name in names:
            for position, name in enumerate(node.input[:2]):
                fresh.input[position] = f"{name}:rounded"
        nodes.append(fresh)
        for name in node.output:
            nodes += casts.get(name, ())
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    drop_unused(model)
    return [node.name for node in chosen]


def _multiplies(node: onnx.NodeProto) -> bool:
    return node.op_type in MULTIPLIES and node.domain in ("", "ai.onnx")


def _rounded(graph: Graph, name: str) -> Iterable[onnx.NodeProto]:
    """The casts that make ``NAME:rounded``; a constant becomes one of bfloat16."""
    narrow, wide = f"{name}:bf16", f"{name}:rounded"
    value = graph.value(name)
    if value is None:
        yield helper.make_node("Cast", [name], [narrow], name=f"{narrow}:Cast", to=TensorProto.BFLOAT16)
    else:
        graph.model.graph.initializer.append(numpy_helper.from_array(value.astype(ml_dtypes.bfloat16), narrow))
    yield helper.make_node("Cast", [narrow], [wide], name=f"{wide}:Cast", to=TensorProto.FLOAT)
