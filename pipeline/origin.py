"""Where in the user's model a node of an ONNX graph comes from, for messages that a user can act on."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import NodeProto
    from torch.export import ExportedProgram
    from torch.fx import Node

SCOPES = "pkg.torch.onnx.name_scopes"
TRACE = "pkg.torch.onnx.stack_trace"
_OF_TORCH = "_empty_nn_module_stack"  # what torch.export writes for an operator that it added by itself
_WORD = re.compile(r"[\w./:-]+")
_LINE = re.compile(r'File "([^"]+)", line (\d+)')


def of_error(path: Path, message: str) -> str:
    """What is known about the first node that a runtime's `message` names, as `` (operator ..., in ...)``, or ``""``.

    Args:
        path: the graph that the runtime was given.
        message: its error text; a node is found by its name, or else by its operator.
    """
    import onnx

    try:
        nodes = onnx.load(path, load_external_data=False).graph.node
    except Exception:  # the message is about a file that nothing can read
        return ""
    words = [part for word in _WORD.findall(message) for part in (word.strip(".:,"), *word.split(":"))]
    names = {node.name: node for node in nodes if node.name}
    operators: dict[str, NodeProto] = {}
    for node in nodes:
        operators.setdefault(node.op_type, node)
    for known in (names, operators):
        found = next((known[word] for word in words if word in known), None)
        if found is not None:
            return f" (operator `{found.op_type}`, {of_node(found)})"
    return ""


def of_node(node: NodeProto) -> str:
    """The module of the user's model that `node` was exported from, and its source line where that is known."""
    notes = {entry.key: entry.value for entry in node.metadata_props}
    parts = [f"node `{node.name}`"] if node.name else []
    module = module_of(node)
    if module:
        parts.append(f"in module `{module}`")
    lines = _LINE.findall(notes.get(TRACE, ""))
    if lines:
        parts.append(f"at {lines[-1][0]}:{lines[-1][1]}")
    return ", ".join(parts) or "a node without a name"


def module_of(node: NodeProto) -> str:
    """Path of the user's module that `node` was exported from, as ``named_modules`` spells it; ``""`` if unknown."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "")
    try:
        found = ast.literal_eval(scopes)
    except (SyntaxError, ValueError):
        return ""
    if not isinstance(found, list) or len(found) < 2:
        return ""
    # the last entry is the operation itself, and capture's wrapper holds the user's module as `model`
    path = str(found[-2])
    if path.startswith(_OF_TORCH):
        return ""
    return path.removeprefix("model").removeprefix(".") if found[1] == "model" else path


def line_of(node: NodeProto) -> str:
    """``file:line`` of the innermost line of the user's own code that `node` comes from; ``""`` if unknown."""
    trace = next((entry.value for entry in node.metadata_props if entry.key == TRACE), "")
    mine = _users(_LINE.findall(trace))
    return f"{mine[-1][0]}:{mine[-1][1]}" if mine else ""


def _users(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of `lines`, (file, number), that are neither torch's nor ours."""
    return [line for line in lines if not line[0].startswith(("torch/", "pipeline/", "<"))]


def of_program_error(program: ExportedProgram, message: str) -> str:
    """What is known about the first operator of `program` that a compiler's `message` names, as `of_error` tells it."""
    words = {word.strip(".:,'\"").replace("::", ".").removeprefix("torch.ops.") for word in _WORD.findall(message)}
    calls = [(node, str(node.target)) for node in program.graph.nodes if node.op == "call_function"]
    # only operators over graphs (cond) have a name of one word; others may be named as what they are made of
    equal = [
        node
        for node, name in calls
        if (name in words and ("." in name or name == message)) or ("." in name and _plain(name) in words)
    ]
    alike = [node for node, name in calls if "." in name and any(word.startswith(_plain(name)) for word in words)]
    for node in equal or alike:
        return f" (operator `{_plain(str(node.target)).replace('.', '::', 1)}`{_of_call(node)})"
    return ""


def _plain(name: str) -> str:
    """``aten.sort`` for ``aten.sort.default``."""
    return name.rpartition(".")[0] or name


def module_of_call(node: Node) -> str:
    """Path of the user's module that calls the operator, as ``named_modules`` spells it; ``""`` if unknown."""
    stack = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    path = stack[-1].removeprefix("L['self'].") if stack else ""
    return path.removeprefix("model").removeprefix(".") if path.startswith("model") else path


def line_of_call(node: Node) -> str:
    """``file:line`` of the innermost line of the user's own code that calls the operator; ``""`` if unknown."""
    mine = _users(_LINE.findall(node.meta.get("stack_trace") or ""))
    return f"{mine[-1][0]}:{mine[-1][1]}" if mine else ""


def _of_call(node: Node) -> str:
    module, lines = module_of_call(node), _LINE.findall(node.meta.get("stack_trace") or "")
    mine = _users(lines) or lines
    return (f", in module `{module}`" if module else "") + (f", at {mine[-1][0]}:{mine[-1][1]}" if mine else "")
