"""Inputs that nobody uses and that some user will send: made from usual ones, so that all else about them is right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.types import Axis, InputSpec, Recipe, Signature

if TYPE_CHECKING:
    from pipeline.types import Tensors

Array = NDArray[Any]
Arrays = dict[str, Array]


def free(recipe: Recipe) -> list[InputSpec]:
    """The inputs whose values may be anything in their range, whatever those of the others are."""
    if recipe.stress.free is not None:
        return [spec for spec in recipe.inputs if spec.name in recipe.stress.free]
    return [spec for spec in recipe.inputs if recipe.feeds is None or np.dtype(spec.dtype).kind == "f"]


def ends(spec: InputSpec) -> tuple[float, float]:
    """Least and greatest value; without a range, those that `samples.feeds` draws from."""
    if spec.range is not None and spec.dtype != "bool":
        return spec.range
    return (-1.0, 1.0) if np.dtype(spec.dtype).kind == "f" else (0, 1)


def least(spec: InputSpec, array: Array) -> Array:
    """The least value everywhere."""
    return np.full_like(array, _number(spec, ends(spec)[0]))


def greatest(spec: InputSpec, array: Array) -> Array:
    """The greatest value everywhere."""
    return np.full_like(array, _number(spec, ends(spec)[1]))


def either_end(spec: InputSpec, array: Array) -> Array:
    """The least or the greatest value, by chance, the same at every call."""
    high = np.random.default_rng(array.size).integers(0, 2, array.shape).astype(bool)
    return np.where(high, greatest(spec, array), least(spec, array))


def zero(spec: InputSpec, array: Array) -> Array:
    """0 everywhere, or the value of the range that is nearest to it."""
    low, high = ends(spec)
    return np.full_like(array, _number(spec, min(max(0.0, low), high)))


def denormal(spec: InputSpec, array: Array) -> Array | None:
    """Floats below the least one that has all its digits; None where there are none in the input's range.

    Written as bits: a library that was compiled to flush them to 0 may have told this thread's processor to do so.
    """
    low, high = ends(spec)
    if array.dtype.kind != "f" or not low <= 0 <= high or low == high:
        return None
    words = np.dtype(f"u{array.dtype.itemsize}")
    digits = np.finfo(array.dtype).nmant
    rng = np.random.default_rng(array.size)
    bits = rng.integers(1, 2**digits, array.shape, dtype=words)
    signs = rng.integers(0, 2, array.shape, dtype=words) if low < 0 < high else words.type(0 if high > 0 else 1)
    whole: Array = (bits | signs << words.type(8 * words.itemsize - 1)).astype(words).view(array.dtype)
    return whole


def changed(recipe: Recipe, feeds: Tensors, change: Any) -> Arrays | None:
    """`feeds` with ``change(spec, array)`` instead of each free input's values; None if it has nothing for any."""
    found = {spec.name: change(spec, feeds[spec.name]) for spec in free(recipe)}
    found = {name: array for name, array in found.items() if array is not None}
    return {**feeds, **found} if found else None


def with_nan(feeds: Tensors, signature: Signature, rows: str) -> Arrays | None:
    """`feeds` whose first row is NaN in every input of floats that has rows; None if there is no such input."""
    floats = [
        spec.name for spec in signature.inputs if spec.shape[:1] == (rows,) and feeds[spec.name].dtype.kind == "f"
    ]
    found = {name: feeds[name].copy() for name in floats}
    for array in found.values():
        array[0] = np.nan
    return {**feeds, **found} if found else None


def padded(feeds: Tensors, signature: Signature, masks: set[str], axis: str, size: int) -> Arrays:
    """`feeds` made longer along one axis, by their own values over again; `masks` say that these are padding.

    Values that mean something, since zeros would hide that an engine looks at them.
    """
    found = {}
    for spec in signature.inputs:
        array = feeds[spec.name]
        more = [(0, size - have if dim == axis else 0) for dim, have in zip(spec.shape, array.shape, strict=True)]
        found[spec.name] = np.pad(array, more) if spec.name in masks else np.pad(array, more, mode="wrap")
    return found


def part(feeds: Tensors, rowed: set[str], start: int, count: int) -> Arrays:
    """Some rows of `feeds`; what has no rows stays as it is."""
    return {name: array[start : start + count] if name in rowed else array for name, array in feeds.items()}


def odd_sizes(axes: Mapping[str, Axis]) -> list[dict[str, int]]:
    """All axes at odd sizes at once: below opt, and above. Kernels that handle only whole vectors fail there."""
    below = {name: _odd(axis.min, axis.opt) for name, axis in axes.items()}
    above = {name: _odd(axis.opt, axis.max) for name, axis in axes.items()}
    return [below, above]


def _odd(low: int, high: int) -> int:
    """The odd size in the middle of a range, or the nearest that it has."""
    middle = (low + high) // 2
    return next((size for size in (middle, middle + 1, middle - 1) if size % 2 and low <= size <= high), middle)


def _number(spec: InputSpec, value: float) -> float:
    return int(value) if np.dtype(spec.dtype).kind in "iu" else value
