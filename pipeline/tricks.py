"""Rewrites of the float graph that let it lose less in 8 bits and compute the same as before.

Neither is trusted: the search takes one only where a measurement says that it pays.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from pipeline import probe
from pipeline.graph import Graph, drop_unused
from pipeline.integer import Plan, channel_axis

STRENGTH = 0.65
"""How much of an activation's spread moves into the weights: the best of 0.35 to 0.95 for MiniLM."""

Array = NDArray[Any]


def smoothable(graph: Graph, chosen: Plan) -> dict[str, list[onnx.NodeProto]]:
    """The outputs of layer normalisations that planned products read, each with these products."""
    found: dict[str, list[onnx.NodeProto]] = {}
    nodes = set(chosen.nodes)
    for node in graph.model.graph.node:
        if node.name not in nodes or node.op_type not in ("MatMul", "Gemm"):
            continue
        maker = graph.makers.get(node.input[0])
        if maker is not None and maker.op_type == "LayerNormalization" and _by_channel(graph, maker):
            found.setdefault(node.input[0], []).append(node)
    return found


def _by_channel(graph: Graph, norm: onnx.NodeProto) -> bool:
    """Whether it has constants with one number for each place of the last dimension."""
    constants = [graph.constant(name) for name in norm.input[1:] if name]
    return all(one is not None and one.data_type == onnx.TensorProto.FLOAT and len(one.dims) == 1 for one in constants)


def peaks(model: Path, samples: Iterable[probe.Feeds], names: Iterable[str]) -> dict[str, Array]:
    """The largest magnitude in each channel (the last dimension) of the tensors `names`, over all samples."""
    found: dict[str, Array] = {}
    for tensors in probe.over(model, samples, list(names)):
        for name, array in tensors:
            top = np.abs(array.reshape(-1, array.shape[-1])).max(axis=0, initial=0)
            found[name] = np.maximum(found[name], top) if name in found else top
    return found


def smooth(graph: Graph, chosen: Plan, peak: Mapping[str, Array]) -> list[str]:
    """Rewrite the model of `graph` in place: large channels are divided by a number, and their weights times that.

    A layer normalisation does the division itself, in its own weights, where nobody but products reads it; elsewhere
    (BERT adds its output to the residual) a multiplication comes between.

    Args:
        graph: stale after this; index the model again.
        chosen: the plan for `graph`.
        peak: of each tensor of `smoothable`, as `peaks` tells.

    Returns:
        names of the tensors that the products read now; calibration hasn't seen them.
    """
    fresh, before = [], {}  # type: list[str], dict[str, onnx.NodeProto]
    for name, products in smoothable(graph, chosen).items():
        factor = _factor(graph, products, peak[name])
        for node in products:
            along = 1 - channel_axis(node)
            shape = [-1, 1] if along == 0 else [1, -1]
            weight = np.asarray(graph.value(node.input[1]), np.float32)
            node.input[1] = _constant(graph, node.input[1], node, weight * factor.reshape(shape))
        norm = graph.makers[name]
        if name not in graph.outputs and len(graph.readers[name]) == len(products):
            for place in range(1, len(norm.input)):
                if norm.input[place]:
                    value = np.asarray(graph.value(norm.input[place]), np.float32)
                    norm.input[place] = _constant(graph, norm.input[place], norm, value / factor)
            fresh.append(name)
            continue
        divide = _constant(graph, f"{name}:smooth:factor", None, 1 / factor)
        before[products[0].name] = helper.make_node(
            "Mul", [name, divide], [f"{name}:smooth"], name=f"{name}:smooth:Mul"
        )
        before[products[0].name].metadata_props.extend(norm.metadata_props)
        for node in products:
            node.input[0] = f"{name}:smooth"
        fresh.append(f"{name}:smooth")
    _insert(graph, before)
    return fresh


