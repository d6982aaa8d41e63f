"""Convolutions with channels last, so that the columns of a tile are neighbours in memory.

Each convolution reads and writes channels last between two transposes. Whatever follows a transpose and can work on
channels as they lie is done before it instead, so that transposes meet and cancel each other. TVM's own ConvertLayout
stops at operators that it doesn't know (a clip, for one), and fails on some graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

LAST = (0, 2, 3, 1)  # from channels first to channels last
FIRST = (0, 3, 1, 2)  # and back

UNARY = frozenset(
    f"relax.{name}"
    for name in (
        "abs", "astype", "ceil", "clip", "cos", "erf", "exp", "floor", "log", "negative", "nn.gelu", "nn.gelu_tanh",
        "nn.leakyrelu", "nn.relu", "nn.silu", "nn.softplus", "round", "rsqrt", "sigmoid", "sign", "sin", "sqrt",
        "square", "tanh",
    )
)  # fmt: skip
BINARY = frozenset(f"relax.{name}" for name in ("add", "divide", "maximum", "minimum", "multiply", "power", "subtract"))
QUANTISING = frozenset({"relax.quantize", "relax.dequantize"})
REDUCING = frozenset(f"relax.{name}" for name in ("max", "mean", "min", "sum"))
POOLS = frozenset({"relax.nn.avg_pool2d", "relax.nn.max_pool2d"})


def channels_last() -> Any:
    """A pass over a Relax module."""

    def run(module: tvm.IRModule, _context: object) -> tvm.IRModule:
        visitor = _ChannelsLast(module)
        for variable, function in module.functions.items():
            if isinstance(function, relax.Function):
                visitor.builder_.update_func(variable, visitor.visit_expr(function))
        return visitor.builder_.get()

    return tvm.transform.module_pass(run, opt_level=0, name="ChannelsLast")


@mutator
class _ChannelsLast(PyExprMutator):  # type: ignore[misc]  # tvm ships no types
    """Moves transposes down."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        if not isinstance(call.op, tvm.ir.Op):
            return call
        name = call.op.name
        if name == "relax.nn.conv2d":
            return self._convolution(call)
        if not any(self._before(argument) is not None for argument in _tensors(call)):
            return call
        for names, rule in self._rules().items():
            if name in names:
                found = rule(call)
                return call if found is None else found
        return call

    def _rules(self) -> Mapping[frozenset[str], Callable[[Any], Any]]:
        return {
            UNARY: self._same,
            QUANTISING: self._scaled,
            BINARY: self._binary,
            POOLS: self._pool,
            REDUCING: self._reduction,
            frozenset({"relax.nn.adaptive_avg_pool2d"}): self._adaptive,
            frozenset({"relax.concat"}): self._concat,
            frozenset({"relax.permute_dims"}): self._transpose,
            frozenset({"relax.reshape"}): self._reshape,
        }

    def _before(self, value: Any) -> Any:
        """What has its channels last, if `value` is that with its channels first; else None."""
        bound: Any = self.lookup_binding(value) if isinstance(value, relax.Var) else None
        if _is_call(bound, "relax.permute_dims") and _axes(bound) == FIRST:
            return bound.args[0]
        return None

    def _last(self, value: Any) -> Any:
        """`value` with its channels last."""
        found = self._before(value)
        return self.builder_.emit(relax.op.permute_dims(value, LAST)) if found is None else found

    def _first(self, value: Any) -> Any:
        return relax.op.permute_dims(self.builder_.emit(value), FIRST)

    def _convolution(self, call: Any) -> Any:
        attributes = call.attrs
        if str(attributes.data_layout) != "NCHW" or str(attributes.kernel_layout) != "OIHW":
            return call
        weight = self.builder_.emit(relax.op.permute_dims(call.args[1], (2, 3, 1, 0)))
        return self._first(
            relax.op.nn.conv2d(
                self._last(call.args[0]),
                weight,
                strides=attributes.strides,
                padding=attributes.padding,
                dilation=attributes.dilation,
                groups=attributes.groups,
                data_layout="NHWC",
                kernel_layout="HWIO",
                out_dtype=attributes.out_dtype,
            )
        )

    def _same(self, call: Any) -> Any:
        return self._first(relax.Call(call.op, [self._last(call.args[0]), *call.args[1:]], call.attrs))

    def _scaled(self, call: Any) -> Any | None:
        return self._same(call) if all(_size(one) == 1 for one in call.args[1:]) else None

    def _binary(self, call: Any) -> Any | None:
        arguments = [self._operand(one) for one in call.args]
        if any(one is None for one in arguments):
            return None
        return self._first(relax.Call(call.op, arguments, call.attrs))

    def _operand(self, value: Any) -> Any | None:
        """An operand as it must be beside one with its channels last."""
        array = constant(value)
        if array is not None:
            if array.ndim == 0:
                return value
            return relax.const(array.reshape((1,) * (4 - array.ndim) + array.shape).transpose(LAST), str(array.dtype))
        return self._last(value) if _rank(value) == 4 else (value if _rank(value) == 0 else None)

    def _pool(self, call: Any) -> Any | None:
        attributes = call.attrs
        if str(attributes.layout) != "NCHW":
            return None
        pool = relax.op.nn.max_pool2d if call.op.name == "relax.nn.max_pool2d" else relax.op.nn.avg_pool2d
        return self._first(
            pool(
                self._last(call.args[0]),
                pool_size=attributes.pool_size,
                strides=attributes.strides,
                padding=attributes.padding,
                dilation=attributes.dilation,
                ceil_mode=attributes.ceil_mode,
                count_include_pad=attributes.count_include_pad,
                layout="NHWC",
            )
        )

    def _adaptive(self, call: Any) -> Any | None:
        if str(call.attrs.layout) != "NCHW":
            return None
        size = call.attrs.output_size
        return self._first(relax.op.nn.adaptive_avg_pool2d(self._last(call.args[0]), size, layout="NHWC"))

    def _reduction(self, call: Any) -> Any | None:
        if call.attrs.axis is None:
            return None
        axes = [LAST.index(int(axis) % 4) for axis in call.attrs.axis]
        reduce = getattr(relax.op, call.op.name.removeprefix("relax."))
        keep = bool(call.attrs.keepdims)
        if not keep and sorted(axes) != [1, 2]:
            return None
        found = reduce(self._last(call.args[0]), sorted(axes), keep)
        return self._first(found) if keep else found

    def _concat(self, call: Any) -> Any | None:
        parts = list(call.args[0]) if isinstance(call.args[0], relax.Tuple) else None
        if parts is None or any(_rank(part) != 4 for part in parts):
            return None
        axis = LAST.index(int(call.attrs.axis) % 4)
        return self._first(relax.op.concat([self._last(part) for part in parts], axis))

    def _transpose(self, call: Any) -> Any:
        axes = tuple(FIRST[axis] for axis in _axes(call))
        before = self._before(call.args[0])
        return before if axes == (0, 1, 2, 3) else relax.op.permute_dims(before, axes)

    def _reshape(self, call: Any) -> Any | None:
        """Pictures of one pixel have their channels in the same order either way."""
        before = self._before(call.args[0])
        if [_whole(size) for size in list(before.ty.shape)[1:3]] != [1, 1]:
            return None
        return relax.op.reshape(before, call.args[1])


def _tensors(call: Any) -> Sequence[Any]:
    return [one for argument in call.args for one in (argument if isinstance(argument, relax.Tuple) else [argument])]


def _is_call(value: Any, name: str) -> bool:
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) and value.op.name == name


def _axes(call: Any) -> tuple[int, ...]:
    rank = _rank(call.args[0])
    axes = call.attrs.axes
    return tuple(reversed(range(rank))) if axes is None else tuple(int(axis) % rank for axis in axes)


def _rank(value: Any) -> int:
    return int(value.ty.ndim)


def _whole(size: Any) -> int | None:
    return int(size) if isinstance(size, int | tvm.tirx.IntImm) else None


def constant(value: Any) -> NDArray[Any] | None:
    """The numbers of a constant; None for what is none."""
    return np.asarray(value.value.numpy()) if isinstance(value, tvm.ir.GenericConst) else None


def _size(value: Any) -> int | None:
    found = constant(value)
    return None if found is None else found.size
