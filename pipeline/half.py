"""The float16 form of a float32 graph; inputs and outputs of the model keep their dtypes.

Every float tensor may exist twice, as ``x`` in float32 and as ``x:half``; a cast is put in where a node wants the
one that isn't there yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.errors import ConversionError, NotApplicable
from pipeline.graph import Graph, drop_unused, infer, reads

LARGEST = float(np.finfo(np.float16).max)
SMALLEST = float(np.finfo(np.float16).smallest_subnormal)
# sums of many terms, squares and exponentials leave the range of float16; the others take float32 by definition,
# or make numbers (positions, counts) that float16 can't hold exactly
KEPT = frozenset(
    [
        *("LayerNormalization", "GroupNormalization", "InstanceNormalization", "ReduceSum", "ReduceSumSquare"),
        *("ReduceL2", "ReduceLogSumExp", "Pow", "Exp", "Log", "Reciprocal", "CumSum"),
        *("Resize", "Cast", "CastLike", "Constant", "ConstantOfShape", "Range", "OneHot", "Dropout", "EyeLike"),
        *("QuantizeLinear", "DequantizeLinear", "Loop", "If", "Scan", "Multinomial", "NonMaxSuppression"),
        *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"),
    ]
)


@dataclass
class _Writer:
    graph: Graph
    floats: set[str]
    blocked: set[str]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    there: set[str] = field(default_factory=set)
    clipped: int = 0

    def half(self, name: str) -> str:
        """The float16 version of a tensor."""
        made = f"{name}:half"
        if made in self.there:
            return made
        self.there.add(made)
        value = self.graph.value(name)
        if value is None:
            self.nodes.append(helper.make_node("Cast", [name], [made], name=f"{made}:Cast", to=TensorProto.FLOAT16))
            return made
        beyond = int(np.count_nonzero(np.isfinite(value) & (np.abs(value) > LARGEST)))
        self.clipped += beyond
        kept = np.where(np.isfinite(value), np.clip(value, -LARGEST, LARGEST), value) if beyond else value
        narrow = kept.astype(np.float16)
        if value.size == 1 and value.item() and not narrow.item():
            narrow = np.copysign(np.full_like(narrow, SMALLEST), kept)  # a guard against division by zero stays one
        self.constants[made] = numpy_helper.from_array(narrow.astype(np.float16), made)
        return made

    def full(self, name: str) -> None:
        """See to it that the float32 version of a tensor is there."""
        if name in self.floats and name not in self.there and f"{name}:half" in self.there:
            self.there.add(name)
            self.nodes.append(
                helper.make_node("Cast", [f"{name}:half"], [name], name=f"{name}:Cast", to=TensorProto.FLOAT)
            )


def convert(graph: Graph, exclude: Iterable[str] = ()) -> tuple[list[str], int]:
    """Rewrite the model of `graph` in place.

    Args:
        graph: a float32 model.
        exclude: names of nodes that stay in float32.

    Returns:
        Names of the nodes that compute in float16, and how many numbers were cut off at float16's ends (the fill
        values of masks, as a rule).

    Raises:
        NotApplicable: nothing in the model would change.
        ConversionError: a weight is too large for float16.
    """
    model = graph.model
    types, _ = infer(model)
    types |= {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    floats = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
    floats |= {name for node in model.graph.node for name in node.input if graph.is_float_constant(name)}
    writer = _Writer(graph, floats, set(exclude))
    writer.there.update(value.name for value in model.graph.input)
    chosen = [node.name for node in model.graph.node if _converts(writer, node)]
    if not chosen:
        raise NotApplicable(
            "scheme `fp16` changes nothing in this model: no operator in it computes in float32 and may be narrower",
            hint="remove `fp16` from the schemes for this recipe",
        )
    names = set(chosen)
    for node in model.graph.node:
        _write(writer, node, node.name in names)
    for value in model.graph.output:
        writer.full(value.name)
    del model.graph.node[:]
    model.graph.node.extend(writer.nodes)
    model.graph.initializer.extend(writer.constants.values())
    del model.graph.value_info[:]
    drop_unused(model)
    return chosen, writer.clipped


def _converts(writer: _Writer, node: onnx.NodeProto) -> bool:
    if node.op_type in KEPT or node.domain not in ("", "ai.onnx") or node.name in writer.blocked:
        return False
    return any(name in writer.floats for name in (*node.input, *node.output))


def _write(writer: _Writer, node: onnx.NodeProto, narrow: bool) -> None:
    fresh = onnx.NodeProto()
    fresh.CopyFrom(node)
    if not narrow:
        for name in reads(node):
            writer.full(name)
        writer.nodes.append(fresh)
        writer.there.update(node.output)
        return
    _check_weight(writer.graph, node)
    for position, name in enumerate(node.input):
        if name in writer.floats:
            fresh.input[position] = writer.half(name)
    for position, name in enumerate(node.output):
        if name in writer.floats:
            fresh.output[position] = f"{name}:half"
            writer.there.add(f"{name}:half")
    writer.nodes.append(fresh)


def _check_weight(graph: Graph, node: onnx.NodeProto) -> None:
    # elsewhere a number beyond float16 is a fill value, which may as well be its largest number
    if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
        return
    for name in node.input[1:]:
        value = graph.value(name)
        if value is not None and value.size and float(np.abs(value).max()) > LARGEST:
            raise ConversionError(
                f"weight `{name}` reaches {float(np.abs(value).max()):g}, and float16 ends at {LARGEST:g}",
                hint="remove `fp16` from the schemes for this recipe",
            )