def _factor(graph: Graph, products: list[onnx.NodeProto], peak: Array) -> NDArray[np.float32]:
    """What each channel is divided by; 1 on average, so that ranges stay of the same order."""
    weights = [np.asarray(graph.value(node.input[1]), np.float64) for node in products]
    tops = [
        np.abs(weight).max(axis=channel_axis(node), initial=0) for node, weight in zip(products, weights, strict=True)
    ]
    weight = np.maximum.reduce(tops)
    live = (peak > 0) & (weight > 0)
    factor = np.ones(len(weight))
    factor[live] = peak[live].astype(np.float64) ** STRENGTH / weight[live] ** (1 - STRENGTH)
    if live.any():
        factor[live] /= np.exp(np.log(factor[live]).mean())
    # a channel that calibration hardly saw may be large in use
    return np.clip(factor, 1e-2, 1e2).astype(np.float32)


def correct_bias(graph: Graph, chosen: Plan, mean: Mapping[str, Array]) -> list[str]:
    """Rewrite the model of `graph` in place: each planned operator's mean error is taken off its bias.

    Args:
        graph: stale after this; index the model again.
        chosen: the plan for `graph`.
        mean: ``[channels]`` of each operator with weights, as `sensitivity.measure` tells.

    Returns:
        names of the corrected nodes. A product without a bias isn't: an addition of its own would cost time.
    """
    nodes, done = set(chosen.nodes), []
    for node in graph.model.graph.node:
        if node.name not in nodes or node.name not in mean:
            continue
        shift = mean[node.name].astype(np.float32)
        if node.op_type == "MatMul":
            place = _added(graph, node, len(shift))
            if place is None:
                continue
            owner, position = place
        else:
            owner, position = node, 2
        if len(owner.input) <= position:
            owner.input.append("")
        name = owner.input[position]
        before = np.asarray(graph.value(name), np.float32) if name else np.zeros(len(shift), np.float32)
        owner.input[position] = _constant(graph, name or f"{node.name}:bias", owner, before - shift)
        done.append(node.name)
    drop_unused(graph.model)
    return done


def _added(graph: Graph, node: onnx.NodeProto, channels: int) -> tuple[onnx.NodeProto, int] | None:
    """The addition of a constant with one value per channel that alone reads the product, and the constant's place."""
    readers = graph.readers.get(node.output[0], [])
    if node.output[0] in graph.outputs or len(readers) != 1 or readers[0].op_type != "Add":
        return None
    for position, name in enumerate(readers[0].input):
        value = graph.constant(name)
        if value is not None and list(value.dims) == [channels] and graph.is_float_constant(name):
            return readers[0], position
    return None


def _constant(graph: Graph, name: str, reader: onnx.NodeProto | None, value: Array) -> str:
    """Add `value` as a constant for one reader. It keeps the name `name` if nobody else reads that."""
    others = [node for node in graph.readers.get(name, []) if reader is None or node.name != reader.name]
    tensors = graph.model.graph.initializer
    known = next((tensor for tensor in tensors if tensor.name == name), None)
    if others or (known is None and graph.constant(name) is not None):  # shared, or made by a `Constant` node
        name, known = f"{name}:{reader.name if reader is not None else 'own'}", None
    fresh = numpy_helper.from_array(np.array(value, np.float32, order="C"), name)
    if known is None:
        tensors.append(fresh)
    else:
        known.CopyFrom(fresh)
    return name


def _insert(graph: Graph, before: Mapping[str, onnx.NodeProto]) -> None:
    """Put each node of `before` in front of the node that it is listed under."""
    if not before:
        return
    nodes: list[onnx.NodeProto] = []
    for node in graph.model.graph.node:
        if node.name in before:
            nodes.append(before[node.name])
        fresh = onnx.NodeProto()
        fresh.CopyFrom(node)
        nodes.append(fresh)
    del graph.model.graph.node[:]
    graph.model.graph.node.extend(nodes)
    drop_unused(graph.model)
