"""Whether a graph holds the numbers that its program holds: weights and biases by the operators that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch.export import ExportedProgram

from pipeline.graph import Graph

Array = NDArray[np.generic]


class States:
    """Parameters and buffers of a program, beside the constants of the graph that was made of it."""

    def __init__(self, source: ExportedProgram, graph: Graph) -> None:
        self._graph = graph
        self._nodes = {node.name: node for node in source.graph.nodes}
        values = {**source.state_dict, **source.constants}
        self._values = {
            spec.arg.name: (str(spec.target), values[spec.target])
            for spec in source.graph_signature.input_specs
            if spec.target is not None and isinstance(values.get(spec.target), torch.Tensor)
        }

    def differing(self, nodes: Sequence[onnx.NodeProto], twin: str) -> tuple[onnx.NodeProto, str] | None:
        """The one of `nodes` that reads other numbers than the program's node `twin`, and what they are called there.

        Only constants of the size of something that `twin` reads are compared: others were computed by the exporter.
        """
        own = dict(self._read(twin))
        for node in nodes:
            for name in node.input:
                found = self._graph.constant(name)
                if found is None or found.data_location == onnx.TensorProto.EXTERNAL:
                    continue
                value = numpy_helper.to_array(found)
                alike = {state: one for state, one in own.items() if one.size == value.size > 1}
                if alike and not any(_equal(value, one) for one in alike.values()):
                    return node, next(iter(alike))
        return None

    def _read(self, twin: str) -> Iterator[tuple[str, Array]]:
        node = self._nodes.get(twin)
        for one in node.all_input_nodes if node is not None else ():
            if one.name in self._values:
                name, value = self._values[one.name]
                yield name, value.numpy(force=True)


def _equal(one: Array, two: Array) -> bool:
    """Whether both are the same numbers, perhaps with the last two axes swapped, or in another shape."""
    return np.array_equal(one.ravel(), two.ravel()) or (
        two.ndim >= 2 and np.array_equal(one.ravel(), two.swapaxes(-1, -2).ravel())
    )
