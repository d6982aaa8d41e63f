"""The calling convention of a part of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from pipeline import dims
from pipeline.errors import BuildError
from pipeline.explain.parts import Array, Part
from pipeline.types import Axis, Dim, DType, Signature, Sizes, TensorSpec

Dims = tuple[int | str | None, ...]


def signature_of(
    part: Part,
    calls: Sequence[Mapping[str, Array]],
    known: Mapping[str, Dims],
    whole: Signature,
    sizes: Sequence[Sizes],
) -> Signature:
    """Names, dtypes and shapes of what `part` reads and makes, with the axes of the whole.

    Where a size that may vary is not an axis itself, but a product of some, say, nothing would tell a compiler so: all
    sizes of the part are then those of the first call.

    Args:
        part: of the model.
        calls: the values of its tensors, for each call.
        known: shapes as the model spells them.
        whole: signature of the model.
        sizes: of the axes, for each call.

    Raises:
        BuildError: a tensor has a dtype that no signature has.
    """
    pairs = {**part.reads, **{name: name for name in part.makes}}
    shapes = {
        name: _shape(known.get(name) or known.get(source), source, calls, sizes) for name, source in pairs.items()
    }
    plain = all(isinstance(dim, int) or dim in whole.axes for name in part.reads for dim in shapes[name] or ("?",))
    if not plain or None in shapes.values():
        shapes = {name: tuple(int(size) for size in calls[0][source].shape) for name, source in pairs.items()}
    inputs = tuple(_spec(name, calls[0][source], shapes[name]) for name, source in part.reads.items())
    outputs = tuple(_spec(name, calls[0][name], shapes[name]) for name in part.makes)
    used = {str(dim) for spec in inputs for dim in spec.shape}
    axes: dict[str, Axis] = {name: axis for name, axis in whole.axes.items() if name in used}
    return Signature(inputs=inputs, outputs=outputs, axes=axes)


def sizes_of(whole: Signature, feeds: Mapping[str, Array]) -> dict[str, int]:
    """The sizes of the axes in one call."""
    return {
        dim: size
        for spec in whole.inputs
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }


def _shape(
    spelt: Dims | None, source: str, calls: Sequence[Mapping[str, Array]], sizes: Sequence[Sizes]
) -> tuple[Dim, ...] | None:
    """A shape in terms of axes; None where it isn't known, or isn't what the values of `source` have."""
    found = tuple(dim for dim in spelt or () if dim is not None)
    if spelt is None or len(found) < len(spelt):
        return None
    try:
        shapes = [tuple(dims.size_of(dim, one) for dim in found) for one in sizes]
    except BuildError:  # sizes that only the data decides
        return None
    return found if shapes == [tuple(call[source].shape) for call in calls] else None


def _spec(name: str, value: Array, shape: tuple[Dim, ...] | None) -> TensorSpec:
    dtype = str(value.dtype)
    if dtype not in get_args(DType):
        raise BuildError(f"`{name}` is of dtype {dtype}, which no signature has", hint="cut it elsewhere")
    assert shape is not None, name
    return TensorSpec(name=name, dtype=dtype, shape=shape)
