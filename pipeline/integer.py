"""Which operators of a graph run in 8-bit integers.

Anchors (`Conv`, `MatMul`, `Gemm` with constant weights) are worth it by themselves. Followers (additions,
activations, pooling, reshaping) join where everything that they read is already integer and something that reads
them is, so that the data stays integer in between. Products of two activations stay in float: they cost accuracy
and save little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx

from pipeline.graph import Graph, attribute

ANCHORS = ("Conv", "MatMul", "Gemm")
MOVERS = ("MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split")
"""Their outputs are values of their inputs, so both share one scale."""
COMPUTERS = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool")
_DATA_FIRST = (*MOVERS, "Clip")  # only their first input is data

Form = Literal["u8s8", "s8s8", "u8u8", "dynamic"]


@dataclass(frozen=True)
class Plan:
    """What becomes integer.

    Attributes:
        nodes: names of the nodes that compute in integers, in graph order.
        tensors: the float tensors that they leave quantised.
        floats: for each anchor that stays in float, why.
    """

    nodes: tuple[str, ...]
    tensors: frozenset[str]
    floats: Mapping[str, str]


def plan(graph: Graph, *, form: Form = "u8s8", exclude: Iterable[str] = (), strange: Iterable[str] = ()) -> Plan:
    """Choose the nodes of `graph` that run in integers.

    Args:
        graph: a float32 model.
        form: ``dynamic`` takes matrix products only, and no followers.
        exclude: names of nodes that stay in float.
        strange: tensors that no range fits, because NaN or infinity was seen in them.
    """
    left, odd = set(exclude), set(strange)
    chosen: dict[str, onnx.NodeProto] = {}
    tensors: set[str] = set()
    floats: dict[str, str] = {}
    for node in graph.model.graph.node:
        if node.op_type in ANCHORS:
            reason = _obstacle(graph, node, form)
        elif form != "dynamic" and _follows(graph, node, tensors):
            reason = None
        else:
            continue
        if reason is None and node.name in left:
            reason = "excluded"
        if reason is None and not odd.isdisjoint((*data_inputs(node), *_results(node, form))):
            reason = "NaN or infinity among its values"
        if reason is None:
            chosen[node.name] = node
            tensors.update(_results(node, form))
        elif node.op_type in ANCHORS:
            floats[node.name] = reason
    _drop_dead_ends(graph, chosen, tensors)
    return Plan(tuple(chosen), frozenset(tensors), floats)


def _results(node: onnx.NodeProto, form: Form) -> list[str]:
    # a matrix product hands on floats: ONNX Runtime has fast kernels for that, and it costs less accuracy
    if form == "dynamic" or node.op_type in ("MatMul", "Gemm"):
        return []
    return [name for name in node.output if name]


def _obstacle(graph: Graph, node: onnx.NodeProto, form: Form) -> str | None:
    """Why an anchor can't be quantised, or None."""
    if form == "dynamic" and node.op_type == "Conv":
        return "dynamic convolutions are slower than float ones"
    weight = graph.constant(node.input[1])
    if weight is None or weight.data_type != onnx.TensorProto.FLOAT:
        return "the weight is not a float32 constant"
    if graph.constant(node.input[0]) is not None:
        return "its input is a constant"
    if node.op_type == "MatMul" and len(weight.dims) != 2:
        return f"the weight has rank {len(weight.dims)}, expected 2"
    if node.op_type == "Gemm" and (
        attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0
    ):
        return "Gemm with transA, alpha or beta"
    if len(node.input) > 2 and node.input[2]:
        bias = graph.constant(node.input[2])
        if (
            bias is None
            or bias.data_type != onnx.TensorProto.FLOAT
            or len(bias.dims) != 1
            or bias.dims[0] != weight.dims[channel_axis(node)]
        ):
            return "the bias is not a constant with one value per channel"
    return None


def channel_axis(node: onnx.NodeProto) -> int:
    """The dimension of an anchor's weight that its output channels are on."""
    return 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1


def data_inputs(node: onnx.NodeProto) -> list[str]:
    """The inputs of an anchor or follower that hold activations; shapes, bounds, weights and biases are none."""
    first = node.op_type in ANCHORS or node.op_type in _DATA_FIRST
    return list(node.input[:1]) if first else [name for name in node.input if name]


def _follows(graph: Graph, node: onnx.NodeProto, tensors: set[str]) -> bool:
    if node.op_type not in MOVERS and node.op_type not in COMPUTERS:
        return False
    if node.op_type == "MaxPool" and len(node.output) > 1:
        return False
    # ONNX Runtime 1.31 counts what lies beyond the edge here in integers, and doesn't in floats
    if node.op_type == "AveragePool" and attribute(node, "ceil_mode", 0) and attribute(node, "count_include_pad", 0):
        return False
    read = data_inputs(node)
    return any(name in tensors for name in read) and all(
        name in tensors or graph.is_float_constant(name) for name in read
    )


def _drop_dead_ends(graph: Graph, chosen: dict[str, onnx.NodeProto], tensors: set[str]) -> None:
    """Followers whose results only float operators read go back to float: nothing would be gained."""
    for name, node in reversed(list(chosen.items())):
        if node.op_type in ANCHORS:
            continue
        readers = [reader for output in node.output for reader in graph.readers.get(output, [])]
        if not any(reader.name in chosen for reader in readers):
            del chosen[name]
            tensors.difference_update(node.output)


def activations(graph: Graph) -> list[str]:
    """The tensors whose ranges any plan for `graph` may ask for, whatever it excludes; sorted."""
    found: set[str] = set()
    reached: set[str] = set()
    for node in graph.model.graph.node:
        anchor = node.op_type in ANCHORS and _obstacle(graph, node, "u8s8") is None
        if not anchor and not _follows(graph, node, reached):
            continue
        reached.update(_results(node, "u8s8"))
        found.update(name for name in data_inputs(node) if graph.constant(name) is None)
        # a mover shares the range of what it reads
        if node.op_type not in MOVERS:
            found.update(_results(node, "u8s8"))
    return sorted(found)


def activation_after(graph: Graph, chosen: Plan, name: str) -> onnx.NodeProto | None:
    """The integer Relu or Clip that alone reads the tensor, if there is one."""
    readers = graph.readers.get(name, [])
    if name in graph.outputs or len(readers) != 1 or readers[0].op_type not in ("Relu", "Clip"):
        return None
    reader = readers[0]
    return reader if reader.name in chosen.nodes and reader.output[0] in chosen.tensors else None
