"""ONNX graphs cut into parts."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from pydantic import JsonValue

from pipeline import graph as graphs
from pipeline import origin, probe
from pipeline.errors import BuildError
from pipeline.explain.cut_signature import Dims, signature_of, sizes_of
from pipeline.explain.parts import Array, Feeds, Part, Role, Step
from pipeline.graph import Graph
from pipeline.store import Key, Stored, make, write_json

ONNX, WEIGHTS, SIGNATURE = "model.onnx", "model.onnx.data", "signature.json"
KEPT_BYTES = 1 << 30  # of a model's tensors
HIDDEN = (TensorProto.BFLOAT16,)  # types that ONNX Runtime has no arrays for
_WIDENING = ("Cast", "DequantizeLinear")


class GraphForm:
    """See `pipeline.explain.parts.Form`."""

    def __init__(self, stored: Stored, feeds_list: Sequence[Feeds]) -> None:
        self._stored, self._feeds = stored, feeds_list
        self._graph = Graph(onnx.load(stored.file(ONNX), load_external_data=False))
        self._signature = stored.signature()
        self._sizes = [sizes_of(self._signature, feeds) for feeds in feeds_list]
        self.inputs = tuple(spec.name for spec in self._signature.inputs)
        self.ends = tuple(value.name for value in self._graph.model.graph.output)
        self._constants = {tensor.name for tensor in self._graph.model.graph.initializer}
        self._nodes = list(self._graph.model.graph.node)
        self._types, _ = graphs.infer(self._graph.model)
        carried = self._carried()
        self.steps = tuple(self._step(node, carried) for node in self._nodes)

    def _step(self, node: onnx.NodeProto, carried: set[str]) -> Step:
        reads = dict.fromkeys(name for name in graphs.reads(node) if name not in self._constants)
        makes = tuple(name for name in node.output if name)
        role = self._role(node, carried)
        return Step(node.name, node.op_type, tuple(reads), makes, role, origin.module_of(node), origin.line_of(node))

    def _role(self, node: onnx.NodeProto, carried: set[str]) -> Role:
        if node.name in carried:
            return "carried"
        if self._narrows(node):
            return "quantize"
        maker = self._graph.makers.get(node.input[0]) if node.op_type in _WIDENING else None
        return "dequantize" if maker is not None and self._narrows(maker) else "core"

    def _narrows(self, node: onnx.NodeProto) -> bool:
        """Whether `node` makes 8-bit integers or bfloat16 only for them to be made floats again."""
        readers = self._graph.readers.get(node.output[0], [])
        rounds = node.op_type == "Cast" and graphs.attribute(node, "to") == TensorProto.BFLOAT16
        return (
            (rounds or node.op_type == "QuantizeLinear")
            and node.output[0] not in self._graph.outputs
            and bool(readers)
            and all(reader.op_type == _WIDENING[not rounds] for reader in readers)
        )

    def _carried(self) -> set[str]:
        """Names of the nodes that only weights decide, or only sizes, if they make whole numbers of those."""
        names, sizes, fixed = set[str](), set[str](), set(self._constants)
        for node in self._nodes:
            reads = set(graphs.reads(node))
            whole = all(self._types.get(name) == TensorProto.INT64 for name in node.output if name)
            if reads <= fixed:
                fixed |= set(node.output)
            elif node.op_type in ("Shape", "Size") or (whole and reads <= sizes | fixed):
                sizes |= set(node.output)
            else:
                continue
            names.add(node.name)
        return names

    # --- values ----------------------------------------------------------------------------------------------------

    def values(self, names: Iterable[str]) -> list[dict[str, Array]]:
        """As the graph says, run as it is written. All that it makes is kept for the next time, if that is not much.

        Raises:
            BuildError: one has a type that NumPy lacks.
        """
        wanted = dict.fromkeys(names)
        hidden = [name for name in wanted if self._types.get(name) in HIDDEN]
        if hidden:
            raise BuildError(f"ONNX Runtime doesn't hand out `{hidden[0]}`, which is no array of NumPy's")
        if self._kept is not None:
            return [{name: call[name] for name in wanted} for call in self._kept]
        return self._run(wanted)

    @functools.cached_property
    def _kept(self) -> list[dict[str, Array]] | None:
        given = {name: array.shape for name, array in self._feeds[0].items()}
        _, sizes = graphs.infer(self._graph.model, given)
        if len(self._feeds) * sum(sizes.values()) > KEPT_BYTES:
            return None
        made = (name for step in self.steps for name in step.makes if self._types.get(name) not in HIDDEN)
        return self._run(dict.fromkeys([*self.inputs, *made]))

    def _run(self, names: Iterable[str]) -> list[dict[str, Array]]:
        calls = probe.over(self._stored.file(ONNX), self._feeds, list(names))
        return [{name: np.array(array) for name, array in tensors} for tensors in calls]

    def scale(self, name: str) -> Array | None:
        """The second input of the ``DequantizeLinear`` that makes it, laid out for that tensor's axes."""
        maker = self._graph.makers.get(name)
        if maker is None or maker.op_type != "DequantizeLinear":
            return None
        return self._graph.value(maker.input[1])

    # --- parts -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _dims(self) -> Mapping[str, Dims]:
        """Shapes as the graph spells them; a dimension that it doesn't know is None."""
        model = self._graph.model
        values = [*graphs.inferred(model), *model.graph.value_info, *model.graph.input, *model.graph.output]
        return {
            value.name: tuple(
                dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None
                for dim in value.type.tensor_type.shape.dim
            )
            for value in values
            if value.type.tensor_type.HasField("shape")
        }

    def write(self, part: Part, folder: Path) -> Stored:
        """Its nodes as a graph of their own, whose inputs have the names that they have in the whole."""
        given = self.values([*part.reads.values(), *part.makes])
        signature = signature_of(part, given, self._dims, self._signature, self._sizes)
        model = onnx.ModelProto()
        whole = self._graph.model
        model.CopyFrom(onnx.ModelProto(ir_version=whole.ir_version, functions=whole.functions))
        model.opset_import.extend(whole.opset_import)
        model.graph.name = "part"
        model.graph.node.extend(self._nodes[place] for place in part.steps)
        read = {name for node in model.graph.node for name in graphs.reads(node)}
        model.graph.initializer.extend(one for one in whole.graph.initializer if one.name in read)
        for field, specs in ((model.graph.input, signature.inputs), (model.graph.output, signature.outputs)):
            for spec in specs:
                kind = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
                field.append(helper.make_tensor_value_info(spec.name, kind, spec.shape))

        def work(out: Path) -> Mapping[str, JsonValue]:
            onnx.save(model, out / ONNX)
            if WEIGHTS in self._stored.artifact.files:
                shutil.copyfile(self._stored.file(WEIGHTS), out / WEIGHTS)
            write_json(out / SIGNATURE, signature.plain())
            return self._stored.artifact.facts

        steps: list[JsonValue] = [*part.steps]
        return make(folder, Key("onnx", {"model": self._stored.digest}, {"steps": steps}), work).stored
