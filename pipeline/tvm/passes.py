"""Passes over Relax modules that TVM lacks: look-ups that can't leave their table, and the same bytes every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator


@mutator
class _Clipping(PyExprMutator):  # type: ignore[misc]  # tvm ships no types
    """Rewrites ``take(mode="fast")``."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        if isinstance(call.op, tvm.ir.Op) and call.op.name == "relax.take" and call.attrs.mode == "fast":
            return relax.op.take(call.args[0], call.args[1], axis=call.attrs.axis, mode="clip")
        return call


def clipped_lookups(module: tvm.IRModule) -> tvm.IRModule:
    """Embedding look-ups read the nearest row for an index that is out of range; TVM's own read foreign memory."""
    visitor = _Clipping(module)
    for variable, function in module.functions.items():
        if isinstance(function, relax.Function):
            visitor.builder_.update_func(variable, visitor.visit_expr(function))
    return visitor.builder_.get()


def _sorted_shape_functions(module: tvm.IRModule, _context: object) -> tvm.IRModule:
    for variable, function in list(module.functions.items()):
        if not (isinstance(function, tirx.PrimFunc) and variable.name_hint.startswith("shape_func")):
            continue
        stores = list(function.body) if isinstance(function.body, tirx.SeqStmt) else []
        if all(isinstance(one, tirx.BufferStore) and isinstance(one.indices[0], tirx.IntImm) for one in stores):
            stores.sort(key=lambda one: int(one.indices[0]))
            module.update_func(variable, function.with_body(tirx.SeqStmt(stores)) if stores else function)
    return module


def sorted_shape_functions() -> Any:
    """A pass that puts the stores of shape functions in order: they come out of a hash table of pointers.

    Each store has a slot of its own and reads only the sizes of inputs, so their order means nothing.
    """
    return tvm.transform.module_pass(_sorted_shape_functions, opt_level=0, name="SortShapeFunctions")


def split_layouts(wanted: Callable[[tirx.PrimFunc], bool]) -> Any:
    """A pass that does TVM's `SplitLayoutRewritePreproc` to the `wanted` loop nests only: it fails on what a scatter is
    lowered to, which is no nest of blocks.
    """

    def run(module: tvm.IRModule, _context: object) -> tvm.IRModule:
        others = {
            variable: function
            for variable, function in module.functions.items()
            if isinstance(function, tirx.PrimFunc) and not wanted(function)
        }
        part = {variable: one for variable, one in module.functions.items() if variable not in others}
        found = relax.transform.SplitLayoutRewritePreproc()(tvm.IRModule(part, attrs=module.attrs))
        for variable, function in others.items():
            found[variable] = function
        return found

    return tvm.transform.module_pass(run, opt_level=0, name="SplitLayouts")
