"""Which operators cost accuracy in 8 bits: each by itself, with the true float inputs, in one pass over a few samples.

Every planned operator is run twice on what it meets in the float model: as it is, and rewritten exactly as `qdq` would
rewrite it. The difference is its local error. That says nothing about what the rest of the network makes of it, so it
is an estimate to order the operators by, and not a verdict.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from pipeline import graph as graphs
from pipeline import probe, qdq
from pipeline.graph import Graph
from pipeline.integer import ANCHORS, MOVERS, Form, Plan, activation_after, channel_axis
from pipeline.origin import module_of
from pipeline.types import Frozen

_EXACT_DB = 200.0  # an operator without any error, such as a product with powers of two


@dataclass(frozen=True)
class Error:
    """What 8 bits do to one operator's output, over all samples.

    Attributes:
        signal: sum of the squares of the float output; after the activation that follows, if that is fused.
        noise: sum of the squares of the difference.
        macs: multiply-accumulates of all runs; 0 for an operator without weights.
        mean: float64 ``[channels]``: mean difference before the output is quantised; None without weights.
    """

    signal: float
    noise: float
    macs: int
    mean: NDArray[np.float64] | None

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization-noise ratio in dB, at most 200; one without any signal can lose none."""
        if self.noise <= 0 or self.signal <= 0:
            return _EXACT_DB
        return min(10 * math.log10(self.signal / self.noise), _EXACT_DB)


class SensitivityRow(Frozen):
    """One operator: `sqnr_db` of its own output, and its share of the multiply-accumulates of all rows."""

    node: str
    operator: str
    module: str
    sqnr_db: float
    macs_share: float


class Sensitivity(Frozen):
    """All operators that would be quantised, the most sensitive first."""

    rows: tuple[SensitivityRow, ...]


def measure(
    model: Path,
    samples: Iterable[probe.Feeds],
    chosen: Plan,
    ranges: Mapping[str, qdq.Range],
    form: Form,
) -> dict[str, Error]:
    """The local error of each operator of `chosen` that computes (those that only move values make none).

    Memory doesn't grow with the number of samples.

    Args:
        model: the float graph.
        samples: a few feeds by input name.
        chosen: what would be quantised.
        ranges: of every tensor that the plan quantises.
        form: any static one.

    Raises:
        DataError: the model can't run a sample.
    """
    graph = Graph(onnx.load(model))
    wanted = set(chosen.nodes)
    types = {value.name: value.type.tensor_type.elem_type for value in graph.model.graph.input}
    types |= graphs.infer(graph.model)[0]
    pairs: dict[str, _Pair] = {}
    fused: set[str] = set()
    for node in graph.model.graph.node:
        if node.name in wanted and node.op_type not in MOVERS and node.name not in fused:
            pairs[node.name] = _Pair(graph, node, chosen, ranges, form, types)
            fused.update(inner.name for inner in pairs[node.name].nodes[1:])
    reads = Counter(name for pair in pairs.values() for name in pair.inputs)
    total: dict[str, Error] = {}
    for tensors in probe.over(model, samples, list(reads)):
        live: dict[str, NDArray[Any]] = {}
        left = reads.copy()
        waiting = dict(pairs)
        for name, array in tensors:
            live[name] = array
            for node, pair in list(waiting.items()):
                if not live.keys() >= set(pair.inputs):
                    continue
                total[node] = _joined(total.get(node), pair.run(live))
                del waiting[node]
                left.subtract(pair.inputs)
                # nobody else reads these any more
                for done in pair.inputs:
                    if left[done] == 0:
                        live.pop(done, None)
    return total


def rank(graph: Graph, errors: Mapping[str, Error]) -> Sensitivity:
    """The operators in `errors` as a table; equally bad ones stay in the order of the graph."""
    macs = sum(error.macs for error in errors.values()) or 1
    rows = [
        SensitivityRow(
            node=node.name,
            operator=node.op_type,
            module=module_of(node),
            sqnr_db=round(errors[node.name].sqnr_db, 2),
            macs_share=round(errors[node.name].macs / macs, 6),
        )
        for node in graph.model.graph.node
        if node.name in errors
    ]
    return Sensitivity(rows=tuple(sorted(rows, key=lambda row: row.sqnr_db)))


def _joined(one: Error | None, two: Error) -> Error:
    if one is None:
        return two
    mean = None
    if one.mean is not None and two.mean is not None:
        # multiply-accumulates grow with the number of values that a mean is over, so they weigh the means
        share = two.macs / max(one.macs + two.macs, 1)
        mean = one.mean * (1 - share) + two.mean * share
    return Error(one.signal + two.signal, one.noise + two.noise, one.macs + two.macs, mean)


