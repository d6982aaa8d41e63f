"""Run a model and look at tensors inside it, with bounded memory.

The graph is cut into segments whose observed tensors fit into a fixed amount of memory; a segment hands the next
one only what that still needs. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray

from pipeline import graph as graphs
from pipeline import integer
from pipeline.errors import DataError

SEGMENT_BYTES = 192 << 20

Array = NDArray[Any]
Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class _Segment:
    """Part of a model: what it reads, what it hands on, and what is looked at."""

    session: onnxruntime.InferenceSession
    reads: tuple[str, ...]
    outputs: tuple[str, ...]
    wanted: frozenset[str]


def over(
    model: Path, samples: Iterable[Feeds], wanted: Sequence[str] | None = None
) -> Iterator[Iterator[tuple[str, Array]]]:
    """For each sample, the tensors called `wanted` one by one (default: all whose range a scheme may ask for).

    An array must not be kept after the next one is taken, or memory isn't bounded.

    Raises:
        DataError: the model can't run a sample.
    """
    proto = onnx.load(model, load_external_data=False)
    names = integer.activations(graphs.Graph(proto)) if wanted is None else wanted
    segments: list[_Segment] = []
    planned = 0
    for sample in samples:
        size = sum(array.nbytes for array in sample.values())
        if not segments or size > 2 * planned:
            # cut again for a sample that is much larger than those before
            segments, planned = _cut(proto, model.parent, sample, set(names)), size
        yield _run(segments, sample, set(names))


def _run(segments: Sequence[_Segment], sample: Feeds, wanted: set[str]) -> Iterator[tuple[str, Array]]:
    live = dict(sample)
    yield from ((name, array) for name, array in sample.items() if name in wanted)
    for position, segment in enumerate(segments):
        needed = {name for later in segments[position + 1 :] for name in later.reads}
        try:
            values = segment.session.run(list(segment.outputs), {name: live[name] for name in segment.reads})
        except Exception as error:  # onnxruntime's own classes share no base
            shapes = {name: list(array.shape) for name, array in sample.items()}
            raise DataError(
                f"the model can't run a calibration sample of shapes {shapes}: {str(error).splitlines()[0]}",
                hint="calibration samples need the shapes that [[inputs]] and [axes] describe",
            ) from error
        live = {name: array for name, array in live.items() if name in needed}
        for name in reversed(segment.outputs):
            array = values.pop()
            if name in segment.wanted:
                yield name, array
            if name in needed:
                live[name] = array


def _cut(proto: onnx.ModelProto, folder: Path, sample: Feeds, wanted: set[str]) -> list[_Segment]:
    types, sizes = graphs.infer(proto, {name: array.shape for name, array in sample.items()})
    nodes = list(proto.graph.node)
    starts, held = [0], 0
    for position, node in enumerate(nodes):
        held += sum(sizes.get(name, 0) for name in node.output if name in wanted)
        if held > SEGMENT_BYTES and position > starts[-1]:
            starts.append(position)
            held = sum(sizes.get(name, 0) for name in node.output if name in wanted)
    parts = [nodes[start:end] for start, end in zip(starts, [*starts[1:], len(nodes)], strict=True)]
    if any(name not in types for name in _crossing(proto, parts)):
        parts = [nodes]  # a tensor whose type nobody knows can't cross a border
    return [_segment(proto, folder, part, parts[position + 1 :], wanted, types) for position, part in enumerate(parts)]


def _crossing(proto: onnx.ModelProto, parts: Sequence[Sequence[onnx.NodeProto]]) -> Iterator[str]:
    fixed = {tensor.name for tensor in proto.graph.initializer} | {value.name for value in proto.graph.input}
    for part in parts:
        made = {name for node in part for name in node.output}
        yield from (name for node in part for name in graphs.reads(node) if name not in made and name not in fixed)


def _segment(
    proto: onnx.ModelProto,
    folder: Path,
    part: Sequence[onnx.NodeProto],
    later: Sequence[Sequence[onnx.NodeProto]],
    wanted: set[str],
    types: Mapping[str, int],
) -> _Segment:
    made = {name for node in part for name in node.output if name}
    read = dict.fromkeys(name for node in part for name in graphs.reads(node) if name not in made)
    weights = {tensor.name for tensor in proto.graph.initializer}
    needed = {name for nodes in later for node in nodes for name in graphs.reads(node)}
    ends = {value.name for value in proto.graph.output}
    # a graph must have an output; the model's own ones do where nothing is looked at
    outputs = [name for node in part for name in node.output if name in wanted or name in needed or name in ends]
    cut = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    cut.graph.name = "segment"
    cut.graph.node.extend(part)
    cut.graph.initializer.extend(tensor for tensor in proto.graph.initializer if tensor.name in read)
    inputs = [name for name in read if name not in weights]
    known = {value.name: value for value in proto.graph.input}
    for name in inputs:
        cut.graph.input.append(known.get(name) or onnx.helper.make_tensor_value_info(name, types[name], None))
    cut.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return _Segment(session(cut, folder), tuple(inputs), tuple(outputs), frozenset(wanted & made))


def session(
    model: onnx.ModelProto, folder: Path | None = None, threads: int | None = None
) -> onnxruntime.InferenceSession:
    """`model` as it is written, on the CPU; for graphs that are made only to be looked into.

    Args:
        model: with weights of its own, or in files in `folder`.
        folder: see `model`.
        threads: that run it; None leaves it to ONNX Runtime.
    """
    options = onnxruntime.SessionOptions()
    # the numbers of the graph as it stands, since on a processor without dot products of bytes optimised integers may
    # overflow; and an arena would keep what one sample needed for ever
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4  # errors come as exceptions, too
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
