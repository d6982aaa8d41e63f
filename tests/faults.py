"""Faults planted by hand in engines of ONNX Runtime, each a function on the engine's graph.

Each takes the engine and the form that it was built from, changes the engine in place, and returns the names of the
form's nodes of which one is the very operator at fault. It says so by names of constants and tensors that the two
graphs share, never by what `explain` makes of them. `Unplanted` says that an engine has no place for a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]
Plant = Callable[[onnx.ModelProto, onnx.ModelProto], set[str]]
_CONVOLUTIONS = ("Conv", "QLinearConv", "FusedConv", "NhwcFusedConv")
_PRODUCTS = (*_CONVOLUTIONS, "Gemm", "QGemm", "MatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")


class Unplanted(Exception):
    """The engine has no operator that could have this fault."""


def values(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The constants of a graph by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def middle(nodes: Sequence[onnx.NodeProto]) -> onnx.NodeProto:
    """The node in the middle: with some before it that are right, and some after it that inherit."""
    if not nodes:
        raise Unplanted
    return nodes[len(nodes) // 2]


def private(model: onnx.ModelProto, node: onnx.NodeProto, place: int, value: Array) -> None:
    """Let only `node` read `value` at `place`; others that share the constant keep it. It keeps its name if it can."""
    name = node.input[place]
    shared = sum(list(one.input).count(name) for one in model.graph.node) > 1
    tensor = values(model)[name]
    fresh = numpy_helper.from_array(np.ascontiguousarray(value), f"{name}:{node.name}" if shared else name)
    if shared:
        node.input[place] = fresh.name
        model.graph.initializer.append(fresh)
    else:
        tensor.CopyFrom(fresh)


def _with(model: onnx.ModelProto, kinds: Sequence[str], place: int, least: int = 2) -> list[onnx.NodeProto]:
    """Nodes of these kinds whose input `place` is a constant of at least `least` values."""
    known = values(model)
    return [
        node
        for node in model.graph.node
        if node.op_type in kinds
        and len(node.input) > place
        and node.input[place] in known
        and np.prod(known[node.input[place]].dims, dtype=int) >= least
    ]


def reading(form: onnx.ModelProto, constant: str, kinds: Sequence[str] = ()) -> set[str]:
    """The nodes of the form that read a constant, through the dequantisation of its own that it may have."""
    through = {
        node.output[0] for node in form.graph.node if node.op_type == "DequantizeLinear" and constant in node.input
    }
    found = {
        node.name
        for node in form.graph.node
        if (constant in node.input or through & set(node.input))
        and node.op_type != "DequantizeLinear"
        and (not kinds or node.op_type in kinds)
    }
    if not found:
        raise Unplanted(f"nothing of the form reads `{constant}`")
    return found


def _bias_place(node: onnx.NodeProto) -> int:
    return {"QLinearConv": 8, "QGemm": 6, "Add": 1, "BiasGelu": 1, "SkipLayerNormalization": 4}.get(node.op_type, 2)


def wrong_bias(engine: onnx.ModelProto, form: onnx.ModelProto) -> set[str]:
    """Each channel has its neighbour's bias."""
    kinds = (*_CONVOLUTIONS, "BiasGelu", "SkipLayerNormalization")
    found = [node for kind in kinds for node in _with(engine, [kind], _bias_place(onnx.NodeProto(op_type=kind)))]
    node = middle(found)
    place = _bias_place(node)
    name = node.input[place]
    private(engine, node, place, np.roll(numpy_helper.to_array(values(engine)[name]), 1))
    return reading(form, name)


