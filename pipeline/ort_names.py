"""Names in a graph that ONNX Runtime optimised, made the same in every build.

What it adds gets the first free name with a running number (``ReorderOutput_token_4``), and it numbers in the order of
hash tables. Such names are given anew here, in the order of the nodes; names of the model itself stay, since a reader
finds the user's modules by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx


def make_canonical(model: onnx.ModelProto, source: Path) -> None:
    """Rename in `model`, which was optimised from the file `source`, so that equal graphs have equal bytes."""
    known = set(_names(onnx.load(source, load_external_data=False).graph))
    fresh: dict[str, str] = {"": ""}
    for index, node in enumerate(model.graph.node):
        if node.name not in known:
            node.name = f"{node.op_type}:{index}"
        for place, name in enumerate(node.input):
            node.input[place] = _name(name, f"{node.name}:in{place}", known, fresh)
        for place, name in enumerate(node.output):
            node.output[place] = _name(name, f"{node.name}:out{place}", known, fresh)
    for value in (*model.graph.initializer, *model.graph.value_info):
        value.name = fresh.get(value.name, value.name)
    model.graph.initializer.sort(key=lambda tensor: tensor.name)  # in place: a copy would be one of every weight
    model.graph.value_info.sort(key=lambda value: value.name)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)
    yield from (value.name for value in (*graph.input, *graph.output, *graph.initializer))


def _name(name: str, proposal: str, known: set[str], fresh: dict[str, str]) -> str:
    if name in known:
        return name
    return fresh.setdefault(name, proposal)
