"""Which tensor of a reference graph a tensor of an engine is, and in what layout.

Names decide where the runtime kept them. What it fused or laid out anew has lost its name; then the operator's inputs,
which are known already, say which tensors of the reference it may stand for, and the numbers that it makes of the
right inputs say which of these it is. Only where an operator is at fault, so that its numbers are none of these, do
its kind, its constants and its shape have to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline.explain import operators as explain_operators
from pipeline.explain.operators import NCHWC
from pipeline.graph import Graph, attribute, reads
from pipeline.macs import FAMILY

Array = NDArray[Any]
NHWC = (0, 2, 3, 1)
MOVERS = (
    "Shape",
    "Size",
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "Expand",
    "Concat",
    "Gather",
)
CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "Cast", "Constant", "Identity")
ACTIVE = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish")
_AHEAD = 48  # tensors that one operator of an engine may stand for; more than any fusion has nodes


@dataclass(frozen=True)
class View:
    """How a tensor of the engine holds one of the reference.

    Attributes:
        name: the tensor of the reference.
        layout: None as it is there, ``"blocked"`` in NCHWc, or the permutation of its dimensions.
        factor: what it is multiplied with, along its last dimension; None for nothing.
    """

    name: str
    layout: Literal["blocked"] | tuple[int, ...] | None = None
    factor: Array | None = None

    def of(self, value: Array) -> Array:
        """`value` of the reference as the engine holds it."""
        if self.factor is not None:
            value = value * self.factor
        if self.layout is None:
            return value
        if self.layout == "blocked":
            return explain_operators.blocked(value)
        return np.ascontiguousarray(value.transpose(self.layout))

    def back(self, value: Array, like: Array) -> Array | None:
        """A tensor of the engine in the layout of the reference's value `like`; None if its shape is another one."""
        if self.layout == "blocked":
            if value.ndim != 4 or like.ndim != 4 or value.shape[1] % explain_operators.block():
                return None
            value = explain_operators.unblocked(value, like.shape[1])
        elif self.layout is not None:
            if value.ndim != len(self.layout):
                return None
            value = value.transpose(np.argsort(self.layout))
        if self.factor is not None:
            value = value / self.factor
        return resigned(value, like.dtype) if value.shape == like.shape else None


def resigned(value: Array, dtype: np.dtype[Any]) -> Array:
    """Signed bytes as unsigned ones, or the other way: ONNX Runtime moves both values and zero points by 128 on x86."""
    if {value.dtype, dtype} != {np.dtype(np.int8), np.dtype(np.uint8)}:
        return value
    return (value.astype(np.int16) + (128 if dtype == np.uint8 else -128)).astype(dtype)


def cone(graph: Graph, end: str, stops: Iterable[str]) -> tuple[list[onnx.NodeProto], list[str]]:
    """The nodes that make `end` out of `stops` and constants, in graph order, and which of `stops` they read.

    What else they read that nothing makes, the graph's own inputs, is told, too.
    """
    known, found, used = set(stops), {}, {}  # type: set[str], dict[str, onnx.NodeProto], dict[str, None]
    waiting = [end]
    while waiting:
        name = waiting.pop()
        maker = graph.makers.get(name)
        if (name in known and name != end) or (maker is None and graph.constant(name) is None):
            used[name] = None
        elif maker is not None and maker.name not in found:
            found[maker.name] = maker
            waiting.extend(reads(maker))
    order = [node for node in graph.model.graph.node if node.name in found]
    return order, list(used)


