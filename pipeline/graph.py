"""ONNX graphs as we read and write them: an index over a model, and files with the same bytes every time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

# protobuf can't hold more in one message; the rest is room for the graph itself
INLINE_BYTES = (2 << 30) - (64 << 20)

_SMALL = 1 << 12  # elements; smaller constants may decide shapes, so that shape inference gets to see them

Array = NDArray[Any]


class Graph:
    """Who makes and who reads each tensor of a model's main graph. It doesn't follow later changes of the model.

    Every node gets a name, if it has none: ``<operator>_<position>``.

    Attributes:
        model: the model; owned by the caller.
        makers: the node that makes a tensor.
        readers: the nodes that read a tensor, also from inside a branch or loop.
        outputs: names of the model's outputs.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.makers: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        self.outputs = {value.name for value in model.graph.output}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for position, node in enumerate(model.graph.node):
            node.name = node.name or f"{node.op_type}_{position}"
            for name in node.output:
                self.makers[name] = node
            for name in dict.fromkeys(reads(node)):
                self.readers.setdefault(name, []).append(node)
            if node.op_type == "Constant" and len(node.attribute) == 1 and node.attribute[0].name == "value":
                self._constants[node.output[0]] = node.attribute[0].t

    def constant(self, name: str) -> onnx.TensorProto | None:
        """The tensor behind a constant, None for everything else."""
        return self._constants.get(name)

    def value(self, name: str) -> Array | None:
        """The numbers of a constant, None for everything else."""
        found = self._constants.get(name)
        return None if found is None else numpy_helper.to_array(found)

    def is_float_constant(self, name: str) -> bool:
        """Whether `name` is a constant of dtype float32."""
        found = self._constants.get(name)
        return found is not None and found.data_type == onnx.TensorProto.FLOAT


def reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names that `node` reads, those that its branches and loop bodies take from outside included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        bodies = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
        for body in bodies:
            own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
            own |= {name for inner in body.node for name in inner.output}
            for inner in body.node:
                yield from (name for name in reads(inner) if name not in own)
            yield from (value.name for value in body.output if value.name not in own)


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    """The value of an attribute of `node`, or `default`."""
    for found in node.attribute:
        if found.name == name:
            value: object = helper.get_attribute_value(found)
            return value
    return default


def infer(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """Element types, and sizes in bytes, of the tensors that nodes make, as far as shape inference finds them.

    Args:
        model: is left alone; its weights aren't copied, so that it may be of any size.
        shapes: of the inputs. Without them, a dynamic dimension counts as one element.
    """
    types: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for value in inferred(model, shapes):
        found = value.type.tensor_type
        types[value.name] = found.elem_type
        if found.HasField("shape"):
            count = int(np.prod([max(dim.dim_value, 1) for dim in found.shape.dim], dtype=np.int64))
            sizes[value.name] = count * helper.tensor_dtype_to_np_dtype(found.elem_type).itemsize
    return types, sizes


def inferred(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None = None
) -> Iterator[onnx.ValueInfoProto]:
    """What shape inference finds out about the tensors that nodes make; those of unknown type are left out.

    Args:
        model: as for `infer`.
        shapes: of the inputs, where they are known.
    """
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    bare.graph.name = "shapes"
    bare.graph.node.extend(model.graph.node)
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in weights:
            continue
        kind = value.type.tensor_type.elem_type
        known = shapes is not None and value.name in shapes
        bare.graph.input.append(
            helper.make_tensor_value_info(value.name, kind, shapes[value.name]) if shapes and known else value
        )
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims, dtype=np.int64) > _SMALL or tensor.data_location == onnx.TensorProto.EXTERNAL:
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            bare.graph.initializer.append(tensor)
    bare.graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in model.graph.output)
    known_now = shape_inference.infer_shapes(bare, data_prop=True).graph
    yield from (value for value in (*known_now.value_info, *known_now.output) if value.type.tensor_type.elem_type)


def drop_unused(model: onnx.ModelProto) -> None:
    """Remove the initializers and ``Constant`` nodes that nothing reads."""
    graph = model.graph
    used = {name for node in graph.node for name in reads(node)} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    if len(kept) < len(graph.initializer):
        _replace(graph.initializer, kept)
    live = [node for node in graph.node if node.op_type != "Constant" or node.output[0] in used]
    if len(live) < len(graph.node):
        _replace(graph.node, live)


def _replace(field: object, items: list[object]) -> None:
    # a repeated field can't be assigned; copies are taken before it is emptied
    del field[:]  # type: ignore[attr-defined]
    field.extend(items)  # type: ignore[attr-defined]


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all constants of the main graph."""
    return sum(_size(tensor) for tensor in Graph(model)._constants.values())


def _size(tensor: onnx.TensorProto) -> int:
    count = int(np.prod(tensor.dims, dtype=np.int64))
    return int(count * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write `model`; its weights go to ``<path>.data`` when they don't fit into one protobuf message."""
    if weight_bytes(model) < INLINE_BYTES:
        onnx.save_model(model, path)
        return
    onnx.save_model(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}.data")
