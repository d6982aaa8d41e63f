"""What an engine of ONNX Runtime really computes in integers, read from its optimised graph; nothing is run for it.

The compute is counted on the graph that the engine was built from, whose operators are standard ones with shapes and
know the module that they came from. Each operator of the engine that multiplies is then matched with the nodes that it
stands for. Where that leaves a doubt there is no audit: a share that was guessed is worth nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import onnx

from pipeline import lineage, macs
from pipeline.graph import Graph, attribute, reads
from pipeline.macs import UnclearError
from pipeline.origin import module_of
from pipeline.types import AuditRow, Signature

Number = Literal["int8", "fp16", "bf16", "fp32", "fp64"]

_NUMBERS: Mapping[int, Number] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "fp64",
}


def audit(engine: Path, source: Path, signature: Signature) -> list[AuditRow]:
    """What runs in which numbers, operator by operator.

    Args:
        engine: ``model.onnx`` as ONNX Runtime optimised it.
        source: ``model.onnx`` that the engine was built from; its weights may lie beside it.
        signature: of both; its axes' opt sizes are those that compute is counted at.

    Raises:
        UnclearError: an operator can't be matched or counted without a guess.
    """
    made = Graph(onnx.load(engine, load_external_data=False))
    asked = Graph(onnx.load(source, load_external_data=False))
    nodes = _live(asked)
    _no_bodies(made)
    _no_bodies(asked)
    shapes = macs.shapes(asked, nodes, source, signature)
    runs_in = {node.name: _number(node, made) for node in made.model.graph.node if node.op_type in macs.FAMILY}
    return [
        AuditRow(
            node=node.name,
            module=module_of(node),
            operator=runs.op_type,
            runs_in=runs_in[runs.name],
            macs=macs.count(node, shapes),
            fell_back=_wanted(node, asked) and runs_in[runs.name] != "int8",
        )
        for runs, node in lineage.pairs(made, asked, nodes, runs_in)
    ]


def audit_by_count(integers: int, source: Path, signature: Signature) -> list[AuditRow]:
    """As `audit`, for an engine that says only how many of its contractions multiply 8-bit integers.

    Those can only be contractions that the graph asks for in integers, and that have a form which such an engine
    takes; where their number is another one, nobody can tell which they are.

    Args:
        integers: how many there are.
        source: as for `audit`.
        signature: as for `audit`.

    Raises:
        UnclearError: the numbers differ, or an operator can't be counted.
    """
    asked = Graph(onnx.load(source, load_external_data=False))
    _no_bodies(asked)
    nodes = _live(asked)
    shapes = macs.shapes(asked, nodes, source, signature)
    able = {node.name for node in nodes if _wanted(node, asked) and _dense(node, asked)}
    if len(able) != integers:
        raise UnclearError(f"the engine has {integers} contractions in INT8, the graph {len(able)} that can be")
    return [
        AuditRow(
            node=node.name,
            module=module_of(node),
            operator=node.op_type,
            runs_in="int8" if node.name in able else "fp32",
            macs=macs.count(node, shapes),
            fell_back=_wanted(node, asked) and node.name not in able,
        )
        for node in nodes
    ]


def audit_by_names(runs_in: Mapping[str, tuple[str, Number]], source: Path, signature: Signature) -> list[AuditRow]:
    """As `audit`, for an engine that says of each node what it became.

    Args:
        runs_in: the engine's operator and its numbers, by the name of the graph's node.
        source: as for `audit`.
        signature: as for `audit`.

    Raises:
        UnclearError: a node isn't in `runs_in`, or can't be counted.
    """
    asked = Graph(onnx.load(source, load_external_data=False))
    _no_bodies(asked)
    nodes = _live(asked)
    silent = next((node for node in nodes if node.name not in runs_in), None)
    if silent is not None:
        raise UnclearError(f"the engine doesn't say what became of `{silent.name}` ({silent.op_type})")
    shapes = macs.shapes(asked, nodes, source, signature)
    return [
        AuditRow(
            node=node.name,
            module=module_of(node),
            operator=runs_in[node.name][0],
            runs_in=runs_in[node.name][1],
            macs=macs.count(node, shapes),
            fell_back=_wanted(node, asked) and runs_in[node.name][1] != "int8",
        )
        for node in nodes
    ]


def _dense(node: onnx.NodeProto, graph: Graph) -> bool:
    """A matrix product, or a convolution over pictures in one group."""
    maker = graph.makers.get(node.input[1])
    weight = graph.constant(maker.input[0]) if maker is not None else None
    if weight is None:
        return False
    if node.op_type == "Conv":
        return len(weight.dims) == 4 and attribute(node, "group", 1) == 1
    return len(weight.dims) == 2


def int8_share(rows: Sequence[AuditRow]) -> float | None:
    """Share of all multiply-accumulates that are done in INT8; None where there are none at all."""
    total = sum(row.macs for row in rows)
    return sum(row.macs for row in rows if row.runs_in == "int8") / total if total else None


def _no_bodies(graph: Graph) -> None:
    for node in graph.model.graph.node:
        for body in (found for found in node.attribute if found.type == onnx.AttributeProto.GRAPH):
            if any(inner.op_type in macs.FAMILY for inner in body.g.node):
                raise UnclearError(
                    f"`{node.name}` ({node.op_type}) multiplies inside its body, and how often isn't known"
                )


def _live(graph: Graph) -> list[onnx.NodeProto]:
    """The nodes that multiply, whose result depends on an input (others are folded) and is needed."""
    weights = {tensor.name for tensor in graph.model.graph.initializer}
    varying = {value.name for value in graph.model.graph.input} - weights
    for node in graph.model.graph.node:
        if any(name in varying for name in reads(node)):
            varying.update(node.output)
    needed = set(graph.outputs)
    for node in reversed(graph.model.graph.node):
        if not needed.isdisjoint(node.output):
            needed.update(reads(node))
    return [
        node
        for node in graph.model.graph.node
        if node.op_type in macs.FAMILY and not needed.isdisjoint(node.output) and not varying.isdisjoint(node.output)
    ]


def _wanted(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether the graph asks for INT8: by the operator, or by a DequantizeLinear before both data and weight."""
    makers = [graph.makers.get(name) for name in node.input[:2]]
    return node.op_type in macs.INTEGER or all(one is not None and one.op_type == "DequantizeLinear" for one in makers)


