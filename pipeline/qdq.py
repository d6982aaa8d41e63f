"""A graph rewritten so that planned operators run in 8-bit integers: Q/DQ pairs, or products with dynamic scales.

Original tensors keep their names, so that inputs, outputs and what branches read stay valid; new names are an
original one with a suffix after a colon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from pipeline.graph import Graph, attribute, drop_unused
from pipeline.integer import ANCHORS, MOVERS, Form, Plan, activation_after, channel_axis, data_inputs

Range = tuple[float, float]
_TINY = float(np.finfo(np.float32).tiny)
_INT32 = float(2**31 - 1024)  # a bias may reach this far; the rest is room for rounding


@dataclass
class _Writer:
    """The new graph while it is written."""

    graph: Graph
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        """Add a constant, once."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.array(value, order="C"), name)
        return name

    def node(self, operator: str, inputs: list[str], output: str, **attributes: int) -> str:
        """Add a node, named after its output."""
        node = helper.make_node(operator, inputs, [output], name=f"{output}:{operator}")
        node.attribute.extend(helper.make_attribute(key, value) for key, value in sorted(attributes.items()))
        self.nodes.append(node)
        return output

    def finish(self) -> None:
        """Put all that was written into the model."""
        graph = self.graph.model.graph
        del graph.node[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.constants.values())
        # shapes of tensors whose meaning moved would be wrong, and engines infer them anyway
        del graph.value_info[:]
        drop_unused(self.graph.model)


@dataclass(frozen=True)
class Scale:
    """How one tensor is quantised: ``real = scale * (integer - zero)``; names of its constants start with `name`."""

    name: str
    scale: NDArray[np.float32]
    zero: NDArray[np.integer[Any]]


def activation_scale(name: str, span: Range, form: Form) -> Scale:
    """The scale of an activation over the range `span`: uint8 with a zero point, or symmetric int8."""
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    if form == "s8s8":
        scale = np.float32(max(-low, high) / 127)
        return Scale(name, np.array(scale if scale > _TINY else 1, np.float32), np.array(0, np.int8))
    scale = np.float32((high - low) / 255)
    if not scale > _TINY:
        return Scale(name, np.array(1, np.float32), np.array(0, np.uint8))
    return Scale(name, np.array(scale), np.array(np.clip(np.round(-low / float(scale)), 0, 255), np.uint8))


def weight_scale(name: str, weight: NDArray[np.float32], axis: int | None, least: NDArray[np.float32] | None) -> Scale:
    """The scale of a weight: symmetric int8 per channel of `axis`, or uint8 with one zero point where that is None.

    Args:
        name: of the weight.
        weight: its values.
        axis: dimension of the channels.
        least: scales may not be smaller than these.
    """
    if axis is None:
        return activation_scale(name, (float(weight.min(initial=0)), float(weight.max(initial=0))), "u8u8")
    others = tuple(dim for dim in range(weight.ndim) if dim != axis)
    scale = (np.abs(weight).max(axis=others, initial=0) / 127).astype(np.float32)
    scale = np.where(scale > _TINY, scale, np.float32(1))
    if least is not None:
        scale = np.maximum(scale, least)
    return Scale(name, scale.astype(np.float32), np.zeros(len(scale), np.int8))


def quantized(value: NDArray[np.float32], how: Scale, axis: int | None = None) -> NDArray[np.generic]:
    """`value` in the integers of `how`; what lies outside of the range is clipped."""
    shape = [1] * value.ndim
    if axis is not None:
        shape[axis] = -1
    ends = np.iinfo(how.zero.dtype)
    # -128 is left out of symmetric int8, so that a value and its negative are equally exact
    low = -127 if how.zero.dtype == np.int8 else ends.min
    steps = np.round(value / how.scale.reshape(shape)) + how.zero.astype(np.float32).reshape(shape)
    return np.clip(steps, low, ends.max).astype(how.zero.dtype)


def insert(graph: Graph, chosen: Plan, ranges: Mapping[str, Range], form: Form) -> None:
    """Rewrite the model of `graph` in place: ``QuantizeLinear`` and ``DequantizeLinear`` around what `chosen` names.

    Raises:
        KeyError: `ranges` lacks a tensor of the plan.
    """
    writer, nodes = _Writer(graph), set(chosen.nodes)
    scales = _scales(graph, chosen, ranges, form)
    for node in graph.model.graph.node:
        fresh = onnx.NodeProto()
        fresh.CopyFrom(node)
        writer.nodes.append(fresh)
        if node.name not in nodes:
            continue
        writer.nodes.pop()
        _quantize_inputs(writer, fresh, chosen, scales, form)
        if node.op_type in ANCHORS:
            _quantize_weights(writer, fresh, scales[node.input[0]], form)
        writer.nodes.append(fresh)
        for position, name in enumerate(node.output):
            if name in chosen.tensors and not _absorbed(graph, chosen, name, form):
                fresh.output[position] = f"{name}:float"
                _pair(writer, f"{name}:float", name, scales[name])
    writer.finish()


def _absorbed(graph: Graph, chosen: Plan, name: str, form: Form) -> bool:
    """Whether the tensor needs no pair of its own, since engines fuse its maker with the activation that follows.

    ONNX Runtime drops a Relu only where the integer zero is the least integer; so symmetric forms keep the pair,
    without which the convolution would run in float.
    """
    return form != "s8s8" and activation_after(graph, chosen, name) is not None


