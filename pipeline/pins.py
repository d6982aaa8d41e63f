"""The calling convention, pinned onto an exported ONNX graph: names of inputs, outputs and axes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
from pydantic import JsonValue

from pipeline import program as programs
from pipeline.types import Signature

MODULE = "pkg.torch.onnx.name_scopes"  # node metadata: the path of the module that a node comes from
_KEPT = (MODULE, "pkg.torch.onnx.class_hierarchy", "pkg.torch.onnx.stack_trace")
_TRACE = "pkg.torch.onnx.stack_trace"
_WRAPPER = "model."  # capture's wrapper around the user's module


def pin(model: ir.Model, signature: Signature, symbols: Mapping[str, str], root: Path) -> None:
    """Give `model` the signature's names, in its order, and make every other name of a value unique.

    Args:
        symbols: axis name for each symbol of the program (``s43``), for all dimensions in the graph.
        root: the workspace; source paths become relative to it.
    """
    _own_outputs(model.graph)
    _clean(model, root)
    _name_values(model.graph, signature)
    _name_dimensions(model, signature, symbols)


def values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Every value of `graph` and of the graphs inside its nodes, each once."""
    seen: set[int] = set()
    graphs = [graph, *(inner for node in ir.traversal.RecursiveGraphIterator(graph) for inner in _inner(node))]
    for one in graphs:
        made = (value for node in one for value in node.outputs)
        for value in itertools.chain(one.inputs, one.initializers.values(), made):
            if id(value) not in seen:
                seen.add(id(value))
                yield value


def _inner(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _own_outputs(graph: ir.Graph) -> None:
    """Make every output a value of its own: an input, a weight or a second mention goes through an Identity."""
    taken: set[int] = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    for place, value in enumerate(graph.outputs):
        if id(value) in taken:
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            graph.outputs[place] = node.outputs[0]
        taken.add(id(graph.outputs[place]))


def _clean(model: ir.Model, root: Path) -> None:
    """Keep where nodes come from in the user's code; drop what differs between machines or says nothing."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        kept = {key: node.metadata_props[key] for key in _KEPT if key in node.metadata_props}
        if _TRACE in kept:
            kept[_TRACE] = programs.without_paths(kept[_TRACE], root)
        node.metadata_props.clear()
        node.metadata_props.update(kept)
    for value in values(model.graph):
        value.metadata_props.clear()


def _name_values(graph: ir.Graph, signature: Signature) -> None:
    pinned = dict(zip(graph.inputs, (spec.name for spec in signature.inputs), strict=True))
    pinned |= dict(zip(graph.outputs, (spec.name for spec in signature.outputs), strict=True))
    every = [value for value in values(graph) if value not in pinned]
    wanted = {value: (value.name or "value").removeprefix(_WRAPPER) for value in every}
    used = set(pinned.values())
    # first out of the way, so that no two values ever have one name
    for place, value in enumerate((*pinned, *every)):
        _rename(value, f"/{place}")
    for value, name in pinned.items():
        _rename(value, name)
    for value, name in wanted.items():
        _rename(value, _unique(name, used))
    nodes: set[str] = set()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        node.name = _unique(node.name or node.op_type, nodes)


def _rename(value: ir.Value, name: str) -> None:
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name


def _unique(name: str, used: set[str]) -> str:
    fresh = next(one for one in itertools.chain([name], (f"{name}_{n}" for n in itertools.count(1))) if one not in used)
    used.add(fresh)
    return fresh


def _name_dimensions(model: ir.Model, signature: Signature, symbols: Mapping[str, str]) -> None:
    for value in values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape(_dimension(dim, symbols) for dim in value.shape)
    for value, spec in zip(
        (*model.graph.inputs, *model.graph.outputs), (*signature.inputs, *signature.outputs), strict=True
    ):
        value.shape = ir.Shape(spec.shape)


def _dimension(dim: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return None if dim.value is None else programs.in_axes(dim.value, symbols)


def facts(model: ir.Model) -> dict[str, JsonValue]:
    """Opset, node count, operators by how often they occur, bytes of all weights."""
    operators = Counter(
        f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
    )
    histogram: dict[str, JsonValue] = dict(sorted(operators.items()))
    return {
        "opset": model.opset_imports[""],
        "nodes": operators.total(),
        "operators": histogram,
        "parameter_bytes": sum(
            value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None
        ),
    }
