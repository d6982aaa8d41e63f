"""Dimensions as signatures spell them, at given axis sizes: ``8``, ``"batch"``, ``"2*batch + 1"``."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

from pipeline.errors import BuildError
from pipeline.types import Dim

_ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: Mapping[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "CleanDiv": operator.floordiv,
}


def size_of(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The value of a dimension such as ``2*batch + 1`` or ``Max(1, seq//2)``.

    Raises:
        BuildError: it has a name that `sizes` lacks (``data_0``: only the data decides it), or is of another form.
    """
    if isinstance(dim, int):
        return dim

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name):
                return sizes[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](value(left), value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.Call(func=ast.Name(id=name), args=arguments) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*map(value, arguments))
        raise BuildError(
            f"can't read the dimension `{dim}`", hint="this is a form of size that exportyard doesn't know"
        )

    try:
        return value(ast.parse(dim, mode="eval").body)
    except KeyError as unknown:
        raise BuildError(f"the dimension `{dim}` isn't decided by the axes, {unknown} isn't one") from None
