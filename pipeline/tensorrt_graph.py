"""ONNX graphs as TensorRT takes them: its parser turns integers of 8 bits back into floats, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from pipeline.graph import Graph, attribute, drop_unused, save


def readable(source: Path, folder: Path) -> Path:
    """`source`, or if its biases are 32-bit integers an equal graph in `folder` whose biases are floats."""
    model = onnx.load(source, load_external_data=False)
    if not _of_int32(Graph(model)):
        return source
    model = onnx.load(source)
    biases_as_floats(model)
    made = folder / "model.onnx"
    save(model, made)
    return made


def biases_as_floats(model: onnx.ModelProto) -> None:
    """Replace each DequantizeLinear of a constant in 32-bit integers by the floats that it gives."""
    graph = Graph(model)
    for node in _of_int32(graph):
        model.graph.initializer.append(numpy_helper.from_array(_value(node, graph), node.output[0]))
        model.graph.node.remove(node)
    drop_unused(model)


def _of_int32(graph: Graph) -> list[onnx.NodeProto]:
    return [node for node in graph.model.graph.node if node.op_type == "DequantizeLinear" and _is_int32(graph, node)]


def _is_int32(graph: Graph, node: onnx.NodeProto) -> bool:
    constant = graph.constant(node.input[0])
    return constant is not None and constant.data_type == onnx.TensorProto.INT32


def _value(node: onnx.NodeProto, graph: Graph) -> NDArray[np.floating]:
    """The numbers that `node` makes; ONNX lets a 32-bit integer have no zero point but 0."""
    value, scale = graph.value(node.input[0]), graph.value(node.input[1])
    assert value is not None
    assert scale is not None
    if scale.ndim:
        axis = attribute(node, "axis", 1)
        assert isinstance(axis, int)
        scale = scale.reshape([-1 if index == axis % value.ndim else 1 for index in range(value.ndim)])
    found: NDArray[np.floating] = (value.astype(np.float32) * scale).astype(scale.dtype)
    return found
