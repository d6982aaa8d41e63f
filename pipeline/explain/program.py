"""Where a graph stops being the program that it was exported from.

The program is run operator by operator, broken down as the exporter does it, after which most tensors of the graph
have the names of its nodes. Then each stretch of the graph between two such tensors is run on the program's own
values: what it gets wrong is its own fault, and not that of what stands before it.

How far a stretch may be off follows from rounding alone: both sides round each of the n numbers that are added up for
one element, which by N. J. Higham and T. Mary ("A new approach to probabilistic rounding error analysis", 2019) comes
to ``sqrt(n)`` times what one rounding does. That is looked at: all inputs are moved by one unit roundoff up or down at
random, and the output is seen to move; one rounding of the output itself comes on top.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper, load
from torch.export import ExportedProgram

from pipeline import graph as graphs
from pipeline import origin, probe
from pipeline import program as programs
from pipeline.explain import gaps
from pipeline.explain.states import States
from pipeline.explain.stretches import Shapes, Stretch, roundings, stretches
from pipeline.explain.stretches import shapes as shapes_of
from pipeline.stages.to_onnx import decomposed
from pipeline.store import Stored
from pipeline.types import Departure, Recipe

Array = NDArray[Any]
Feeds = Mapping[str, Array]

OWN = "/own"  # appended to the name of a tensor; no exporter writes such names
MOVED = 64  # unit roundoffs by which inputs are moved: enough to be seen, little enough to stay proportional
DRAWS = 16  # of directions, for tensors that seem to depart
AGAIN = "remove the recipe's `onnx` folder below artifacts/ and export again"


@dataclass
class _Seen:
    """What was found out about one tensor, at the feeds at which its stretch was worst."""

    own: float = math.inf
    allowed: float = -math.inf
    after: float = math.inf
    noise: float = 0.0
    values: tuple[Array, Array] | None = field(default=None, repr=False)

    def note(self, reference: Array, other: Array, allowed: float) -> None:
        """Take this in if it is worse than what was seen before."""
        signal, noise = gaps.sizes(reference, other)
        own, bound = gaps.decibels(signal, noise), gaps.decibels(signal, allowed)
        if self.values is None or own - bound < self.own - self.allowed or (own == -math.inf != self.own):
            self.own, self.allowed, self.noise, self.values = own, bound, allowed, (reference, other)

    @property
    def departs(self) -> bool:
        """Whether rounding can't explain it."""
        return self.own < self.allowed


def departures(recipe: Recipe, program: Stored, onnx: Stored, feeds_list: Sequence[Feeds]) -> tuple[Departure, ...]:
    """The operators of the graph `onnx` whose output isn't what `program` says, in the graph's order.

    All tensors of a call are kept in memory, so the feeds had better be small.

    Args:
        recipe: of both.
        program: in fp32.
        onnx: the fp32 graph that was made of it.
        feeds_list: what both are asked.

    Raises:
        ConversionError: the program can't be broken down as it was when the graph was made.
        DataError: the graph can't run the feeds.
    """
    source = decomposed(recipe, program)
    path = onnx.file("model.onnx")
    graph = graphs.Graph(load(path, load_external_data=False))
    twins = _twins(graph.model, source)
    parts = stretches(graph, twins)
    seen = {part.output: _Seen() for part in parts}
    forced = _Forced(graph.model, path.parent, list(seen))
    for feeds in feeds_list:
        values = _values(source, [feeds[spec.name] for spec in program.signature().inputs])
        known = {name: values[twins[name]] for name in seen}
        _judge(forced, graph, parts, {**feeds, **known}, seen)
        for tensors in probe.over(path, [feeds], list(known)):
            for name, array in tensors:
                seen[name].after = min(seen[name].after, gaps.decibels(*gaps.sizes(known[name], array)))
    states = States(source, graph)
    return tuple(_departure(part, twins[part.output], seen, states) for part in parts if seen[part.output].departs)