def ahead(reference: Graph, inputs: Iterable[str], stops: Iterable[str], products: int | None) -> Iterator[str]:
    """Tensors of the reference that are made of `inputs` (and of others of `stops`), the nearest first.

    Args:
        reference: the graph.
        inputs: what an operator of the engine reads.
        stops: all that is known already.
        products: how many operators that multiply matrices lie between; None for any number.
    """
    known, waiting, given = set(stops), list(dict.fromkeys(inputs)), 0
    starts, seen = set(waiting), set(waiting)
    while waiting and given < _AHEAD:
        behind: list[str] = []
        readers = {reader.name: reader for name in waiting for reader in reference.readers.get(name, [])}
        for reader in readers.values():
            for name in reader.output:
                if not name or name in seen:
                    continue
                nodes, used = cone(reference, name, known - {name})
                if name in known and set(used) <= starts:
                    # another form of what is read, such as its floats
                    starts.add(name)
                count = sum(one.op_type in FAMILY for one in nodes)
                if (products is not None and count > products) or not set(used) & starts:
                    continue
                seen.add(name)
                behind.append(name)
                if name not in known and (products is None or count == products):
                    given += 1
                    yield name
        waiting = behind


def relaid(node: onnx.NodeProto, view: View) -> View | None:
    """What an operator that only lays out its input `view` anew makes; None if `node` is none, or makes numbers."""
    if node.domain == NCHWC and node.op_type == "ReorderInput":
        return View(view.name, "blocked") if view.layout in (None, NHWC) else None
    if node.domain == NCHWC and node.op_type == "ReorderOutput":
        return View(view.name, NHWC if attribute(node, "channels_last", 0) else None)
    if node.op_type == "Transpose" and view.layout != "blocked":
        order = attribute(node, "perm")
        if not isinstance(order, list) or (view.layout is not None and len(view.layout) != len(order)):
            return None
        made = tuple(order if view.layout is None else (view.layout[place] for place in order))
        return View(view.name, None if made == tuple(range(len(made))) else made)
    return view if node.op_type in ("Cast", "Identity") else None


def layouts(node: onnx.NodeProto, inputs: Iterable[View]) -> list[Any]:
    """The layouts that the outputs of `node` may have, the likeliest first."""
    if node.domain == NCHWC:
        return ["blocked"]
    last = bool(attribute(node, "channels_last", 0)) or node.op_type.startswith("Nhwc")
    found = [NHWC, (0, 2, 1), (0, 2, 3, 4, 1)] if last else []
    return list(dict.fromkeys([*found, *(view.layout for view in inputs), None]))


def alike(runs: onnx.NodeProto, node: onnx.NodeProto) -> bool:
    """Whether `node` of the reference is the main part of `runs`, an operator of the engine."""
    family = FAMILY.get(runs.op_type)
    if family is not None:
        return FAMILY.get(node.op_type) == family
    if runs.op_type == "Upsample":  # the blocked form of a Resize
        return node.op_type == "Resize"
    return node.op_type in runs.op_type or (node.op_type.endswith("Pool") and runs.op_type.endswith("Pool"))


def guesses(
    runs: onnx.NodeProto, names: Iterable[str], reference: Graph, stops: Iterable[str], *, alone: bool
) -> list[str]:
    """Those of `names` that an operator at fault may stand for, by its kind and by what was fused into it.

    Args:
        runs: the operator.
        names: of tensors of the reference, the likeliest first.
        reference: the graph.
        stops: what is known of it.
        alone: whether all that `runs` reads is known.
    """
    if not alone and runs.op_type not in FAMILY:
        return []
    if runs.op_type in (*MOVERS, *CONVERSIONS):
        return []
    known, found, nearest = set(stops), [], []
    active = attribute(runs, "activation")
    for name in names:
        nodes, _ = cone(reference, name, known)
        if len(nodes) == 1:
            nearest.append(name)
        if not any(alike(runs, node) for node in nodes):
            continue
        last = next((node for node in reversed(nodes) if node.op_type not in ("QuantizeLinear", "Cast")), nodes[-1])
        if FAMILY.get(runs.op_type) == "Conv" and runs.domain == NCHWC and bool(active) != (last.op_type in ACTIVE):
            continue
        found.append(name)
    return found or nearest