def _scales(graph: Graph, chosen: Plan, ranges: Mapping[str, Range], form: Form) -> dict[str, Scale]:
    found: dict[str, Scale] = {}
    nodes = set(chosen.nodes)
    for node in graph.model.graph.node:
        if node.name not in nodes:
            continue
        for read in data_inputs(node):
            if read not in found and graph.constant(read) is None:
                found[read] = activation_scale(read, ranges[read], form)
        for made in node.output:
            if made not in chosen.tensors:
                continue
            # a mover's output has its input's scale, under the same constants
            if node.op_type in MOVERS:
                found[made] = found[node.input[0]]
                continue
            # what an activation cuts off needs no integers
            after = activation_after(graph, chosen, made)
            found[made] = activation_scale(made, ranges[after.output[0] if after is not None else made], form)
    return found


def _quantize_inputs(
    writer: _Writer, node: onnx.NodeProto, chosen: Plan, scales: Mapping[str, Scale], form: Form
) -> None:
    """Put a pair before each activation that `node` reads and that no integer node has quantised yet."""
    for position, name in enumerate(node.input):
        if name not in data_inputs(node) or name in chosen.tensors:
            continue
        if name not in writer.made:
            value = writer.graph.value(name)
            if value is None:
                writer.made[name] = _pair(writer, name, f"{name}:dequantized", scales[name])
            else:
                numbers = value.astype(np.float32)
                how = activation_scale(name, (float(numbers.min(initial=0)), float(numbers.max(initial=0))), form)
                writer.made[name] = _dequantized(writer, f"{name}:dequantized", quantized(numbers, how), how, None)
        node.input[position] = writer.made[name]


def _constants(writer: _Writer, how: Scale) -> list[str]:
    return [writer.constant(f"{how.name}:scale", how.scale), writer.constant(f"{how.name}:zero", how.zero)]


def _pair(writer: _Writer, source: str, result: str, how: Scale) -> str:
    numbers = _constants(writer, how)
    integer = writer.node("QuantizeLinear", [source, *numbers], f"{result}:quantized")
    return writer.node("DequantizeLinear", [integer, *numbers], result)


def _dequantized(writer: _Writer, result: str, value: NDArray[np.generic], how: Scale, axis: int | None) -> str:
    name = writer.constant(f"{how.name}:integer", value)
    attributes = {} if axis is None else {"axis": axis}
    return writer.node("DequantizeLinear", [name, *_constants(writer, how)], result, **attributes)


def _quantize_weights(writer: _Writer, node: onnx.NodeProto, read: Scale, form: Form) -> None:
    """Weight and bias of an anchor: int8 per channel (or uint8), and int32 in units of both scales."""
    axis = channel_axis(node)
    weight = np.asarray(writer.graph.value(node.input[1]), np.float32)
    bias = np.asarray(writer.graph.value(node.input[2]), np.float32) if len(node.input) > 2 and node.input[2] else None
    # the same weight may be used along another axis, or with a bias that needs coarser steps, by another node
    name = f"{node.input[1]}:{node.name}" if len(writer.graph.readers[node.input[1]]) > 1 else node.input[1]
    least = None if bias is None else (np.abs(bias) / float(read.scale) / _INT32).astype(np.float32)
    how = weight_scale(name, weight, None if form == "u8u8" else axis, least)
    numbers = quantized(weight, how, None if form == "u8u8" else axis)
    node.input[1] = _dequantized(writer, f"{name}:dequantized", numbers, how, None if form == "u8u8" else axis)
    if bias is None:
        return
    scale = np.broadcast_to(np.asarray(read.scale * how.scale, np.float32), bias.shape)
    steps = np.clip(np.round(bias / scale.astype(np.float64)), -_INT32, _INT32).astype(np.int32)
    # always per node: its unit depends on what the node reads
    unit = Scale(f"{node.input[2]}:{node.name}", scale.copy(), np.zeros(len(bias), np.int32))
    node.input[2] = _dequantized(writer, f"{unit.name}:dequantized", steps, unit, 0)


def insert_dynamic(graph: Graph, chosen: Plan) -> None:
    """Rewrite the model of `graph` in place: matrix products in integers, activations quantised as they come."""
    writer, nodes = _Writer(graph), set(chosen.nodes)
    for node in graph.model.graph.node:
        if node.name in nodes:
            _dynamic_product(writer, node)
        else:
            fresh = onnx.NodeProto()
            fresh.CopyFrom(node)
            writer.nodes.append(fresh)
    writer.finish()


def _dynamic_product(writer: _Writer, node: onnx.NodeProto) -> None:
    read, weight_name, output = node.input[0], node.input[1], node.output[0]
    if read not in writer.made:
        names = [f"{read}:dynamic", f"{read}:dynamic:scale", f"{read}:dynamic:zero"]
        writer.nodes.append(helper.make_node("DynamicQuantizeLinear", [read], names, name=f"{names[0]}:Quantize"))
        writer.made[read] = names[0]
    integer = writer.made[read]
    weight = np.asarray(writer.graph.value(weight_name), np.float32)
    if attribute(node, "transB", 0):
        weight = weight.T
    how = weight_scale(f"{weight_name}:{node.name}", weight, 1, None)
    value = writer.constant(f"{how.name}:integer", quantized(weight, how, 1))
    scale, zero = _constants(writer, how)
    sums = writer.node("MatMulInteger", [integer, value, f"{integer}:zero", zero], f"{output}:sums")
    # keeps the name and the origin of what it stands for, so that a profile can be read by module
    writer.nodes[-1].name = node.name
    writer.nodes[-1].metadata_props.extend(node.metadata_props)
    floats = writer.node("Cast", [sums], f"{output}:floats", to=onnx.TensorProto.FLOAT)
    unit = writer.node("Mul", [f"{integer}:scale", scale], f"{output}:unit")
    bias = node.input[2] if len(node.input) > 2 else ""
    writer.node("Mul", [floats, unit], f"{output}:product" if bias else output)
    if bias:
        writer.node("Add", [f"{output}:product", bias], output)