def _departure(part: Stretch, twin: str, seen: Mapping[str, _Seen], states: States) -> Departure:
    found = seen[part.output]
    assert found.values is not None, "it departs"
    node, kind = part.bearing, gaps.kind(part.bearing.op_type, *found.values, found.noise)
    differing = states.differing(part.nodes, twin)
    if differing is not None:
        node, state = differing
        kind = "bias" if state.endswith("bias") else "weights differ"
        advice = f"the graph has other numbers for `{state.removeprefix('model.')}` than the program: {AGAIN}"
    else:
        advice = (
            f"the exporter writes `{twin}` down as something else: try another `opset`, other operators in the model,"
            " or a function of your own in `translations`"
        )
        if kind == "bias":
            node = next((one for one in reversed(part.nodes) if one.op_type == "Add"), node)
    return Departure(
        level="conversion",
        operator=node.op_type,
        node=node.name,
        module=origin.module_of(node),
        line=origin.line_of(node),
        output=part.output,
        before=min((seen[name].after for name in part.reads if name in seen), default=math.inf),
        after=found.after,
        own=found.own,
        allowed=found.allowed,
        because="sqrt(n) times what one rounding of all inputs and of the output does, with n roundings an element",
        kind=kind,
        suggestion=advice,
    )


# --- the program's side --------------------------------------------------------------------------------------------


class _Keeping(torch.fx.Interpreter):
    """Runs a graph of torch and keeps every tensor by the name of its node."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.kept: dict[str, Array] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        """As the interpreter does."""
        found = super().run_node(n)
        if n.op == "call_function" and isinstance(found, torch.Tensor) and found.dtype in programs.DTYPES.values():
            self.kept[n.name] = np.asarray(found.numpy(force=True), order="C")
        return found


def _values(source: ExportedProgram, inputs: Sequence[Array]) -> dict[str, Array]:
    """Every tensor that the program makes of `inputs`, by the name of its node."""
    given, states = iter(inputs), {**source.state_dict, **source.constants}
    arguments = [
        torch.from_numpy(np.array(next(given), order="C"))
        if spec.kind.name == "USER_INPUT"
        else states[str(spec.target)]
        for spec in source.graph_signature.input_specs
    ]
    keeping = _Keeping(source.graph_module)
    with torch.inference_mode():
        keeping.run(*arguments, enable_io_processing=False)
    return keeping.kept


def _twins(model: onnx.ModelProto, source: ExportedProgram) -> dict[str, str]:
    """For each tensor of the graph that the program has, too, the name of its node there."""
    made = {node.name: node for node in source.graph.nodes if node.op == "call_function"}
    specs = [spec for spec in source.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    ends = dict(zip((value.name for value in model.graph.output), (spec.arg.name for spec in specs), strict=True))
    types, _ = graphs.infer(model)
    found = {}
    for node in model.graph.node:
        scope = _scope(node)
        for name in node.output:
            # a name that an input or output of the recipe has was given a number
            renamed = scope in made and re.fullmatch(re.escape(scope) + r"_\d+", name) is not None
            twin = ends.get(name) or (scope if renamed else name)
            if twin in made and _alike(made[twin].meta.get("val"), types.get(name)):
                found[name] = twin
    return found


def _alike(value: object, kind: int | None) -> bool:
    """Whether `value` is a tensor of the element type `kind` of ONNX."""
    dtype = next((name for name, one in programs.DTYPES.items() if getattr(value, "dtype", None) == one), None)
    return dtype is not None and kind == helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _scope(node: onnx.NodeProto) -> str:
    """The node of the program that the exporter wrote `node` for."""
    for entry in node.metadata_props:
        if entry.key == origin.SCOPES:
            return str(ast.literal_eval(entry.value)[-1])
    return ""


# --- the graph's side ----------------------------------------------------------------------------------------------


class _Forced:
    """The graph cut at every tensor of `names`: all readers of one are given the program's."""

    def __init__(self, model: onnx.ModelProto, folder: Path, names: Sequence[str]) -> None:
        self.names, self._folder = tuple(names), folder
        cut = onnx.ModelProto()
        cut.CopyFrom(model)
        for node in cut.graph.node:
            for place, name in enumerate(node.output):
                if name in self.names:
                    node.output[place] = name + OWN
        del cut.graph.output[:], cut.graph.value_info[:]
        cut.graph.output.extend(onnx.ValueInfoProto(name=name + OWN) for name in self.names)
        self._model = cut
        self._session: tuple[tuple[str, ...], onnxruntime.InferenceSession] | None = None

    def __call__(self, values: Feeds) -> dict[str, Array]:
        """What each stretch makes of `values`, by the tensor that it ends with."""
        session = self._made(values)
        wanted = {value.name for value in session.get_inputs()}
        found = session.run(None, {name: array for name, array in values.items() if name in wanted})
        return dict(zip(self.names, found, strict=True))

    def _made(self, values: Feeds) -> onnxruntime.InferenceSession:
        kinds = tuple(sorted(f"{name} {array.dtype}" for name, array in values.items()))
        if self._session is None or self._session[0] != kinds:
            model = onnx.ModelProto()
            model.CopyFrom(self._model)
            have = {value.name for value in model.graph.input}
            model.graph.input.extend(
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), None)
                for name, array in values.items()
                if name not in have
            )
            self._session = kinds, probe.session(model, self._folder)
        return self._session[1]


