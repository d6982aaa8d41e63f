"""A captured program as TorchScript: its graph written down as code, and that compiled.

It is scripted and not traced: a trace writes sizes and the branch that was taken down as constants, whereas in the
program's graph sizes are still sizes, and what ``torch.cond`` decides by data is still decided by data.
"""

from __future__ import annotations

import io
import operator
import re
import zipfile
from pathlib import Path
from typing import Any, cast

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from pipeline import program as programs

# TorchScript numbers classes that it meets again in a process; in a frozen module, one class is all there is
_NUMBERED = re.compile(rb"\.___torch_mangle_\d+")
_NUMBERED_FILE = re.compile(r"/___torch_mangle_\d+\.py$")
# checks of the tracer's assumptions, which capture has proven
_CHECKS = frozenset(
    {
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)


class UnscriptableError(Exception):
    """An operator has no form in TorchScript; the message is its name."""


class Branch(torch.nn.Module):
    """One of two modules, each with a list of tensors as its input and its output."""

    def __init__(self, yes: torch.nn.Module, no: torch.nn.Module) -> None:
        super().__init__()
        self.yes = yes
        self.no = no

    def forward(self, flag: torch.Tensor, operands: list[torch.Tensor]) -> list[torch.Tensor]:
        """`yes` where the flag is true."""
        if bool(flag):
            return self.yes(operands)  # type: ignore[no-any-return]
        return self.no(operands)  # type: ignore[no-any-return]


def frozen(program: ExportedProgram) -> Any:
    """The program as a frozen module of TorchScript.

    Raises:
        UnscriptableError: it has a loop, or another operator over graphs that isn't ``torch.cond``.
        RuntimeError: TorchScript's compiler can't type a call.
    """
    module = _plain(cast("GraphModule", programs.runnable(program)))
    with programs.quiet(), torch.no_grad():  # each step warns that TorchScript is deprecated
        script = torch.jit.script(module)
        script.training = False  # not .eval(): the module of a program refuses it
        return torch.jit.freeze(script)


def save(module: Any, path: Path) -> None:
    """Write `module` with the same bytes each time, without the names of source files on this machine."""
    written = io.BytesIO()
    with programs.quiet():
        torch.jit.save(module, written)
    with zipfile.ZipFile(written) as given:
        records = {name.partition("/")[2]: given.read(name) for name in sorted(given.namelist())}
    with programs.opened(path) as file:
        writer = torch._C.PyTorchFileWriter(file)  # aligns tensors, which a device may map into its memory
        for name, content in records.items():
            if name.endswith(".debug_pkl") or name.startswith(".data/") or name == "version":
                continue
            kept = _NUMBERED.sub(b"", content) if name.endswith((".py", ".pkl")) else content
            writer.write_record(_NUMBERED_FILE.sub(".py", name), kept, len(kept))
        writer.write_end_of_file()


def load(path: Path) -> Any:
    """The module in a file.

    Raises:
        RuntimeError: it is broken.
    """
    with programs.quiet():
        return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]


def _plain(module: GraphModule) -> GraphModule:
    """The same graph with plain arguments, and with operators by the names that TorchScript knows."""
    graph = module.graph
    graph._codegen = torch.fx.graph.CodeGen()  # arguments and results as they are, no trees of them
    for node in list(graph.nodes):
        if node.target in _CHECKS or (node.op == "call_module" and "guard" in str(node.target)):
            graph.erase_node(node)
        elif node.target is torch.ops.aten.sym_size.int:
            node.op, node.target = "call_method", "size"
        elif node.target is torch.ops.higher_order.cond:
            _replace_by_branch(module, node)
        elif isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target._overloadpacket
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            raise UnscriptableError(str(node.target))
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return GraphModule(module, graph)


def _replace_by_branch(module: GraphModule, node: Node) -> None:
    flag, yes, no, operands = node.args
    sides = [_of_list(_plain(cast("GraphModule", module.get_submodule(str(side.target))))) for side in (yes, no)]  # type: ignore[union-attr]
    name = f"branch_{node.name}"
    module.add_module(name, Branch(*sides))
    with module.graph.inserting_before(node):
        call = module.graph.call_module(name, (flag, list(operands)))  # type: ignore[arg-type]
    node.replace_all_uses_with(call)
    module.graph.erase_node(node)


def _of_list(module: GraphModule) -> GraphModule:
    """`module` with one list as its input, and a list as its output: both sides of a branch must look alike."""
    graph: Graph = module.graph
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_before(next(iter(graph.nodes))):
        operands = graph.placeholder("operands", type_expr=list[torch.Tensor])
    for place, node in enumerate(inputs):
        with graph.inserting_before(node):
            item = graph.call_function(operator.getitem, (operands, place))
        node.replace_all_uses_with(item)
        graph.erase_node(node)
    output = graph.output_node()
    output.args = (list(output.args[0]),)  # type: ignore[arg-type]
    return GraphModule(module, graph)
