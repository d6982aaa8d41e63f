"""ONNX operators that TVM's importer lacks, in operators that it has.

An LSTM over a fixed number of steps becomes those steps. One over a dynamic number stays, and the importer refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

MOST_STEPS = 256  # of an LSTM: each is a dozen operators to compile
REVERSED: Mapping[str, tuple[bool, ...]] = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}


@dataclass
class _Steps:
    """Nodes and constants that take one node's place."""

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, value: NDArray[Any]) -> str:
        name = f"{self.prefix}:c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def many(self, operator: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        place = f"{self.prefix}:{len(self.nodes)}"
        outputs = [f"{place}:{one}" for one in range(count)]
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, name=place, **attributes))
        return outputs

    def one(self, operator: str, *inputs: str, **attributes: Any) -> str:
        return self.many(operator, 1, *inputs, **attributes)[0]


def importable(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, changed in place, with its weights loaded."""
    if not any(node.op_type == "LSTM" for node in model.graph.node):
        return model
    constants = {one.name: one for one in model.graph.initializer}
    lengths = _lengths(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        steps = lengths.get(node.input[0]) if _is_plain_lstm(node, constants) else None
        if steps is None or steps > MOST_STEPS:
            nodes.append(node)
            continue
        made = _unrolled(
            node, {name: numpy_helper.to_array(constants[name]) for name in node.input[1:4] if name}, steps
        )
        nodes.extend(made.nodes)
        model.graph.initializer.extend(made.constants)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _lengths(model: onnx.ModelProto) -> dict[str, int]:
    """The first size of each tensor that has a fixed one."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {}
    for value in (*graph.value_info, *graph.input):
        sizes = value.type.tensor_type.shape.dim
        if sizes and sizes[0].HasField("dim_value"):
            found[value.name] = int(sizes[0].dim_value)
    return found


def _is_plain_lstm(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """As `torch.nn.LSTM` is exported: constant weights, its usual functions, every row as long as the others."""
    if node.op_type != "LSTM" or set(_attributes(node)) - {"hidden_size", "direction", "input_forget", "layout"}:
        return False
    unusual = any(_attributes(node).get(name, 0) for name in ("input_forget", "layout"))
    lengths, peepholes = ([*node.input, *[""] * 8][place] for place in (4, 7))
    return not (unusual or lengths or peepholes) and all(name in constants for name in node.input[1:4] if name)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _unrolled(node: onnx.NodeProto, arrays: Mapping[str, NDArray[Any]], steps: int) -> _Steps:
    made = _Steps(node.name or node.output[0])
    inputs = [*node.input, *[""] * 8]
    sides = [
        _one_direction(made, inputs, arrays, place, steps, backwards)
        for place, backwards in enumerate(REVERSED[_attributes(node).get("direction", b"forward").decode()])
    ]
    axis = {number: made.constant(np.array([number], np.int64)) for number in (0, 1)}
    results = (
        [[made.one("Unsqueeze", one, axis[0]) for one in states] for states, _, _ in sides],
        [[last] for _, last, _ in sides],
        [[cell] for _, _, cell in sides],
    )
    for name, parts in zip(node.output, results, strict=False):
        if not name:
            continue
        whole = [made.one("Concat", *own, axis=0) for own in parts]
        stacked = [made.one("Unsqueeze", one, axis[1 if parts is results[0] else 0]) for one in whole]
        made.nodes.append(
            helper.make_node(
                "Concat", stacked, [name], name=f"{made.prefix}:{name}", axis=1 if parts is results[0] else 0
            )
        )
    return made


def _one_direction(
    made: _Steps, inputs: list[str], arrays: Mapping[str, NDArray[Any]], place: int, steps: int, backwards: bool
) -> tuple[list[str], str, str]:
    """The state after each step, in the order of the steps' inputs, the last state and the last cell."""
    weight, recurrent = (arrays[inputs[one]][place] for one in (1, 2))
    # what doesn't depend on the state is one product for all steps
    gates = made.one("MatMul", inputs[0], made.constant(np.ascontiguousarray(weight.T)))
    if inputs[3]:
        gates = made.one("Add", gates, made.constant(arrays[inputs[3]][place].reshape(2, -1).sum(0)))
    each = made.many("Split", steps, gates, axis=0, num_outputs=steps)
    first = made.constant(np.array([0], np.int64))
    each = [made.one("Squeeze", one, first) for one in each]
    recurrence = made.constant(np.ascontiguousarray(recurrent.T))
    which = made.constant(np.array(place, np.int64))
    state, cell = (made.one("Gather", name, which, axis=0) if name else "" for name in inputs[5:7])
    states = []
    for own in reversed(each) if backwards else each:
        state, cell = _step(made, own, recurrence, state, cell)
        states.append(state)
    return (states[::-1] if backwards else states), state, cell


def _step(made: _Steps, gates: str, recurrence: str, state: str, cell: str) -> tuple[str, str]:
    """The next state and cell; an empty name stands for zeros."""
    if state:
        gates = made.one("Add", gates, made.one("MatMul", state, recurrence))
    put, out, keep, new = made.many("Split", 4, gates, axis=-1, num_outputs=4)
    kept = made.one("Mul", made.one("Sigmoid", put), made.one("Tanh", new))
    if cell:
        kept = made.one("Add", made.one("Mul", made.one("Sigmoid", keep), cell), kept)
    return made.one("Mul", made.one("Sigmoid", out), made.one("Tanh", kept)), kept
