"""What a compiled model of OpenVINO runs the nodes of our graph in, as far as names tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from pydantic import JsonValue

from pipeline import macs
from pipeline.graph import Graph

NUMBERS = {"i8": "int8", "u8": "int8", "f16": "fp16", "bf16": "bf16", "f32": "fp32", "f64": "fp64"}
ATTENTION = "Subgraph"  # holds both products of an attention, or none at all: sums and activations are such, too
MULTIPLY = frozenset(
    [
        *("Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNCell", "RNNSeq"),
        *(ATTENTION, "ScaledDotProductAttention", "QKVProjection", "LLMMLP"),
    ]
)


@dataclass
class _Layer:
    kind: str
    numbers: str
    names: set[str]
    nodes: list[str] = field(default_factory=list)

    @property
    def clear(self) -> bool:
        """Whether it stands for no more nodes than it can."""
        most = {"Subgraph": 2, "ScaledDotProductAttention": 2, "QKVProjection": 3, "LLMMLP": 3}
        return len(self.nodes) <= most.get(self.kind, 1)


def runs_in(compiled: Any, source: Path) -> dict[str, JsonValue]:
    """What each node that multiplies became: ``{node: [layer, numbers]}``; a node of which that isn't clear is absent.

    Args:
        compiled: an ``openvino.CompiledModel`` of the CPU.
        source: the ONNX graph that it came from.
    """
    graph = Graph(onnx.load(source, load_external_data=False))
    layers = list(_layers(compiled))
    # an attention comes first: where another layer has a name as well, it is the other's
    by_name = {name: layer for layer in sorted(layers, key=lambda one: one.kind != ATTENTION) for name in layer.names}
    for node in graph.model.graph.node:
        found = _layer_of(node, graph, by_name) if node.op_type in macs.FAMILY else None
        if found is not None:
            found.nodes.append(node.name)
    return {name: [layer.kind, layer.numbers] for layer in layers if layer.clear for name in layer.nodes}


def _layers(compiled: Any) -> Iterator[_Layer]:
    for operator in compiled.get_runtime_model().get_ordered_ops():
        facts = {key: str(value.value) for key, value in operator.get_rt_info().items()}
        if facts.get("layerType") in MULTIPLY and facts.get("runtimePrecision") in NUMBERS:
            names = set(facts["originalLayersNames"].split(","))
            # what a pass made of a node is called `node/WithoutBiases`
            names |= {name.rpartition("/")[0] for name in names}
            yield _Layer(facts["layerType"], NUMBERS[facts["runtimePrecision"]], names - {""})


def _layer_of(node: onnx.NodeProto, graph: Graph, by_name: dict[str, _Layer]) -> _Layer | None:
    """The layer with the node's name, or with that of what finishes its work: of a product with a bias, only the
    addition's name may be left.
    """
    while True:
        for name in (node.name, *node.output):
            if name in by_name:
                return by_name[name]
        readers = graph.readers.get(node.output[0], [])
        if len(readers) != 1 or readers[0].op_type in macs.FAMILY:
            return None
        node = readers[0]
