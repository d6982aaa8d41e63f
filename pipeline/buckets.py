"""Shape buckets: which fixed sizes a row has engines for, and how these lie in one engine folder.

An engine of a row with `buckets` is a folder with one engine of fixed sizes in each sub-folder, and beside them
``signature.json``, whose axes say what sizes they serve together, and ``buckets.json``, which sub-folder is for which.
`pipeline.padding` runs them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from pipeline import dims
from pipeline.errors import BuildError, nearest
from pipeline.store import Stored
from pipeline.types import Axis, Frozen, Recipe, Signature, Sizes, Target, TensorSpec

FILE = "buckets.json"


class Bucket(Frozen):
    """The engine for inputs of up to `sizes`; `folder` is relative to the engine's."""

    sizes: Mapping[str, int]
    folder: str


class Index(Frozen):
    """``buckets.json``: the buckets, smaller before larger, so that the first which holds an input is its bucket."""

    format: Literal[1] = 1
    buckets: tuple[Bucket, ...]


# --- which buckets a row has for a model ---------------------------------------------------------------------------


def plan(target: Target, signature: Signature) -> tuple[Bucket, ...]:
    """One bucket for each combination of sizes; none for a row without `buckets`, or a model of fixed sizes.

    Sizes above the axis's max become the max, and sizes below its min are left out: a row serves many recipes.

    Raises:
        BuildError: no size is left for an axis, or an output has a size that the axes don't decide.
    """
    axes = dynamic(signature)
    if target.buckets is None or not axes:
        return ()
    sizes = [_sizes(target, name, axis) for name, axis in axes.items()]
    found = [dict(zip(axes, one, strict=True)) for one in itertools.product(*sizes)]
    for one in found:
        at(signature, one)
    return tuple(Bucket(sizes=one, folder="-".join(f"{name}{size}" for name, size in one.items())) for one in found)


def dynamic(signature: Signature) -> dict[str, Axis]:
    """The axes that the inputs have, in order of appearance; one whose min is its max is a number there."""
    names = dict.fromkeys(dim for spec in signature.inputs for dim in spec.shape if isinstance(dim, str))
    return {name: signature.axes[name] for name in names}


def _sizes(target: Target, name: str, axis: Axis) -> list[int]:
    given = (target.buckets or {}).get(name, (axis.opt, axis.max))
    kept = sorted({min(size, axis.max) for size in given if size >= axis.min})
    if not kept:
        raise BuildError(
            f"`{target.name}`: no bucket for axis `{name}`: {list(given)} is all below its min, {axis.min}",
            hint=f"give `buckets` of the row a size from {axis.min} to {axis.max}",
        )
    return kept


def doubts(target: Target, signature: Signature) -> list[str]:
    """Axes of the row's table that may be misspelt: near to one of the model's that has no sizes there."""
    axes = dynamic(signature)
    strange = {
        name: nearest(name, set(axes) - set(target.buckets or {})) for name in set(target.buckets or {}) - set(axes)
    }
    return [
        f"`{target.name}`: `buckets` has sizes for `{name}`, the model has `{close}`, which gets its opt and max"
        for name, close in sorted(strange.items())
        if close is not None
    ]


def at(signature: Signature, sizes: Sizes) -> Signature:
    """The signature of the model whose axes are fixed at `sizes`.

    Raises:
        BuildError: an output has a size that the axes don't decide.
    """

    def fixed(spec: TensorSpec) -> TensorSpec:
        return spec.model_copy(update={"shape": shape_at(spec, sizes)})

    inputs, outputs = (tuple(map(fixed, specs)) for specs in (signature.inputs, signature.outputs))
    return Signature(inputs=inputs, outputs=outputs, axes={})


def shape_at(spec: TensorSpec, sizes: Sizes) -> tuple[int, ...]:
    """The shape of an input or output at `sizes`.

    Raises:
        BuildError: it has a dimension that the axes don't decide.
    """
    try:
        return tuple(dims.size_of(dim, sizes) for dim in spec.shape)
    except BuildError as error:
        raise BuildError(
            f"no buckets for output `{spec.name}`: {error.message}", hint="take `buckets` out of the row"
        ) from None


def served(signature: Signature, buckets: Sequence[Bucket]) -> Signature:
    """The signature of all buckets together: axes end at the largest of them."""
    axes = dict(signature.axes)
    for name in buckets[-1].sizes:
        most = buckets[-1].sizes[name]  # the last bucket is the largest in every axis
        axes[name] = Axis(min=axes[name].min, opt=min(axes[name].opt, most), max=most)
    return signature.model_copy(update={"axes": axes})


def needed(target: Target, why: str) -> BuildError:
    """The error of a backend that can't build a model with dynamic axes; `why` ends a sentence about the backend."""
    return BuildError(
        f"`{target.name}`: backend `{target.backend}` {why}; the row has no `buckets`",
        hint='add `buckets = "auto"` to the row, or a table of sizes for each axis (docs/targets.md)',
    )


# --- an engine's buckets -------------------------------------------------------------------------------------------


def of(engine: Stored) -> tuple[Bucket, ...]:
    """The buckets of an engine; none if it is one engine for all sizes."""
    if FILE not in engine.artifact.files:
        return ()
    return Index.model_validate_json(engine.file(FILE).read_text()).buckets


def part(engine: Stored, bucket: Bucket) -> Stored:
    """One bucket as an engine of its own."""
    prefix = f"{bucket.folder}/"
    inside = {name: fact for name, fact in engine.artifact.files.items() if name.startswith(prefix)}
    files = {name.removeprefix(prefix): fact for name, fact in inside.items()}
    facts = cast("dict[str, Any]", engine.artifact.facts).get("buckets", {}).get(bucket.folder, {})
    return Stored(engine.path / bucket.folder, engine.artifact.model_copy(update={"files": files, "facts": facts}))


def axes_of(recipe: Recipe, engine: Stored) -> dict[str, Axis]:
    """The recipe's axes, in its order, with the ranges that `engine` serves."""
    found = engine.signature().axes
    return {name: found[name] for name in recipe.axes}


def smallest(buckets: Sequence[Bucket], sizes: Sizes) -> Bucket | None:
    """The bucket for `sizes`; None if all are too small."""
    fits = (one for one in buckets if all(sizes[name] <= size for name, size in one.sizes.items()))
    return next(fits, None)


def edges(axes: Mapping[str, Axis], buckets: Sequence[Bucket]) -> list[dict[str, int]]:
    """Sizes at which buckets may go wrong: full ones, and ones with the most padding; each axis alone, then all."""
    opt = {name: axis.opt for name, axis in axes.items()}
    found, emptiest = [], dict(opt)
    for name in buckets[0].sizes if buckets else ():
        full = sorted({one.sizes[name] for one in buckets})
        empty = [axes[name].min, *(size + 1 for size in full[:-1])]
        found += [opt | {name: size} for size in (*full, *empty)]
        emptiest[name] = empty[-1]
    return [*found, emptiest] if found else []
