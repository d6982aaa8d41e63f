"""Programs of ``torch.export`` cut into parts."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue

from pipeline import origin, retrace
from pipeline import program as programs
from pipeline.errors import BuildError, first_line
from pipeline.explain.cut_signature import Dims, signature_of, sizes_of
from pipeline.explain.parts import Array, Feeds, Part, Role, Step
from pipeline.store import Key, Stored, make, write_json

SIGNATURE = "signature.json"
_QUANTIZE, _DEQUANTIZE = "quantized_decomposed.quantize_per", "quantized_decomposed.dequantize_per"


class ProgramForm:
    """See `parts.Form`. An operator that makes several tensors is one step with those that take them apart."""

    def __init__(self, stored: Stored, feeds_list: Sequence[Feeds]) -> None:
        self._stored, self._feeds, self._signature = stored, feeds_list, stored.signature()
        self._sizes = [sizes_of(self._signature, feeds) for feeds in feeds_list]
        self._module: Any = programs.load(stored.file(programs.FILE)).module(check_guards=False)
        graph = self._module.graph
        placeholders = graph.find_nodes(op="placeholder")
        self._named = dict(
            zip((node.name for node in placeholders), (spec.name for spec in self._signature.inputs), strict=True)
        )
        (last,) = graph.find_nodes(op="output")
        self._ends = [node.name for node in last.all_input_nodes]
        self.inputs, self.ends = tuple(self._named), tuple(self._ends)
        self._calls = [node for node in graph.nodes if node.op == "call_function"]
        self._fixed = self._constants()
        self._owners = [node for node in self._calls if not _takes_apart(node)]
        self.steps = tuple(self._step(node) for node in self._owners)

    def _constants(self) -> set[str]:
        """Names of nodes that only weights decide."""
        fixed = {node.name for node in self._module.graph.nodes if node.op == "get_attr"}
        for node in self._calls:
            if all(one.name in fixed for one in node.all_input_nodes):
                fixed.add(node.name)
        return fixed

    def _step(self, node: torch.fx.Node) -> Step:
        users = [user.name for user in node.users if _takes_apart(user)]
        reads = [one.name for one in node.all_input_nodes if one.op != "get_attr"]
        line = origin.line_of_call(node)
        operator = str(node.target).removesuffix(".default")
        return Step(
            node.name,
            operator,
            tuple(reads),
            tuple(users) or (node.name,),
            self._role(node),
            origin.module_of_call(node),
            line,
        )

    def _role(self, node: torch.fx.Node) -> Role:
        if node.name in self._fixed or not (_is_tensor(node) or any(_takes_apart(user) for user in node.users)):
            return "carried"
        if _quantizes(node):
            return "quantize"
        first = node.args[0] if node.args else None
        dequantizes = str(node.target).startswith(_DEQUANTIZE) and isinstance(first, torch.fx.Node)
        return "dequantize" if dequantizes and _quantizes(first) else "core"

    # --- values ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _kept(self) -> list[dict[str, Array]]:
        """Every tensor of each call, by the name of its node."""
        found = []
        for feeds in self._feeds:
            keeping = _Keeping(self._module)
            arguments = [torch.from_numpy(np.array(feeds[name], order="C")) for name in self._named.values()]
            with torch.inference_mode():
                keeping.run(*arguments, enable_io_processing=False)
            found.append(keeping.kept)
        return found

    def values(self, names: Iterable[str]) -> list[dict[str, Array]]:
        """As PyTorch computes them."""
        wanted = list(names)
        return [{name: kept[name] for name in wanted} for kept in self._kept]

    def scale(self, name: str) -> Array | None:
        """The second argument of the operator that dequantises it."""
        node = next((one for one in self._calls if one.name == name), None)
        if node is None or not str(node.target).startswith(_DEQUANTIZE) or not isinstance(node.args[1], float):
            return None
        return np.asarray(node.args[1])

    # --- parts -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _dims(self) -> Mapping[str, Dims]:
        shapes = {
            node.name: programs.shape_of(node.meta["val"]) for node in self._module.graph.nodes if _is_tensor(node)
        }
        symbols = {
            str(size): dim
            for node, spec in zip(self._named, self._signature.inputs, strict=True)
            for size, dim in zip(shapes.get(node, ()), spec.shape, strict=False)
            if isinstance(dim, str) and not isinstance(size, int) and size.is_Symbol
        }
        return {name: tuple(programs.in_axes(size, symbols) for size in shape) for name, shape in shapes.items()}

    def write(self, part: Part, folder: Path) -> Stored:
        """Its operators as a program of their own, traced again."""
        given = self.values([*part.reads.values(), *part.makes])
        signature = signature_of(part, given, self._dims, self._signature, self._sizes)
        graph, known = torch.fx.Graph(), dict[torch.fx.Node, torch.fx.Node]()
        nodes = {node.name: node for node in self._module.graph.nodes}
        for name in part.reads:
            known[nodes[name]] = graph.placeholder(name)
        for place in part.steps:
            for node in (self._owners[place], *(user for user in self._owners[place].users if _takes_apart(user))):
                for one in node.all_input_nodes:
                    if one.op == "get_attr" and one not in known:
                        known[one] = graph.node_copy(one)
                known[node] = graph.node_copy(node, known.__getitem__)
        graph.output(tuple(known[nodes[name]] for name in part.makes))
        module = torch.fx.GraphModule(self._module, graph)
        sizes = {name: axis.opt for name, axis in signature.axes.items()}

        def work(out: Path) -> Mapping[str, JsonValue]:
            try:
                traced = retrace.retraced(module, signature, sizes)
            except Exception as error:  # whatever the tracer meets
                raise BuildError(
                    f"a part of the program can't be traced: {type(error).__name__}: {first_line(error)}"
                ) from error
            programs.save(traced, out / programs.FILE, out)
            write_json(out / SIGNATURE, signature.plain())
            return self._stored.artifact.facts

        steps: list[JsonValue] = [*part.steps]
        return make(folder, Key("program", {"model": self._stored.digest}, {"steps": steps}), work).stored


class _Keeping(torch.fx.Interpreter):
    """Runs a module of torch and keeps every tensor by the name of its node."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.kept: dict[str, Array] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        """As the interpreter does."""
        found = super().run_node(n)
        if n.op != "get_attr" and isinstance(found, torch.Tensor) and found.dtype in programs.DTYPES.values():
            self.kept[n.name] = np.asarray(found.numpy(force=True), order="C")
        return found


def _takes_apart(node: torch.fx.Node) -> bool:
    """Whether it takes one tensor out of what another operator makes."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _is_tensor(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _quantizes(node: object) -> bool:
    return (
        isinstance(node, torch.fx.Node)
        and str(node.target).startswith(_QUANTIZE)
        and all(str(user.target).startswith(_DEQUANTIZE) for user in node.users)
        and bool(node.users)
    )