def _judge(
    forced: _Forced, graph: graphs.Graph, parts: Sequence[Stretch], given: Feeds, seen: Mapping[str, _Seen]
) -> None:
    """Note what each stretch makes of the program's values `given`, and how far rounding may take it."""
    own, draw = forced(given), np.random.default_rng(0)
    shapes = shapes_of(graph, {name: array.shape for name, array in given.items()})
    far = dict.fromkeys(own, 0.0)
    suspects = [part for part in parts if given[part.output].dtype.kind == "f"]
    for _ in range(DRAWS):
        moved = forced({name: _moved(array, draw) for name, array in given.items()})
        for part in suspects:
            far[part.output] = max(far[part.output], gaps.sizes(own[part.output], moved[part.output])[1] / MOVED)
        # one draw is enough for most; of a tensor of one element it may happen to say nothing
        suspects = [part for part in suspects if _exceeds(part, given, own, _bound(part, shapes, given, far))]
        if not suspects:
            break
    for part in parts:
        seen[part.output].note(given[part.output], own[part.output], _bound(part, shapes, given, far))


def _bound(part: Stretch, shapes: Shapes, given: Feeds, far: Mapping[str, float]) -> float:
    """Root mean square of what rounding does to the tensor that `part` makes; 0 for integers."""
    reference = given[part.output]
    if reference.dtype.kind != "f":
        return 0.0
    signal, _ = gaps.sizes(reference, reference)
    unit = float(np.finfo(reference.dtype).eps) / 2
    return math.sqrt(roundings(part, shapes)) * (far[part.output] + unit * signal)


def _exceeds(part: Stretch, given: Feeds, own: Feeds, bound: float) -> bool:
    return not gaps.sizes(given[part.output], own[part.output])[1] <= bound


def _moved(array: Array, draw: np.random.Generator) -> Array:
    """`array` with each float moved up or down by a few unit roundoffs; infinities and fillings stay."""
    if array.dtype.kind != "f":
        return array
    step = MOVED * float(np.finfo(array.dtype).eps) / 2
    up = draw.integers(0, 2, array.shape, np.int8).astype(bool)
    with np.errstate(over="ignore"):
        found = (array * np.where(up, 1 + step, 1 - step)).astype(array.dtype)
    return np.where(np.abs(array) < gaps.largest(array) / 2, found, array)
