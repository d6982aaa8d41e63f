"""Weights beside the library: a library of more than 2 GB can't be linked, nor loaded by parts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

FILE = "weights.params"
LARGEST_INSIDE = 1_900_000_000  # bytes; code and weights of a library reach each other over 31-bit distances
SMALLEST = 256  # bytes; a smaller constant is no weight


def size_of(module: Any) -> int:
    """Bytes of all constants of ``main``."""
    from tvm import ir, relax, runtime

    found: list[int] = []

    def note(expression: Any) -> None:
        if isinstance(expression, ir.GenericConst) and isinstance(expression.value, runtime.Tensor):
            found.append(_bytes(expression))

    relax.analysis.post_order_visit(module["main"], note)
    return sum(found)


def _bytes(constant: Any) -> int:
    value = constant.value
    return math.prod(int(size) for size in value.shape) * int(value.dtype.itemsize)


def detached(module: Any) -> tuple[Any, dict[str, Any]]:
    """`module` with the large constants of ``main`` as further arguments, and their values in that order."""
    from tvm import relax, runtime

    values: dict[str, Any] = {}
    variables: list[Any] = []

    @relax.expr_functor.mutator
    class Detach(relax.PyExprMutator):  # type: ignore[misc]  # TVM has no types
        def visit_generic_const_(self, op: Any) -> Any:
            if not isinstance(op.value, runtime.Tensor) or _bytes(op) < SMALLEST:
                return op
            name = f"w{len(values):05}"
            values[name] = op.value
            variables.append(relax.Var(name, op.ty))
            return variables[-1]

    main = module["main"]
    body = Detach(module).visit_expr(main.body)
    function = relax.Function([*main.params, *variables], body, main.ret_ty, main.is_pure, main.attrs)
    changed = module.clone()
    changed[module.get_global_var("main")] = function
    return relax.transform.Normalize()(changed), values


def write(values: dict[str, Any], folder: Path) -> None:
    """`values` as ``weights.params``, in TVM's own format."""
    from tvm import runtime

    runtime.save_param_dict_to_file(values, str(folder / FILE))


def read(folder: Path) -> list[Any]:
    """What `write` wrote, in the order of the arguments; nothing if it wrote nothing."""
    import tvm

    path = folder / FILE
    if not path.is_file():
        return []
    found = tvm.get_global_func("runtime.LoadParamsFromFile")(str(path))
    return [found[name] for name in sorted(str(name) for name in found)]
