"""Quantisations, each as one operator together with the linear steps and the clips before it.

Between two contractions of a quantised graph stand a product with a scale, a bias, perhaps a residual that was
dequantised, a clip, a division by the next scale, a rounding and a zero point. For each of the integers that come in
that is one product and one sum, if the constants are put together beforehand; a clip of real numbers becomes one of
the integers; and to round is to add a number so large that no bit is left for the fraction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, te, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.tirx import op

from pipeline.tvm.layout import constant

NO_FRACTION = 1.5 * 2**23  # float32 from here to a third more are whole numbers, whose last bits count up
NO_FRACTION_BITS = 0x4B400000


@dataclass(frozen=True)
class _Linear:
    """The sum of ``factor * tensor`` over `terms`, and `shift`, then clipped."""

    terms: tuple[tuple[Any, NDArray[np.float64]], ...]
    shift: NDArray[np.float64]
    low: float = -np.inf
    high: float = np.inf

    @property
    def clipped(self) -> bool:
        return self.low > -np.inf or self.high < np.inf

    def times(self, factor: NDArray[np.float64]) -> _Linear:
        return _Linear(tuple((tensor, own * factor) for tensor, own in self.terms), self.shift * factor)

    def plus(self, other: _Linear) -> _Linear:
        return _Linear(self.terms + other.terms, self.shift + other.shift)


def rounded_at_once() -> Any:
    """A pass over a Relax module whose constants are folded."""

    def run(module: tvm.IRModule, _context: object) -> tvm.IRModule:
        visitor = _Rounding(module)
        for variable, function in module.functions.items():
            if isinstance(function, relax.Function):
                visitor.bound, visitor.uses = _bindings(function)
                visitor.builder_.update_func(variable, visitor.visit_expr(function))
        return visitor.builder_.get()

    return tvm.transform.module_pass(run, opt_level=0, name="RoundedAtOnce")


def _bindings(function: relax.Function) -> tuple[Mapping[Any, Any], Mapping[Any, int]]:
    """What each variable stands for, and how many times it is read."""
    bound: dict[Any, Any] = {}
    uses: Counter[Any] = Counter()

    def note(expression: Any) -> None:
        if isinstance(expression, relax.Call | relax.Tuple):
            uses.update(_read(expression))
        if isinstance(expression, relax.SeqExpr):
            uses.update(one for one in [expression.body] if isinstance(one, relax.Var))
            for block in expression.blocks:
                for binding in block.bindings:
                    bound[binding.var] = binding.value
                    uses.update(one for one in [binding.value] if isinstance(one, relax.Var))

    relax.analysis.post_order_visit(function.body, note)
    return bound, uses


def _read(expression: Any) -> list[Any]:
    parts = expression.args if isinstance(expression, relax.Call) else expression.fields
    return [one for one in parts if isinstance(one, relax.Var)]


@mutator
class _Rounding(PyExprMutator):  # type: ignore[misc]  # tvm ships no types
    """Rewrites each `quantize` whose scale is one number."""

    bound: Mapping[Any, Any]
    uses: Mapping[Any, int]

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        if not _is(call, "relax.quantize"):
            return self.visit_expr_post_order(call)
        scale, zero, kind = constant(call.args[1]), constant(call.args[2]), str(call.attrs.out_dtype)
        if scale is None or zero is None or scale.size != 1 or kind not in ("int8", "uint8"):
            return self.visit_expr_post_order(call)
        if str(call.args[0].ty.dtype) != "float32":
            return self.visit_expr_post_order(call)
        found = self._linear(call.args[0])
        if not found.terms or not _along_last(found):
            found = _whole(call.args[0])
        return self._emit(found, call, float(scale.item()), int(zero.item()), kind)

    def _emit(self, found: _Linear, call: Any, scale: float, zero: int, kind: str) -> Any:
        ends = np.iinfo(kind)
        low, high = (
            int(np.clip(np.rint(np.float32(end) / np.float32(scale)) + zero, ends.min, ends.max))
            for end in (found.low, found.high)
        )
        found = found.times(np.array(1 / scale))
        numbers = [*(factor for _, factor in found.terms), found.shift]
        vectors = [relax.const(one.reshape(-1).astype(np.float32)) for one in numbers if one.size > 1]
        tensors = [self.visit_expr(tensor) for tensor, _ in found.terms]
        compute = _compute(list(call.ty.shape), numbers, zero, (low, high), kind)
        name = "quantize" if len(tensors) == 1 and str(tensors[0].ty.dtype) == "float32" else "requantize"
        return self.builder_.call_te(compute, tensors, vectors, primfunc_name_hint=name)

    def _linear(self, value: Any) -> _Linear:
        """`value` as far as it is linear in its operands; what others read, too, is an operand."""
        number = constant(value)
        if number is not None:
            return _Linear((), number.astype(np.float64))
        made = self.bound.get(value)
        if _is(made, "relax.dequantize"):
            return self._dequantised(made) or _whole(value)
        if made is None or self.uses[value] > 1:
            return _whole(value)
        for name, rule in self._rules().items():
            if _is(made, name):
                return rule(made) or _whole(value)
        return _whole(value)

    def _rules(self) -> Mapping[str, Callable[[Any], _Linear | None]]:
        return {
            "relax.add": self._sum,
            "relax.multiply": self._product,
            "relax.astype": self._cast,
            "relax.maximum": self._maximum,
            "relax.minimum": self._minimum,
            "relax.nn.relu": lambda call: _clip(self._linear(call.args[0]), 0, np.inf),
        }

    def _dequantised(self, call: Any) -> _Linear | None:
        scale, zero = constant(call.args[1]), constant(call.args[2])
        if scale is None or zero is None or scale.size != 1 or str(call.ty.dtype) != "float32":
            return None
        factor = scale.astype(np.float64).reshape(())
        return _Linear(((call.args[0], factor),), -factor * float(zero.item()))

    def _sum(self, call: Any) -> _Linear | None:
        left, right = self._linear(call.args[0]), self._linear(call.args[1])
        return None if left.clipped or right.clipped else left.plus(right)

    def _product(self, call: Any) -> _Linear | None:
        for left, right in (call.args, reversed(call.args)):
            factor = constant(right)
            if factor is not None:
                found = self._linear(left)
                return None if found.clipped else found.times(factor.astype(np.float64))
        return None

    def _cast(self, call: Any) -> _Linear | None:
        """Of an int32 sum to float."""
        whole = call.args[0]
        if str(whole.ty.dtype) != "int32" or str(call.ty.dtype) != "float32":
            return None
        made: Any = self.bound.get(whole)
        if _is(made, "relax.add") and self.uses[whole] == 1:
            offset = constant(made.args[1])
            if offset is not None:
                return _Linear(((made.args[0], np.array(1.0)),), offset.astype(np.float64))
        return _whole(whole)

    def _maximum(self, call: Any) -> _Linear | None:
        bound = constant(call.args[1])
        return None if bound is None or bound.size != 1 else _clip(self._linear(call.args[0]), bound.item(), np.inf)

    def _minimum(self, call: Any) -> _Linear | None:
        bound = constant(call.args[1])
        return None if bound is None or bound.size != 1 else _clip(self._linear(call.args[0]), -np.inf, bound.item())


def _is(value: Any, name: str) -> bool:
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) and value.op.name == name


def _whole(value: Any) -> _Linear:
    return _Linear(((value, np.array(1.0)),), np.array(0.0))


def _clip(found: _Linear, low: float, high: float) -> _Linear:
    """`found` within `low` and `high`, which count more than the bounds that it has."""
    return replace(found, low=float(np.clip(found.low, low, high)), high=float(np.clip(found.high, low, high)))


def _along_last(found: _Linear) -> bool:
    """Whether each constant is one number, or one for each channel."""
    numbers = [found.shift, *(factor for _, factor in found.terms)]
    return all(one.size == 1 or one.size == one.shape[-1] for one in numbers)


def _compute(
    shape: Sequence[Any], numbers: Sequence[NDArray[np.float64]], zero: int, ends: tuple[int, int], kind: str
) -> Callable[..., Any]:
    """The operator: `numbers` are a factor for each tensor, and the shift."""
    # an odd number added before the rounding would turn what is half way between two the other way
    early, late = (zero, 0) if zero % 2 == 0 else (0, zero)
    low, high = (end - late + NO_FRACTION_BITS for end in ends)

    def compute(tensors: list[te.Tensor], vectors: list[te.Tensor]) -> te.Tensor:
        def element(*at: Any) -> Any:
            left = list(vectors)
            *factors, shift = [
                left.pop(0)[at[-1]] if one.size > 1 else tirx.const(float(one.item()), "float32") for one in numbers
            ]
            products = [
                tensor(*_within(tensor, at)).astype("float32") * factor
                for tensor, factor in zip(tensors, factors, strict=True)
            ]
            total = sum(products[1:], products[0])
            total = total + shift if numbers[-1].any() else total
            bits = op.reinterpret("int32", total + tirx.const(NO_FRACTION + early, "float32"))
            inside = tirx.min(tirx.max(bits, tirx.const(low, "int32")), tirx.const(high, "int32"))
            # the last eight bits of the large number are zero: what is left of the integer is the result
            return (inside + late if late else inside).astype(kind)

        return te.compute(shape, element, name="rounded")

    return compute


def _within(tensor: te.Tensor, at: Sequence[Any]) -> list[Any]:
    """The index into an operand of lower rank, or of length 1 where the result is longer."""
    places = list(at)[len(at) - len(tensor.shape) :]
    return [
        0 if isinstance(size, tirx.IntImm) and int(size) == 1 else place
        for size, place in zip(tensor.shape, places, strict=True)
    ]
