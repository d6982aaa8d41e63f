"""Convolutions that a scheme left in float, kept in float by every session that loads the engine.

ONNX Runtime (1.21 and later) quantises the float weights of a convolution or product whose input was dequantised by one
scale, coarsely and unasked, whenever a session is made with its default settings; so a device would undo the choice
of a scheme that left the operator in float because it is sensitive. Where the scale is written once per channel, always
the same, it doesn't (``WeightBiasQuantization`` in onnxruntime/core/optimizer/qdq_transformer).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from pipeline.graph import Graph, attribute, reads

DEQUANTIZE = "DequantizeLinear"


def keep(model: onnx.ModelProto) -> list[str]:
    """Rewrite, in place, what those operators read; returns their names."""
    graph = Graph(model)
    found = [node for node in model.graph.node if _at_risk(graph, node)]
    for node in found:
        _spread(graph, node)
    read = {name for node in model.graph.node for name in reads(node)} | graph.outputs
    idle = [node for node in model.graph.node if node.op_type == DEQUANTIZE and node.output[0] not in read]
    for node in idle:
        model.graph.node.remove(node)
    return [node.name for node in found]


def _at_risk(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or not graph.is_float_constant(node.input[1]):
        return False
    maker = graph.makers.get(node.input[0])
    if maker is None or maker.op_type != DEQUANTIZE:
        return False
    scale = graph.value(maker.input[1])
    return scale is not None and scale.size == 1


def _spread(graph: Graph, node: onnx.NodeProto) -> None:
    """Let `node` read a dequantisation of its own, with a scale for each channel of its input."""
    maker, nodes = graph.makers[node.input[0]], graph.model.graph.node
    axis, channels = _channels(graph, node)
    own = onnx.NodeProto()
    own.CopyFrom(maker)
    own.name = f"{node.name}:dequantize"
    own.output[0] = f"{node.name}:in0"
    for place, role in enumerate(("scale", "zero_point"), start=1):
        if len(maker.input) <= place or not maker.input[place]:
            continue
        value = graph.value(maker.input[place])
        assert value is not None
        own.input[place] = f"{node.name}:{role}"
        same = np.full(channels, value.reshape(()), value.dtype)
        graph.model.graph.initializer.append(numpy_helper.from_array(same, own.input[place]))
    del own.attribute[:]
    own.attribute.append(onnx.helper.make_attribute("axis", axis))
    node.input[0] = own.output[0]
    nodes.insert(list(nodes).index(node), own)


def _channels(graph: Graph, node: onnx.NodeProto) -> tuple[int, int]:
    """The axis of the input that is summed over, and its length."""
    weight = graph.constant(node.input[1])
    assert weight is not None
    if node.op_type == "Gemm":
        return int(not attribute(node, "transA", 0)), weight.dims[int(bool(attribute(node, "transB", 0)))]
    if node.op_type == "ConvTranspose":
        return 1, weight.dims[0]
    groups = attribute(node, "group", 1)
    assert isinstance(groups, int)
    return 1, weight.dims[1] * groups
