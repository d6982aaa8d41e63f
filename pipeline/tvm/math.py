"""exp, erf and tanh as vector code: LLVM calls the C library once for each element instead.

Relative errors are below 4e-7; infinities, NaN and subnormal results come out as in the C library.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import ir, tirx
from tvm.tirx import op


@dataclass(frozen=True)
class _Curve:
    """``x * above(x * x) / below(x * x)``, fitted for the least relative error up to `end`; behind it is only 1."""

    above: Sequence[float]
    below: Sequence[float]
    end: float


ERF = _Curve(
    above=(1.1283791065, 0.18729776144, 0.052417255938, 0.0036523377057, 0.00028593989555, 2.1232881409e-06),
    below=(1.0, 0.49932122231, 0.11289624870, 0.014741655439, 0.0011416180059, 3.8899735751e-05),
    end=3.8325,
)
TANH = _Curve(
    above=(1.0, 0.13379719853, 0.0034940373152, 2.0583524019e-05, 1.3319126246e-08),
    below=(1.0, 0.46713036299, 0.02587108314, 0.00032830971759, 7.7620427419e-07),
    end=9.02,
)
# 1 + r + r * r * P(r), fitted over |r| < ln(2) / 2
EXP = (0.49999994040, 0.16666522132, 0.041668388993, 0.0083687109873, 0.0013814601116)
EXP_LEAST, EXP_MOST = -104.0, 88.722839  # zero below, infinity above
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # the first has so few bits that products with it are exact


@functools.cache
def install() -> None:
    """Make every later compilation for LLVM in this process lower them so, in float32; TVM makes sigmoid of exp."""
    curves: dict[str, Callable[[Any], Any]] = {
        "tirx.erf": functools.partial(_ratio, ERF),
        "tirx.tanh": functools.partial(_ratio, TANH),
    }
    for name, how in (curves | {"tirx.exp": _exp}).items():
        default = ir.Op.get(name).get_attr("llvm.FLowerIntrinsic")
        op.register_intrin_lowering(name, "llvm", f=functools.partial(_lowered, how, default), level=99)


def _lowered(how: Callable[[Any], Any], default: Callable[[Any], Any], call: Any) -> Any:
    value = call.args[0]
    if not _type(value).startswith("float32"):
        return default(call)
    name = tirx.Var("value", _type(value))
    return tirx.Let(name, value, how(name))


def _type(value: Any) -> str:
    """``float32``, or ``float32x16`` for a vector."""
    return str(value.ty.dtype)


def _like(value: Any, number: float, kind: str = "float32") -> Any:
    """`number` for each lane of `value`."""
    lanes = _type(value).partition("x")[2]
    one = tirx.const(number, kind)
    return tirx.Broadcast(one, int(lanes)) if lanes else one


def _as(value: Any, kind: str) -> str:
    return _type(value).replace("float32", kind)


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    found = _like(x, coefficients[-1])
    for one in reversed(coefficients[:-1]):
        found = found * x + _like(x, one)
    return found


def _exp(x: Any) -> Any:
    inside = tirx.max(tirx.min(x, _like(x, EXP_MOST)), _like(x, EXP_LEAST))
    power = tirx.Var("power", _type(x))
    rest = tirx.Var("rest", _type(x))
    whole = tirx.Var("whole", _as(x, "int32"))
    half = tirx.Var("half", _as(x, "int32"))
    fraction = _like(x, 1) + rest + rest * rest * _polynomial(rest, EXP)
    # in two factors: the largest results and subnormal ones have powers of two that float32 has not
    scaled = fraction * _power_of_two(half, x) * _power_of_two(whole - half, x)
    inner = tirx.Let(half, op.shift_right(whole, _like(whole, 1, "int32")), scaled)
    inner = tirx.Let(whole, tirx.Cast(_as(x, "int32"), power), inner)
    inner = tirx.Let(rest, x - power * _like(x, LN2_HIGH) - power * _like(x, LN2_LOW), inner)
    inner = tirx.Let(power, op.nearbyint(inside * _like(x, 1.4426950408889634)), inner)
    inner = tirx.Select(x > _like(x, EXP_MOST), _like(x, float("inf")), inner)
    return tirx.Select(x < _like(x, EXP_LEAST), _like(x, 0), inner)


def _power_of_two(exponent: Any, like: Any) -> Any:
    bits = op.shift_left(exponent + _like(exponent, 127, "int32"), _like(exponent, 23, "int32"))
    return op.reinterpret(_type(like), bits)


def _clamped(x: Any, end: float) -> Any:
    """Within -end to end; NaN stays, which `min` and `max` would lose."""
    below = tirx.Select(x < _like(x, -end), _like(x, -end), x)
    return tirx.Select(x > _like(x, end), _like(x, end), below)


def _ratio(curve: _Curve, x: Any) -> Any:
    inside, square, found = (tirx.Var(name, _type(x)) for name in ("inside", "square", "found"))
    ratio = inside * _polynomial(square, curve.above) / _polynomial(square, curve.below)
    inner = tirx.Let(square, inside * inside, tirx.Let(found, ratio, _clamped(found, 1)))
    return tirx.Let(inside, _clamped(x, curve.end), inner)