class _Pair:
    """One operator, with the activation that is fused into it, in float and in integers, in one session."""

    def __init__(
        self,
        graph: Graph,
        node: onnx.NodeProto,
        chosen: Plan,
        ranges: Mapping[str, qdq.Range],
        form: Form,
        types: Mapping[str, int],
    ) -> None:
        after = [activation_after(graph, chosen, name) for name in node.output if name]
        self.nodes = [node, *(found for found in after if found is not None)]
        self.anchor = node.op_type in ANCHORS
        made = {name for one in self.nodes for name in one.output}
        read = [name for one in self.nodes for name in one.input if name and name not in made]
        self.inputs = [name for name in dict.fromkeys(read) if graph.constant(name) is None]
        self.weights = [name for name in dict.fromkeys(read) if graph.constant(name) is not None]
        weight = graph.constant(node.input[1]) if self.anchor else None
        self.channels = weight.dims[channel_axis(node)] if weight is not None else 0
        # multiply-accumulates for each value of the output
        self.depth = int(np.prod(weight.dims)) // max(self.channels, 1) if weight is not None else 0
        self.types = [types.get(name, onnx.TensorProto.FLOAT) for name in self.inputs]
        self._build: Callable[[], onnxruntime.InferenceSession] = lambda: self._session(graph, chosen, ranges, form)
        self.session: onnxruntime.InferenceSession | None = None

    def run(self, live: Mapping[str, NDArray[Any]]) -> Error:
        if self.session is None:
            self.session = self._build()
        signal, noise, *rest = self.session.run(None, {name: live[name] for name in self.inputs})
        if not self.anchor:
            return Error(float(signal), float(noise), 0, None)
        size, mean = rest
        return Error(float(signal), float(noise), int(size) * self.depth, np.asarray(mean, np.float64))

    def _session(
        self, graph: Graph, chosen: Plan, ranges: Mapping[str, qdq.Range], form: Form
    ) -> onnxruntime.InferenceSession:
        raw, final = self.nodes[0].output[0], self.nodes[-1].output[0]
        model = self._small(graph, final)
        names = {node.name for node in self.nodes}
        made = {name for node in self.nodes for name in node.output}
        small = Plan(tuple(name for name in chosen.nodes if name in names), chosen.tensors & made, {})
        floats, constants = [_copy(node) for node in self.nodes], list(model.graph.initializer)
        qdq.insert(Graph(model), small, ranges, form)
        inner = model.graph
        known = {tensor.name for tensor in inner.initializer}
        inner.initializer.extend(tensor for tensor in constants if tensor.name not in known)
        for node in floats:
            node.input[:] = [f"{name}:fp32" if name in made else name for name in node.input]
            node.output[:] = [f"{name}:fp32" if name else "" for name in node.output]
            node.name = f"{node.name}:fp32"
        inner.node.extend(floats)
        # the integer operator's own result, before it is rounded to the next one's integers
        own = next(node for node in inner.node if node.name == self.nodes[0].name).output[0]
        self._compare(inner, own, f"{raw}:fp32", final)
        return probe.session(model)

    def _small(self, graph: Graph, final: str) -> onnx.ModelProto:
        inputs = [
            helper.make_tensor_value_info(name, kind, None) for name, kind in zip(self.inputs, self.types, strict=True)
        ]
        weights = []
        for name in self.weights:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(graph.constant(name))
            tensor.name = name
            weights.append(tensor)
        inner = helper.make_graph(
            [_copy(node) for node in self.nodes], "pair", inputs, [onnx.ValueInfoProto(name=final)], weights
        )
        return helper.make_model(inner, opset_imports=list(graph.model.opset_import), ir_version=graph.model.ir_version)

    def _compare(self, inner: onnx.GraphProto, own: str, raw: str, final: str) -> None:
        make = helper.make_node
        inner.node.extend(
            [
                make("Sub", [final, f"{final}:fp32"], ["/difference"]),
                make("ReduceSumSquare", [f"{final}:fp32"], ["/signal"], keepdims=0),
                make("ReduceSumSquare", ["/difference"], ["/noise"], keepdims=0),
            ]
        )
        outputs = ["/signal", "/noise"]
        if self.anchor:
            # channels are dimension 1 of a convolution's output, and the last one of a product's
            shape = [0, self.channels, -1] if self.nodes[0].op_type == "Conv" else [-1, self.channels, 1]
            inner.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), "/shape"))
            inner.initializer.append(numpy_helper.from_array(np.array([0, 2], np.int64), "/others"))
            inner.node.extend(
                [
                    make("Size", [raw], ["/size"]),
                    make("Sub", [own, raw], ["/own"]),
                    make("Reshape", ["/own", "/shape"], ["/rows"]),
                    make("ReduceMean", ["/rows", "/others"], ["/mean"], keepdims=0),
                ]
            )
            outputs += ["/size", "/mean"]
        del inner.output[:]
        inner.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    fresh = onnx.NodeProto()
    fresh.CopyFrom(node)
    return fresh