def _number(runs: onnx.NodeProto, graph: Graph) -> Number:
    """What an operator of the engine multiplies."""
    if runs.op_type in macs.INTEGER:
        return "int8"
    for name in runs.input[:2]:
        kind = _type(name, graph)
        if kind in _NUMBERS:
            return _NUMBERS[kind]
    raise UnclearError(f"it isn't clear what numbers `{runs.name}` ({runs.op_type}) computes in")


def _type(name: str, graph: Graph) -> int:
    """Element type of a tensor of the engine, 0 if that can't be told; the graph keeps types of few of them."""
    model = graph.model.graph
    known = {value.name: value.type.tensor_type.elem_type for value in (*model.input, *model.value_info)}
    while True:
        constant = graph.constant(name)
        if constant is not None:
            return int(constant.data_type)
        if known.get(name):
            return int(known[name])
        maker = graph.makers.get(name)
        if maker is None or not maker.input:
            return 0
        if maker.op_type == "Cast":
            (kind,) = (entry.i for entry in maker.attribute if entry.name == "to")
            return int(kind)
        if maker.op_type in macs.INTEGER:  # one that a float operator reads makes floats, and CPUs have only one kind
            return onnx.TensorProto.FLOAT
        # a dequantised tensor has its scale's type, a Where its branches'; nearly all others hand on what they read
        name = maker.input[1] if maker.op_type in ("DequantizeLinear", "Where") else maker.input[0]
