"""From an imported Relax module to machine code: the order of the passes."""

from __future__ import annotations

import warnings
from typing import Any

import tvm
from tvm import relax

from pipeline.tvm import math as tvm_math
from pipeline.tvm.integer import integer_contractions
from pipeline.tvm.layout import channels_last
from pipeline.tvm.nests import Chooser, Registers, as_the_rule
from pipeline.tvm.passes import clipped_lookups, sorted_shape_functions, split_layouts
from pipeline.tvm.rounding import rounded_at_once
from pipeline.tvm.schedules import RULE
from pipeline.tvm.schedules import scheduled as by_rule


def lowered(module: Any, where: Any, registers: Registers) -> Any:
    """`module` (Relax) as fused loop nests that no one has scheduled."""
    transform = relax.transform
    tvm_math.install()
    passes = [
        transform.DecomposeOpsForInference(),
        transform.CanonicalizeBindings(),
        channels_last(),
        transform.DeadCodeElimination(["main"]),
        # before constants are folded, which would turn integer weights into floats
        *([integer_contractions(registers.dot)] if registers.dot is not None else []),
        transform.CanonicalizeBindings(),
        transform.Normalize(),
        transform.FoldConstant(),
        rounded_at_once(),
        transform.DeadCodeElimination(["main"]),
        transform.LegalizeOps(),
        relax.get_pipeline("zero"),
        transform.AttachAttrLayoutFreeBuffers(),
    ]
    return _passed(clipped_lookups(module), passes, where)


def scheduled(module: Any, where: Any, registers: Registers, choose: Chooser = as_the_rule) -> Any:
    """Every loop nest of a lowered module as it shall run on `where`; weights in the order that they are read in."""
    transform = relax.transform
    passes = [
        by_rule(registers, choose),
        # constants that the schedules want in another layout get it now, not at every call
        split_layouts(lambda nest: bool(nest.attrs and nest.attrs.get(RULE) == "contraction")),
        transform.FoldConstant(),
        transform.DeadCodeElimination(["main"]),
    ]
    return _passed(module, passes, where)


def _passed(module: Any, passes: list[Any], where: Any) -> Any:
    with where, tvm.transform.PassContext(opt_level=3), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tvm.transform.Sequential(passes)(module)


def integer_contractions_of(module: Any) -> int:
    """How many contractions of a scheduled module run as dot products of 8-bit integers."""
    count = 0

    def note(expression: Any) -> None:
        nonlocal count
        if not (isinstance(expression, relax.Call) and expression.args):
            return
        callee = expression.args[0]
        function = module[callee] if isinstance(callee, tvm.ir.GlobalVar) else None
        if isinstance(function, tvm.tirx.PrimFunc) and function.attrs.get(RULE) == "integer_contraction":
            count += 1

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, note)
    return count


def compiled(module: Any, where: Any) -> Any:
    """Machine code of a scheduled module."""
    with where, tvm.transform.PassContext(opt_level=3), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lowering = tvm.transform.Sequential([relax.get_default_pipeline(where), sorted_shape_functions()])
        return tvm.compile(module, target=where, relax_pipeline=lowering)
