"""What the difference between two tensors looks like: how large it is, and what kind of fault leaves such a one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_NORMS = ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "BatchNormalization")


def sizes(reference: Array, other: Array) -> tuple[float, float]:
    """Root mean squares of `reference` and of what `other` differs from it; the second is infinite for another shape,
    and where only one of them is finite.

    Elements that say "nothing here" are left out where both agree: infinities, NaN, and numbers of at least half the
    largest of the dtype, with which masks are filled. Beside them nothing else would count.
    """
    if reference.shape != other.shape:
        return 1.0, math.inf
    one = reference.astype(np.float64)
    two = one if other is reference else other.astype(np.float64)
    if max(_peak(one), _peak(two)) < largest(reference) / 2:
        return rms(one), rms(two - one)
    same = (one == two) | (np.isnan(one) & np.isnan(two))
    with np.errstate(invalid="ignore"):
        counts = ~(same & ~(np.abs(one) < largest(reference) / 2))
    one, two = one[counts], two[counts]
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.where(same[counts], 0.0, two - one)
    signal = rms(one[np.isfinite(one)])
    return signal, rms(gap) if np.isfinite(gap).all() else math.inf


def _peak(array: Array) -> float:
    """The largest magnitude; infinite where there is a NaN."""
    top = float(max(array.max(initial=0), -array.min(initial=0)))
    return math.inf if math.isnan(top) else top


def largest(array: Array) -> float:
    """The largest number of the array's dtype."""
    return float(np.finfo(array.dtype).max if array.dtype.kind == "f" else np.inf)


def rms(array: Array) -> float:
    """Root mean square; 0 of nothing. Scaled first where squares of its numbers would overflow or vanish."""
    top = _peak(array)
    if not 0 < top < math.inf:
        return top
    scale = 1.0 if 1e-100 < top < 1e100 else top
    flat = (array if scale == 1 else array / scale).ravel().astype(np.float64, copy=False)
    return scale * math.sqrt(float(np.dot(flat, flat)) / flat.size)


def decibels(signal: float, noise: float) -> float:
    """The ratio in dB; infinite without noise, and minus infinity where there is nothing but noise."""
    if noise == 0:
        return math.inf
    if not (signal > 0 and noise < math.inf):
        return -math.inf
    return 20 * (math.log10(signal) - math.log10(noise))


def kind(operator: str, reference: Array, other: Array, noise: float) -> str:
    """What is wrong with `other`, in two or three words; ``operator differs`` where its numbers don't tell.

    Args:
        operator: that made it.
        reference: what it should be.
        other: what it is.
        noise: root mean square that rounding explains; what remains after a guess must be below it.
    """
    if operator == "Resize":
        return "resize"
    if reference.shape != other.shape:
        return "layout"
    one, two = reference.astype(np.float64), other.astype(np.float64)
    if not np.isfinite(two[np.isfinite(one)]).all():
        return "overflow"
    if not np.isfinite(one).all() or one.size == 0:
        return "operator differs"
    if operator in _NORMS:
        return "epsilon"
    if rms(np.sort(one, axis=None) - np.sort(two, axis=None)) <= noise:
        return "layout"
    for channel in _channels(one):
        rows = np.moveaxis(one, channel, 0).reshape(one.shape[channel], -1)
        moved = np.moveaxis(two, channel, 0).reshape(rows.shape)
        if rows.shape[1] > 1 and rms(moved - rows - (moved - rows).mean(axis=1, keepdims=True)) <= noise:
            return "bias"
        if rows.shape[1] > 1 and rms(moved - _fitted(rows, moved)) <= noise:
            return "scale"
    return "operator differs"


def _channels(array: Array) -> tuple[int, ...]:
    """Axes along which weights may have one number each: of images the second, else the last."""
    return (1,) if array.ndim >= 4 else (array.ndim - 1,) if array.ndim else ()


def _fitted(rows: Array, moved: Array) -> Array:
    """`moved` as near as a factor for each of `rows` comes."""
    power = np.square(rows).sum(axis=1, keepdims=True)
    factor = np.divide((rows * moved).sum(axis=1, keepdims=True), power, out=np.zeros_like(power), where=power > 0)
    return np.asarray(factor * rows)
