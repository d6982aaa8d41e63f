"""Contractions of quantised graphs in integers: dequantise, multiply, becomes multiply in 8 bits, then scale.

A convolution or matrix product between `dequantize` of an activation and `dequantize` of a constant weight is
replaced by one of the integers themselves with an int32 result. Sums of four neighbouring products are what the
dot-product instructions of CPUs make, so weights are packed for them here: [columns / lanes, ..., depth / 4, lanes, 4].
What the activation's zero point adds to every sum is known beforehand and is taken off; scale, bias, what follows and
the quantisation of the result become the epilogue of the same loop nest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, te, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from pipeline.tvm.dots import DEPTH, ROWS, Dot, byte, word
from pipeline.tvm.layout import constant


@dataclass(frozen=True)
class _Quantised:
    """``real = scale * (integer - zero)``; `axis` is that of the scale's channels, None where it has one value."""

    integer: Any
    scale: NDArray[np.float32]
    zero: NDArray[Any]
    order: tuple[int, ...] | None = None


def integer_contractions(dot: Dot) -> Any:
    """A pass over a Relax module whose convolutions have their channels last, for a CPU that has `dot`."""

    def run(module: tvm.IRModule, _context: object) -> tvm.IRModule:
        visitor = _Integer(module)
        visitor.dot = dot
        for variable, function in module.functions.items():
            if isinstance(function, relax.Function):
                visitor.builder_.update_func(variable, visitor.visit_expr(function))
        return visitor.builder_.get()

    return tvm.transform.module_pass(run, opt_level=0, name="IntegerContractions")


@mutator
class _Integer(PyExprMutator):  # type: ignore[misc]  # tvm ships no types
    """Rewrites contractions whose operands are both quantised."""

    dot: Dot

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        if not isinstance(call.op, tvm.ir.Op):
            return call
        if call.op.name == "relax.nn.max_pool2d":
            return self._pool(call)
        if call.op.name not in ("relax.matmul", "relax.nn.conv2d"):
            return call
        left, right = self._quantised(call.args[0]), self._quantised(call.args[1])
        if left is None or right is None or constant(right.integer) is None or not self._fits(left, right):
            return call
        weight = np.asarray(constant(right.integer))
        if right.order is not None:
            weight = weight.transpose(right.order)
        if call.op.name == "relax.matmul":
            return self._product(left, right, weight) if weight.ndim == 2 else call
        return self._convolution(call, left, right, weight)

    def _quantised(self, value: Any) -> _Quantised | None:
        order = None
        found = self._bound(value)
        if _is(found, "relax.permute_dims"):
            rank = int(found.args[0].ty.ndim)
            axes = found.attrs.axes
            order = tuple(reversed(range(rank))) if axes is None else tuple(int(axis) for axis in axes)
            found = self._bound(found.args[0])
        if not _is(found, "relax.dequantize"):
            return None
        scale, zero = constant(found.args[1]), constant(found.args[2])
        if scale is None or zero is None:
            return None
        return _Quantised(found.args[0], scale.astype(np.float32), zero, order)

    def _integer(self, one: _Quantised) -> Any:
        return one.integer if one.order is None else self.builder_.emit(relax.op.permute_dims(one.integer, one.order))

    def _bound(self, value: Any) -> Any:
        return self.lookup_binding(value) if isinstance(value, relax.Var) else value

    def _fits(self, left: _Quantised, right: _Quantised) -> bool:
        kinds = str(left.integer.ty.dtype), str(right.integer.ty.dtype)
        return kinds == (self.dot.left, "int8") and left.scale.size == 1 and not right.zero.any()

    def _product(self, left: _Quantised, right: _Quantised, weight: NDArray[np.int8]) -> Any:
        packed = pack(weight[None, None], self.dot.lanes)[:, 0, 0]
        return self._scaled(_product_of(weight.shape, self.dot), left, right, packed, weight.sum(0, dtype=np.int32))

    def _convolution(self, call: Any, left: _Quantised, right: _Quantised, weight: NDArray[np.int8]) -> Any:
        if str(call.attrs.data_layout) != "NHWC":
            return call
        if int(call.attrs.groups) != 1:
            return self._depthwise(call, left, right, weight)
        packed = pack(weight, self.dot.lanes)
        compute = _convolution_of(weight.shape, call.attrs, int(left.zero), self.dot)
        return self._scaled(compute, left, right, packed, weight.sum((0, 1, 2), dtype=np.int32))

    def _depthwise(self, call: Any, left: _Quantised, right: _Quantised, weight: NDArray[np.int8]) -> Any:
        if weight.shape[2:] != (1, int(call.attrs.groups)):
            return call
        packed = pack_depthwise(weight, self.dot.lanes)
        compute = _depthwise_of(weight.shape, call.attrs, int(left.zero), self.dot)
        return self._scaled(compute, left, right, packed, weight.sum((0, 1, 2), dtype=np.int32))

    def _scaled(
        self,
        compute: Callable[..., Any],
        left: _Quantised,
        right: _Quantised,
        packed: NDArray[np.int8],
        sums: NDArray[np.int32],
    ) -> Any:
        """The contraction in int32, and what makes its result real."""
        emit = self.builder_.emit
        found = emit(
            self.builder_.call_te(compute, self._integer(left), relax.const(packed, "int8"), primfunc_name_hint="dot")
        )
        offset = (-int(left.zero) * sums).astype(np.int32)
        if offset.any():
            found = emit(relax.op.add(found, relax.const(offset, "int32")))
        scale = (left.scale.reshape(()) * right.scale).astype(np.float32)
        return relax.op.multiply(emit(relax.op.astype(found, "float32")), relax.const(scale, "float32"))

    def _pool(self, call: Any) -> Any:
        """The largest of dequantised numbers is the largest integer, dequantised."""
        found = self._quantised(call.args[0])
        if found is None or found.order is not None or found.scale.size != 1:
            return call
        pooled = self.builder_.emit(relax.Call(call.op, [found.integer], call.attrs))
        return relax.op.dequantize(
            pooled, relax.const(found.scale, "float32"), relax.const(found.zero), axis=0, out_dtype="float32"
        )