def _weight(engine: onnx.ModelProto) -> tuple[onnx.NodeProto, int]:
    """An operator with weights, and where they are; one of the form's is found by its bias or weight."""
    places = {"QLinearConv": 3, "QGemm": 3}
    found = [
        (node, places.get(node.op_type, 1)) for kind in _PRODUCTS for node in _with(engine, [kind], places.get(kind, 1))
    ]
    order = {node.name: place for place, node in enumerate(engine.graph.node)}
    found.sort(key=lambda pair: order[pair[0].name])
    if not found:
        raise Unplanted
    return found[len(found) // 2]


def _product(engine: onnx.ModelProto, form: onnx.ModelProto, node: onnx.NodeProto, place: int) -> set[str]:
    """The product of the form that `node` stands for: it reads the same weight, or the same bias."""
    kinds = ("Conv", "Gemm", "MatMul", "MatMulInteger")
    for at in (place, _bias_place(node)):
        if len(node.input) > at:
            try:
                return reading(form, node.input[at], kinds)
            except Unplanted:
                continue
    raise Unplanted


def stale_weight(engine: onnx.ModelProto, form: onnx.ModelProto) -> set[str]:
    """The weights are those of a training a little before: about a hundredth off."""
    node, place = _weight(engine)
    found = _product(engine, form, node, place)
    value = numpy_helper.to_array(values(engine)[node.input[place]])
    draw = np.random.default_rng(0)
    if np.issubdtype(value.dtype, np.floating):
        fresh = value * (1 + 0.01 * draw.standard_normal(value.shape).astype(np.float32))
    else:
        ends = np.iinfo(value.dtype)
        fresh = np.clip(value.astype(int) + draw.integers(-1, 2, value.shape), ends.min + 1, ends.max).astype(
            value.dtype
        )
    private(engine, node, place, fresh.astype(value.dtype))
    return found


def transposed_weight(engine: onnx.ModelProto, form: onnx.ModelProto) -> set[str]:
    """Two equal dimensions of the weights are swapped: rows and columns of a kernel, or of a square matrix."""
    known = values(engine)
    for node in sorted(engine.graph.node, key=lambda one: one.op_type not in _CONVOLUTIONS):
        place = {"QLinearConv": 3, "QGemm": 3}.get(node.op_type, 1)
        if node.op_type not in _PRODUCTS or len(node.input) <= place or node.input[place] not in known:
            continue
        value = numpy_helper.to_array(known[node.input[place]])
        square = value.ndim >= 2 and value.shape[-1] == value.shape[-2] > 1
        if square and node.name != engine.graph.node[0].name:
            found = _product(engine, form, node, place)
            if value.ndim == 4 and node.domain.endswith("nchwc"):
                # blocks lie inside of the kernel's places: move whole blocks
                outs, ins, high, wide = value.shape
                block = outs * ins * high * wide // (outs * ins) // (high * wide)
                assert block == 1
                parts = value.reshape(-1, high, wide, _inner(node, value, known))
                private(engine, node, place, parts.swapaxes(1, 2).reshape(value.shape))
            else:
                private(engine, node, place, value.swapaxes(-1, -2))
            return found
    raise Unplanted


def _inner(node: onnx.NodeProto, value: Array, known: dict[str, onnx.TensorProto]) -> int:
    """Numbers that lie together at each place of a blocked kernel."""
    from pipeline.explain.operators import block

    size = block()
    return size * size if value.shape[1] % size == 0 else size


def swapped_axis(engine: onnx.ModelProto, form: onnx.ModelProto) -> set[str]:
    """Two axes change places: in a Transpose of the form's, or before an operator where the engine has none."""
    made = {name: node for node in form.graph.node for name in node.output}
    turns = [
        node
        for node in engine.graph.node
        if node.op_type == "Transpose" and node.output[0] in made and made[node.output[0]].op_type == "Transpose"
    ]
    if turns:
        node = middle(turns)
        order = list(helper.get_attribute_value(node.attribute[0]))
        order[-1], order[-2] = order[-2], order[-1]
        node.attribute[0].CopyFrom(helper.make_attribute("perm", order))
        return {made[node.output[0]].name}
    # the image lies on its side
    first = next(node for node in engine.graph.node if engine.graph.input[0].name in node.input)
    name = engine.graph.input[0].name
    rank = len(engine.graph.input[0].type.tensor_type.shape.dim)
    order = [*range(rank - 2), rank - 1, rank - 2]
    place = list(first.input).index(name)
    engine.graph.node.insert(0, helper.make_node("Transpose", [name], ["turned"], name="turned", perm=order))
    first.input[place] = "turned"
    if first.op_type == "QuantizeLinear":
        return {node.name for node in form.graph.node if name in node.input} | {
            reader.name
            for node in form.graph.node
            if name in node.input
            for mid in form.graph.node
            if node.output[0] in mid.input
            for reader in form.graph.node
            if mid.output[0] in reader.input
        }
    return {node.name for node in form.graph.node if name in node.input}


def _scaled(engine: onnx.ModelProto) -> tuple[onnx.NodeProto, int]:
    """An operator that makes integers of a scale of its own, and where that is."""
    places = {"QLinearConv": 6, "QLinearAdd": 6, "QuantizeLinear": 1}
    for kind, place in places.items():
        found = _with(engine, [kind], place, least=1)
        if found:
            return found[len(found) // 2], place
    raise Unplanted


def _quantised(engine: onnx.ModelProto, form: onnx.ModelProto, node: onnx.NodeProto) -> set[str]:
    """The nodes of the form that make the tensor of which `node` makes integers, and the one that quantises it."""
    made = {name: one for one in form.graph.node for name in one.output}
    if node.op_type == "QLinearConv":
        ends = [name for one in form.graph.node if one.name in _product(engine, form, node, 3) for name in one.output]
    elif node.op_type == "QLinearAdd":
        ends = [
            name
            for one in form.graph.node
            if one.name == node.name or node.output[0] in one.output
            for name in one.output
        ]
    else:
        ends = [node.input[0]]
    found = {made[name].name for name in ends if name in made}
    for kinds in (("Relu", "Clip"), ("QuantizeLinear",)):
        after = [one for one in form.graph.node if one.op_type in kinds and set(ends) & set(one.input)]
        found |= {one.name for one in after}
        ends += [name for one in after for name in one.output]
    return found


def wrong_scale(engine: onnx.ModelProto, form: onnx.ModelProto) -> set[str]:
    """A scale is twice what it should be; in a float engine, a factor is."""
    try:
        node, place = _scaled(engine)
    except Unplanted:
        fused = [node for node in engine.graph.node if node.op_type == "FusedMatMul"]
        if not fused:
            raise
        node = middle(fused)
        for entry in node.attribute:
            if entry.name == "alpha":
                entry.f *= 2
        return {one.name for one in form.graph.node if node.output[0] in one.output}
    found = _quantised(engine, form, node)
    private(engine, node, place, numpy_helper.to_array(values(engine)[node.input[place]]) * np.float32(2))
    return found


def wrong_zero_point(engine: onnx.ModelProto, form: onnx.ModelProto) -> set[str]:
    """A zero point is one too large."""
    node, place = _scaled(engine)
    found = _quantised(engine, form, node)
    value = numpy_helper.to_array(values(engine)[node.input[place + 1]])
    private(engine, node, place + 1, np.array(value + 1 if value < 127 else value - 1, value.dtype))
    return found


def saturating_range(engine: onnx.ModelProto, form: onnx.ModelProto) -> set[str]:
    """The range of a tensor ends at an eighth of where it should, so that most large values are cut off."""
    node, place = _scaled(engine)
    found = _quantised(engine, form, node)
    private(engine, node, place, numpy_helper.to_array(values(engine)[node.input[place]]) / np.float32(8))
    return found


def dropped_mask(engine: onnx.ModelProto, form: onnx.ModelProto) -> set[str]:
    """What is added (a mask before a softmax, a residual) isn't; or an activation is left out."""
    softmax = {name for node in engine.graph.node if node.op_type == "Softmax" for name in node.input}
    masks = [node for node in engine.graph.node if node.op_type in ("Add", "Where") and set(node.output) & softmax]
    if masks:
        node = middle(masks)
        name = node.output[0]
        for reader in engine.graph.node:
            for place, read in enumerate(reader.input):
                if read == name:
                    reader.input[place] = node.input[node.op_type == "Where"]
        engine.graph.node.remove(node)
        return {one.name for one in form.graph.node if name in one.output}
    sums = [node for node in engine.graph.node if node.op_type == "Conv" and len(node.input) == 4]
    if sums:
        node = middle(sums)
        conv = reading(form, node.input[2], ("Conv",))
        del node.input[3]
        made = {name for one in form.graph.node if one.name in conv for name in one.output}
        return {one.name for one in form.graph.node if one.op_type == "Add" and made & set(one.input)}
    return _without_activation(engine, form, None)


def _without_activation(engine: onnx.ModelProto, form: onnx.ModelProto, other: str | None) -> set[str]:
    """A fused activation is another one, or none."""
    fused = [node for node in engine.graph.node if any(entry.name == "activation" for entry in node.attribute)]
    node = middle(fused)
    conv = reading(form, node.input[2], ("Conv",))
    made = {name for one in form.graph.node if one.name in conv for name in one.output}
    kept = [entry for entry in node.attribute if not entry.name.startswith("activation")]
    del node.attribute[:]
    node.attribute.extend(kept)
    if other is not None:
        node.attribute.append(helper.make_attribute("activation", other))
        node.attribute.append(helper.make_attribute("activation_params", [0.01]))
    after = {one.name: one for one in form.graph.node if made & set(one.input)}
    relus = {one.name for one in after.values() if one.op_type == "Relu"}
    behind = {name for one in after.values() for name in one.output}
    return relus or {one.name for one in form.graph.node if one.op_type == "Relu" and behind & set(one.input)}


def wrong_epsilon(engine: onnx.ModelProto, form: onnx.ModelProto) -> set[str]:
    """A normalisation adds 1e-3 to the variance; where it was folded into a convolution, its weights show that."""
    norms = [node for node in engine.graph.node if any(entry.name == "epsilon" for entry in node.attribute)]
    if norms:
        node = middle(norms)
        for entry in node.attribute:
            if entry.name == "epsilon":
                entry.f = 1e-3
        made = {name: one for one in form.graph.node for name in one.output}
        return {made[node.output[0]].name}
    found = _with(engine, _CONVOLUTIONS, 1)
    node = middle([one for one in found if one.op_type != "QLinearConv"])
    value = numpy_helper.to_array(values(engine)[node.input[1]])
    variance = np.random.default_rng(0).uniform(0.05, 2, len(value)).astype(np.float32)
    factor = np.sqrt((variance + np.float32(1e-5)) / (variance + np.float32(1e-3)))
    private(engine, node, 1, value * factor.reshape(-1, *[1] * (value.ndim - 1)))
    return reading(form, node.input[2], ("Conv",))


def differing_fusion(engine: onnx.ModelProto, form: onnx.ModelProto) -> set[str]:
    """A fused operator computes something close to what it stands for, and not that."""
    gelus = [node for node in engine.graph.node if node.op_type == "BiasGelu"]
    if gelus:
        node = middle(gelus)
        node.op_type = "FastGelu"  # by tanh
        return {one.name for one in form.graph.node if node.output[0] in one.output}
    return _without_activation(engine, form, "LeakyRelu")


def wrong_pooling(engine: onnx.ModelProto, form: onnx.ModelProto) -> set[str]:
    """Of a Resize, the mode; of a pooling, the average for the largest; of a mean, the sum."""
    made = {name: one for one in form.graph.node for name in one.output}
    for node in engine.graph.node:
        if node.op_type in ("Resize", "Upsample"):
            for entry in node.attribute:
                if entry.name == "mode":
                    entry.s = b"linear" if entry.s == b"nearest" else b"nearest"
            return {one.name for one in form.graph.node if one.op_type == "Resize"}
    pools = [node for node in engine.graph.node if node.op_type == "MaxPool"]
    if pools:
        node = pools[0]
        node.op_type = "AveragePool"
        kept = [entry for entry in node.attribute if entry.name not in ("storage_order", "dilations")]
        del node.attribute[:]
        node.attribute.extend(kept)
        return {next(one.name for one in form.graph.node if one.op_type == "MaxPool")}
    sums = [node for node in engine.graph.node if node.op_type == "ReduceSum" and node.output[0] in made]
    node = middle(sums)
    node.op_type = "ReduceMean"
    return {made[node.output[0]].name}


# --- in numeric forms ----------------------------------------------------------------------------------------------


def _observed(form: onnx.ModelProto, fp32: onnx.ModelProto) -> tuple[str, set[str]]:
    """The name of an activation that the form quantises, and the nodes of fp32 that make it (or read it, an input)."""
    makers = {name: node for node in fp32.graph.node for name in node.output}
    pairs = [
        node.input[1].removesuffix(":scale")
        for node in form.graph.node
        if node.op_type == "QuantizeLinear" and ":smooth" not in node.input[1]
    ]
    names = [name for name in dict.fromkeys(pairs) if name in makers]
    if not names:
        raise Unplanted
    name = names[len(names) // 2]
    return name, {makers[name].name}


def form_saturates(form: onnx.ModelProto, fp32: onnx.ModelProto) -> set[str]:
    """The range of an activation ends at an eighth of what calibration saw."""
    name, found = _observed(form, fp32)
    tensor = values(form)[f"{name}:scale"]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / np.float32(8), tensor.name))
    return found


def form_zero_point(form: onnx.ModelProto, fp32: onnx.ModelProto) -> set[str]:
    """The zero point of an activation lies a quarter of the range too high."""
    name, found = _observed(form, fp32)
    tensor = values(form)[f"{name}:zero"]
    value = numpy_helper.to_array(tensor)
    moved = value.astype(int) + 64 if value.astype(int) < 64 else value.astype(int) - 64
    tensor.CopyFrom(numpy_helper.from_array(np.array(moved, value.dtype), tensor.name))
    return found


def form_weight_scale(form: onnx.ModelProto, fp32: onnx.ModelProto) -> set[str]:
    """The scale of a weight is twice what it should be."""
    read = {name: node for node in fp32.graph.node for name in node.input}
    found = [
        node
        for node in form.graph.node
        if node.op_type == "DequantizeLinear" and node.output[0].removesuffix(":dequantized") in values(fp32)
    ]
    node = middle([one for one in found if len(values(form)[one.input[0]].dims) > 1])
    private(form, node, 1, numpy_helper.to_array(values(form)[node.input[1]]) * np.float32(2))
    return {read[node.output[0].removesuffix(":dequantized")].name}


def overflow(fp32: onnx.ModelProto) -> set[str]:
    """Make an activation of the fp32 graph larger than float16 holds, and the weights that read it smaller by as much.

    In float32 the model stays the same; the float16 form of it overflows at the first product.
    """
    known = values(fp32)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in fp32.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in fp32.graph.node[len(fp32.graph.node) // 5 :]:
        chain = [node]
        while True:
            after = readers.get(chain[-1].output[0], [])
            if len(after) != 1:
                break
            chain.append(after[0])
            if after[0].op_type in ("Conv", "MatMul", "Gemm") and after[0].input[1] in known:
                break
        weights = node.op_type in ("Conv", "MatMul") and node.input[1] in known
        passing = ("Relu", "MaxPool", "Reshape", "Transpose", "Flatten", "Add", "MatMul")
        whole = all(one.op_type in passing for one in chain[1:-1])
        ends = chain[-1].op_type in ("Conv", "MatMul", "Gemm") and chain[-1].input[1] in known
        linear = (
            all(
                one.input[0] in known or one.input[1] in known
                for one in chain[1:-1]
                if one.op_type in ("Add", "MatMul")
            )
            or node.op_type == "MatMul"
        )
        if len(chain) < 2 or not (weights and whole and ends and linear):
            continue
        adds = [one for one in chain[1:-1] if one.op_type == "Add"]
        biases = [node.input[2]] if len(node.input) > 2 else []
        biases += [name for one in adds for name in one.input if name in known]
        grown = [numpy_helper.to_array(known[name]) for name in (node.input[1], *biases)]
        largest = max(float(np.abs(one).max()) for one in grown)
        power = np.float32(2.0 ** np.floor(np.log2(60000 / largest)))
        for name, factor in [
            (node.input[1], power),
            *((one, power) for one in biases),
            (chain[-1].input[1], 1 / power),
        ]:
            value = numpy_helper.to_array(known[name])
            known[name].CopyFrom(numpy_helper.from_array((value * factor).astype(np.float32), name))
        return {node.name}
    raise Unplanted


FORM_PLANTS: dict[str, Plant] = {
    "saturating range": form_saturates,
    "wrong zero point": form_zero_point,
    "scale off by 2": form_weight_scale,
}
PLANTS: dict[str, Plant] = {
    "wrong bias": wrong_bias,
    "swapped axis": swapped_axis,
    "scale off by 2": wrong_scale,
    "wrong zero point": wrong_zero_point,
    "dropped mask": dropped_mask,
    "wrong epsilon": wrong_epsilon,
    "fused op differs": differing_fusion,
    "stale weight": stale_weight,
    "wrong resize mode": wrong_pooling,
    "transposed weight": transposed_weight,
    "saturating range": saturating_range,
}
