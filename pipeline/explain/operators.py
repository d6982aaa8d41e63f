"""Operators of a graph run one at a time, each on the values that it is given.

So an operator of an engine can be given the reference's inputs, and what it adds of its own is seen, not what it
inherits. ONNX Runtime keeps convolutions of a CPU in blocks of channels (NCHWc); here they are laid out as ONNX says.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from pipeline import graph as graphs
from pipeline import origin, probe
from pipeline.errors import ConversionError, first_line

Array = NDArray[Any]
NCHWC = "com.microsoft.nchwc"


class Operators:
    """Runs the nodes of one model, single-threaded and as they are written; a session for each, made when needed.

    Attributes:
        graph: of the model.
        constants: its constants by name.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path | None = None) -> None:
        if folder is not None:
            onnx.load_external_data_for_model(model, str(folder))
        self.graph = graphs.Graph(model)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._values: dict[str, Array] = {}
        self._session: tuple[tuple[Any, ...], onnxruntime.InferenceSession] | None = None
        versions = {entry.domain: entry.version for entry in model.opset_import}
        for node in model.graph.node:
            versions.setdefault(node.domain, 1)  # an engine needn't say which version of the runtime's own operators
        self._opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]

    def value(self, name: str) -> Array | None:
        """The numbers of a constant, None for everything else."""
        if name not in self._values:
            found = self.graph.value(name)
            if found is None:
                return None
            self._values[name] = found
        return self._values[name]

    def run(self, node: onnx.NodeProto, inputs: Mapping[str, Array], *, fixed: bool = True) -> dict[str, Array]:
        """What `node` makes of `inputs`, by name; an output without a name is left out.

        Args:
            node: one of the model's.
            inputs: of all that it reads, bodies of loops included; constants may be missing.
            fixed: constants are built in, as kernels that pack their weights want them. Otherwise `inputs` may
                have other numbers for them.
        """
        read = list(dict.fromkeys(graphs.reads(node)))
        given = {name: inputs[name] if name in inputs else self.value(name) for name in read}
        feeds = {name: one for name, one in given.items() if one is not None and not (fixed and name in self.constants)}
        names = [name for name in node.output if name]
        session = self._made(node, feeds, fixed)
        return dict(zip(names, session.run(names, feeds), strict=True))

    def _made(self, node: onnx.NodeProto, feeds: Mapping[str, Array], fixed: bool) -> onnxruntime.InferenceSession:
        kinds = tuple((name, one.dtype.str, one.ndim) for name, one in feeds.items())
        key = (node.name, kinds, fixed)
        if self._session is None or self._session[0] != key:  # of one operator at a time: weights are large
            self._session = key, self._new(node, feeds, fixed)
        return self._session[1]

    def _new(self, node: onnx.NodeProto, feeds: Mapping[str, Array], fixed: bool) -> onnxruntime.InferenceSession:
        model = onnx.ModelProto(ir_version=self.graph.model.ir_version, functions=self.graph.model.functions)
        model.opset_import.extend(self._opsets)
        model.graph.name = "operator"
        model.graph.node.append(node)
        for name, one in feeds.items():
            kind = helper.np_dtype_to_tensor_dtype(one.dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, [None] * one.ndim))
        if fixed:
            model.graph.initializer.extend(
                self.constants[name] for name in dict.fromkeys(graphs.reads(node)) if name in self.constants
            )
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in node.output if name)
        return probe.session(model, threads=1)

    def all(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Every tensor that the model makes of `feeds`, by name; constants are left out.

        Raises:
            ConversionError: an operator can't be run by itself, such as one that hands on sequences.
        """
        found = dict(feeds)
        for node in self.graph.model.graph.node:
            try:
                found |= self.run(node, found)
            except Exception as error:  # onnxruntime's own classes share no base
                raise ConversionError(
                    f"operator `{node.op_type}` ({origin.of_node(node)}) can't be run by itself: {first_line(error)}"
                ) from error
        return found


@functools.cache
def block() -> int:
    """How many channels ONNX Runtime keeps together on this processor."""
    node = helper.make_node("ReorderInput", ["x"], ["y"], domain=NCHWC)
    model = onnx.ModelProto(ir_version=10)
    model.opset_import.extend([helper.make_opsetid("", 17), helper.make_opsetid(NCHWC, 1)])
    model.graph.name = "block"
    model.graph.node.append(node)
    model.graph.input.append(helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 64, 1, 2]))
    model.graph.output.append(onnx.ValueInfoProto(name="y"))
    values = np.arange(128, dtype=np.float32).reshape(1, 64, 1, 2)  # channel c at place p is 2 c + p
    (laid,) = probe.session(model, threads=1).run(["y"], {"x": values})
    return int(np.flatnonzero(laid.reshape(-1) == 1)[0])


def blocked(value: Array) -> Array:
    """``[N, C, H, W]`` as ONNX Runtime keeps it: channels in blocks, the last one filled up with zeros."""
    size = block()
    full = -(-value.shape[1] // size) * size
    padded = np.zeros((value.shape[0], full, *value.shape[2:]), value.dtype)
    padded[:, : value.shape[1]] = value
    parts = padded.reshape(value.shape[0], full // size, size, *value.shape[2:])
    return np.ascontiguousarray(np.moveaxis(parts, 2, -1)).reshape(padded.shape)


def unblocked(value: Array, channels: int) -> Array:
    """What `blocked` was made of."""
    size = block()
    parts = value.reshape(value.shape[0], value.shape[1] // size, *value.shape[2:], size)
    return np.moveaxis(parts, -1, 2).reshape(value.shape)[:, :channels]


def unblocked_weights(value: Array, shape: Sequence[int]) -> list[Array]:
    """``[O, I, H, W]`` weights of shape `shape`, out of those of a blocked convolution: each way they may be meant.

    Their outputs are in blocks, and their inputs too unless the convolution reads plain channels or has groups.
    """
    size, found = block(), []
    outs, ins, high, wide = value.shape
    if outs % size == 0:
        plain = value.reshape(outs // size, ins, high, wide, size)
        found.append(np.moveaxis(plain, -1, 1).reshape(value.shape)[: shape[0], : shape[1]])
    if outs % size == 0 and ins % size == 0:
        both = value.reshape(outs // size, ins // size, high, wide, size, size)
        found.append(both.transpose(0, 5, 1, 4, 2, 3).reshape(value.shape)[: shape[0], : shape[1]])
    return found