def _is(value: Any, name: str) -> bool:
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op) and value.op.name == name


def _up(number: Any, step: int) -> Any:
    return (number + step - 1) // step * step


def pack(weight: NDArray[np.int8], lanes: int) -> NDArray[np.int8]:
    """[height, width, depth, columns] as [columns / lanes, height, width, depth / 4, lanes, 4], zeros at the ends."""
    height, width, depth, columns = weight.shape
    full = np.zeros((height, width, _up(depth, DEPTH), _up(columns, lanes)), np.int8)
    full[:, :, :depth, :columns] = weight
    parts = full.reshape(height, width, full.shape[2] // DEPTH, DEPTH, full.shape[3] // lanes, lanes)
    return np.ascontiguousarray(parts.transpose(4, 0, 1, 2, 5, 3))


def _product_of(shape: tuple[int, ...], dot: Dot) -> Callable[..., Any]:
    """[..., rows, depth] times packed weights."""
    depth, columns = shape
    deep, wide = _up(depth, DEPTH), _up(columns, dot.lanes)

    def compute(left: te.Tensor, weight: te.Tensor) -> te.Tensor:
        *lead, rows, _ = left.shape
        many = rows if isinstance(rows, int | tirx.IntImm) else _up(rows, ROWS)
        data = left
        if deep != depth or many is not rows:
            data = te.compute(
                (*lead, many, deep),
                lambda *at: tirx.if_then_else(
                    tirx.all(at[-2] < rows, at[-1] < depth), left(*at), tirx.const(0, dot.left)
                ),
                name="padded",
            )
        k = te.reduce_axis((0, deep), name="k")
        found = te.compute(
            (*lead, many, wide),
            lambda *at: te.sum(
                data(*at[:-1], k).astype("int32")
                * weight[at[-1] // dot.lanes, k // DEPTH, at[-1] % dot.lanes, k % DEPTH].astype("int32"),
                axis=k,
            ),
            name="dot",
        )
        if wide == columns and many is rows:
            return found
        return te.compute((*lead, rows, columns), lambda *at: found(*at), name="cut")

    return compute


def _convolution_of(shape: tuple[int, ...], attributes: Any, zero: int, dot: Dot) -> Callable[..., Any]:
    """Channels last, times packed weights; beyond the border lies the zero point."""
    kernel_y, kernel_x, depth, columns = shape
    step_y, step_x = (int(one) for one in attributes.strides)
    wide_y, wide_x = (int(one) for one in attributes.dilation)
    top, west, bottom, east = (int(one) for one in attributes.padding)
    deep, wide = _up(depth, DEPTH), _up(columns, dot.lanes)

    def compute(left: te.Tensor, weight: te.Tensor) -> te.Tensor:
        batch, height, width, _ = left.shape
        tall, broad = height + top + bottom, width + west + east
        data = left
        if deep != depth or top or west or bottom or east:
            data = te.compute(
                (batch, tall, broad, deep),
                lambda n, y, x, c: tirx.if_then_else(
                    tirx.all(y >= top, y < top + height, x >= west, x < west + width, c < depth),
                    left[n, y - top, x - west, c],
                    tirx.const(zero, dot.left),
                ),
                name="padded",
            )
        ky, kx = te.reduce_axis((0, kernel_y), name="ky"), te.reduce_axis((0, kernel_x), name="kx")
        k = te.reduce_axis((0, deep), name="k")
        rows = (tall - (kernel_y - 1) * wide_y - 1) // step_y + 1
        across = (broad - (kernel_x - 1) * wide_x - 1) // step_x + 1
        found = te.compute(
            (batch, rows, across, wide),
            lambda n, y, x, o: te.sum(
                data[n, y * step_y + ky * wide_y, x * step_x + kx * wide_x, k].astype("int32")
                * weight[o // dot.lanes, ky, kx, k // DEPTH, o % dot.lanes, k % DEPTH].astype("int32"),
                axis=[ky, kx, k],
            ),
            name="dot",
        )
        if wide == columns:
            return found
        return te.compute((batch, rows, across, columns), lambda *at: found(*at), name="cut")

    return compute


def _depthwise_of(shape: tuple[int, ...], attributes: Any, zero: int, dot: Dot) -> Callable[..., Any]:
    """Channels last, each with a kernel of its own: what four rows of it read is put into one int32 for each channel.

    A word of a column serves every place of the kernel over that column.
    """
    kernel_y, kernel_x, _, columns = shape
    step_y, step_x = (int(one) for one in attributes.strides)
    wide_y, wide_x = (int(one) for one in attributes.dilation)
    top, west, bottom, east = (int(one) for one in attributes.padding)
    groups, wide = _up(kernel_y, DEPTH) // DEPTH, _up(columns, dot.lanes)

    def compute(left: te.Tensor, weight: te.Tensor) -> te.Tensor:
        batch, height, width, _ = left.shape
        broad = width + west + east
        rows = (height + top + bottom - (kernel_y - 1) * wide_y - 1) // step_y + 1
        across = (broad - (kernel_x - 1) * wide_x - 1) // step_x + 1

        def inside(n: Any, y: Any, x: Any, c: Any) -> Any:
            within = [y >= 0] * (top > 0) + [y < height] * (bottom > 0)
            within += [x >= 0] * (west > 0) + [x < width] * (east > 0) + [c < columns] * (wide > columns)
            value = left[n, y, x, c]
            return tirx.if_then_else(tirx.all(*within), value, tirx.const(zero, dot.left)) if within else value

        def four(n: Any, y: Any, x: Any, g: Any, c: Any) -> Any:
            # rows beyond the kernel have weights of zero: any that is there will do
            places = [tirx.min(g * DEPTH + k, kernel_y - 1) for k in range(min(DEPTH, kernel_y))]
            return word([inside(n, y * step_y + one * wide_y - top, x - west, c) for one in places])

        words = te.compute((batch, rows, broad, groups, wide), four, name="words")
        kx, g = te.reduce_axis((0, kernel_x), name="kx"), te.reduce_axis((0, groups), name="g")
        k = te.reduce_axis((tirx.IntImm("int64", 0), tirx.IntImm("int64", DEPTH)), name="k")
        found = te.compute(
            (batch, rows, across, wide),
            lambda n, y, x, o: te.sum(
                byte(words[n, y, x * step_x + kx * wide_x, g, o], k.astype("int32"), dot.left)
                * weight[o // dot.lanes, kx, g, o % dot.lanes, k].astype("int32"),
                axis=[kx, g, k],
            ),
            name="dot",
        )
        if wide == columns:
            return found
        return te.compute((batch, rows, across, columns), lambda *at: found(*at), name="cut")

    return compute


def pack_depthwise(weight: NDArray[np.int8], lanes: int) -> NDArray[np.int8]:
    """[height, width, 1, channels] as [channels / lanes, width, height / 4, lanes, 4], zeros at the ends."""
    height, width, _, channels = weight.shape
    full = np.zeros((_up(height, DEPTH), width, _up(channels, lanes)), np.int8)
    full[:height, :, :channels] = weight[:, :, 0]
    parts = full.reshape(full.shape[0] // DEPTH, DEPTH, width, full.shape[2] // lanes, lanes)
    return np.ascontiguousarray(parts.transpose(3, 2, 0, 4, 1))
