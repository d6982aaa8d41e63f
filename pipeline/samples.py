"""Samples: calibration and evaluation data, and feeds of any size; all checked before they are used.

Data is written once, as safetensors shards (``calibration-00000.safetensors``) whose tensors are called
``<index>/<name>``, so that any number of samples can be read again one by one.
"""

from __future__ import annotations

import itertools
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from pipeline import lint, recipes
from pipeline.errors import DataError, ExportyardError, RecipeError, UsageError, nearest
from pipeline.lint import Spread
from pipeline.store import Stored
from pipeline.types import Axis, InputSpec, Recipe, TensorSpec

Array = NDArray[Any]
SHARD_BYTES = 64 << 20
Spec = InputSpec | TensorSpec


@dataclass(frozen=True)
class Sample:
    """One call of the model: `feeds` by input name, and what else came with them (`labels`)."""

    feeds: dict[str, Array]
    labels: dict[str, Array]


def combinations(axes: Mapping[str, Axis], more: Iterable[dict[str, int]] = ()) -> list[dict[str, int]]:
    """Axis sizes at which engines are compared: all at min, opt and max, then each axis alone at min, odd and max.

    Batch 1 is always there. Odd sizes find kernels that handle only whole vectors. `more` follow, each one once.
    """
    opt = {name: axis.opt for name, axis in axes.items()}
    found = [{name: axis.min for name, axis in axes.items()}, opt, {name: axis.max for name, axis in axes.items()}]
    for name, axis in axes.items():
        odd = next(
            (size for size in (axis.opt - 1, axis.opt + 1, axis.opt) if size % 2 and axis.min <= size <= axis.max),
            axis.opt,
        )
        ones = [1] if axis.min <= 1 else []
        found += [opt | {name: size} for size in (*ones, axis.min, odd, axis.max)]
    unique = {tuple(sorted(sizes.items())): sizes for sizes in (*found, *more)}
    return list(unique.values())


def shape_at(spec: Spec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an input at given axis sizes."""
    return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)


def feeds(recipe: Recipe, sizes: Mapping[str, int], seed: int) -> dict[str, Array]:
    """Reproducible inputs of the given sizes: from the recipe's `feeds`, or drawn evenly from each value range.

    Raises:
        RecipeError: the recipe's callable raised, or made something of another name, shape or dtype.
    """
    if recipe.feeds is None:
        rng = np.random.default_rng(seed)
        try:
            return {spec.name: _draw(spec, shape_at(spec, sizes), rng) for spec in recipe.inputs}
        except (MemoryError, ValueError) as error:  # a ValueError for sizes whose product is no number of elements
            raise RecipeError(
                f"recipe `{recipe.name}`: inputs at {dict(sizes)} don't fit into memory: {error}",
                hint="lower `max` in [axes], or the sizes in [[inputs]]",
            ) from None
    made = recipes.call(recipe, recipe.feeds, "feeds", dict(sizes), seed)
    if not isinstance(made, Mapping):
        raise RecipeError(f"`feeds` returned a {type(made).__name__}", hint="return a dict of arrays by input name")
    arrays = {str(name): np.asarray(value) for name, value in made.items()}
    wrong = _fault(recipe, arrays, sizes, exact=True)
    if wrong is not None:
        raise RecipeError(
            f"recipe `{recipe.name}`: `feeds` at {dict(sizes)}: {wrong}", hint="see [[inputs]] in recipe.toml"
        )
    return {spec.name: np.ascontiguousarray(arrays[spec.name]) for spec in recipe.inputs}


def _draw(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.kind in "iu":
        low, high = spec.range if spec.range is not None else (0, 1)
        return rng.integers(int(low), int(high), shape, endpoint=True).astype(dtype)
    low, high = spec.range if spec.range is not None else (-1.0, 1.0)
    return np.asarray(rng.uniform(low, high, shape)).astype(dtype)


def write_all(recipe: Recipe, out: Path) -> dict[str, JsonValue]:
    """Write calibration and evaluation data into `out`; how many samples each has, and what is doubtful about them.

    Raises:
        DataError, RecipeError: as `write`.
    """
    calibration, seen = _write(recipe, "calibration", out)
    evaluation, met = _write(recipe, "evaluation", out)
    doubts: list[JsonValue] = [*(lint.warnings(seen, met) if calibration else [])]
    return {"calibration": calibration, "evaluation": evaluation, "warnings": doubts}


def write(recipe: Recipe, which: str, out: Path) -> int:
    """Write the recipe's calibration or evaluation data into `out` as shards; returns how many samples there are.

    Raises:
        DataError: missing, empty, truncated, wrong name, rank, size or dtype, NaN, or constant.
        RecipeError: the recipe's callable raised.
    """
    return _write(recipe, which, out)[0]


def _write(recipe: Recipe, which: str, out: Path) -> tuple[int, Spread]:
    setting = recipe.calibration if which == "calibration" else recipe.evaluation
    seen = Spread(recipe.inputs)
    if setting is None:
        return 0, seen
    where = f'recipe `{recipe.name}`, [{which}] data = "{setting.data}"'
    count, shard, pending, size = 0, 0, {}, 0  # type: int, int, dict[str, Array], int
    for arrays in itertools.islice(_open(recipe, which, setting.data, where), setting.samples):
        wrong = _fault(recipe, arrays, None, exact=which == "calibration")
        if wrong is not None:
            raise DataError(f"{where}, sample {count}: {wrong}", hint="see [[inputs]] and [axes] in recipe.toml")
        seen.add(arrays)
        for name, array in arrays.items():
            pending[f"{count:06d}/{name}"] = np.ascontiguousarray(array)
            size += array.nbytes
        count += 1
        if size >= SHARD_BYTES:
            save_file(pending, out / f"{which}-{shard:05d}.safetensors")
            shard, pending, size = shard + 1, {}, 0
    if count == 0:
        raise DataError(f"{where}: there is no sample in it", hint="give at least one; 100 to 500 are usual")
    constant = seen.constant()
    if constant is not None and which == "calibration":
        raise DataError(
            f"{where}: input `{constant[0]}` is {constant[1]:g} everywhere, which says nothing about its range",
            hint="calibrate with real inputs, as the model meets them in use",
        )
    if pending:
        save_file(pending, out / f"{which}-{shard:05d}.safetensors")
    return count, seen


def samples(recipe: Recipe, data: Stored, which: str) -> Iterator[Sample]:
    """The samples that `write` wrote, one by one, in order, in constant memory."""
    names = {spec.name for spec in recipe.inputs}
    for file in sorted(name for name in data.artifact.files if name.startswith(f"{which}-")):
        with safe_open(data.file(file), framework="numpy") as shard:
            for _, keys in itertools.groupby(sorted(shard.keys()), key=lambda key: key.partition("/")[0]):
                arrays = {key.partition("/")[2]: shard.get_tensor(key) for key in keys}
                yield Sample(
                    feeds={spec.name: arrays[spec.name] for spec in recipe.inputs},
                    labels={name: array for name, array in arrays.items() if name not in names},
                )


def _open(recipe: Recipe, which: str, source: str, where: str) -> Iterator[dict[str, Array]]:
    if recipes.is_code(source):
        yield from _from_code(recipe, which, source, where)
        return
    path = recipe.folder / source
    if not os.path.isfile(path):  # noqa: PTH113  unlike `is_file`, it takes any text for a path
        close = nearest(path.name, [entry.name for entry in path.parent.glob("*")] if path.parent.is_dir() else [])
        hint = (
            f"did you mean `{close}`?" if close else "the path is relative to recipe.toml; `module:callable` works too"
        )
        raise DataError(f"{where}: there is no file `{path}`", hint=hint)
    arrays = {name: _as_array(name, value, where) for name, value in _read_file(path, where).items()}
    yield from _split(recipe, arrays, where)


def _from_code(recipe: Recipe, which: str, source: str, where: str) -> Iterator[dict[str, Array]]:
    returned = recipes.call(recipe, source, f"{which}.data")
    if not isinstance(returned, Iterable):
        raise DataError(f"{where} returned a {type(returned).__name__}", hint="yield dicts of arrays by input name")
    made = iter(returned)
    while True:
        try:
            item = next(made)
        except StopIteration:
            return
        except (ExportyardError, KeyboardInterrupt):
            raise
        except BaseException as error:  # as `recipes.call`
            raise recipes.fault(recipe, f'`{which}.data = "{source}"` raised', error) from error
        if not isinstance(item, Mapping):
            raise DataError(f"{where} yielded a {type(item).__name__}", hint="yield dicts of arrays by input name")
        yield {str(name): _as_array(str(name), value, where) for name, value in item.items()}


def _as_array(name: str, value: Any, where: str) -> Array:
    """`value` as numbers or truth values; nothing else can be kept."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # NumPy's and torch's: ragged lists, tensors with gradients
        raise DataError(f"{where}: `{name}` is no array: {error}", hint="yield NumPy arrays") from error
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"{where}: `{name}` is of dtype {array.dtype}, expected numbers or truth values",
            hint="give labels as numbers, such as class indices",
        )
    return array


def _read_file(path: Path, where: str) -> dict[str, Array]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix == ".npz":
            # numpy leaves the file open when it is damaged; and one .npy in it is no dict of arrays (TypeError)
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, SafetensorError) as error:
        raise DataError(
            f"{where}: `{path}` is damaged or not a {path.suffix} file: {error}",
            hint="write it again, for example with `numpy.savez(path, **arrays)`",
        ) from None
    raise DataError(
        f"{where}: can't read `{path.suffix or path.name}` files", hint="use .npz, .safetensors or `module:callable`"
    )


def _split(recipe: Recipe, arrays: dict[str, Array], where: str) -> Iterator[dict[str, Array]]:
    """Cut whole-file arrays into calls: along an extra first dimension, or along the first axis by its opt size."""
    ranks = {spec.name: len(spec.shape) for spec in recipe.inputs}
    absent = set(ranks) - set(arrays)
    if absent:
        raise DataError(
            f"{where}: input `{min(absent)}` is not in it; it has {sorted(arrays)}", hint="name arrays like inputs"
        )
    extra = {arrays[name].ndim - rank for name, rank in ranks.items()}
    if extra == {1}:
        count, step = _length(arrays, where), None
    else:
        first = {spec.shape[0] for spec in recipe.inputs if spec.shape and isinstance(spec.shape[0], str)}
        if extra != {0} or len(first) != 1:
            yield arrays  # one call; the check that follows says what is wrong with it, if anything
            return
        step = recipe.axes[str(first.pop())].opt
        count = _length(arrays, where)
    for start in range(0, count, step or 1):
        yield {name: array[start] if step is None else array[start : start + step] for name, array in arrays.items()}


def _length(arrays: Mapping[str, Array], where: str) -> int:
    """The length that all arrays of a file share."""
    shapes = {name: array.shape for name, array in arrays.items()}
    if len({shape[:1] for shape in shapes.values()}) > 1 or () in shapes.values():
        said = ", ".join(f"`{name}` {list(shape)}" for name, shape in shapes.items())
        raise DataError(
            f"{where}: arrays of different lengths can't be cut into samples: {said}",
            hint="give every array one row for each sample",
        )
    return int(next(iter(shapes.values()))[0])


def _fault(recipe: Recipe, arrays: Mapping[str, Array], sizes: Mapping[str, int] | None, *, exact: bool) -> str | None:
    """What is wrong with one set of feeds, or None. With `exact`, there may be no array besides the inputs."""
    names = {spec.name for spec in recipe.inputs}
    if names - set(arrays):
        return f"input `{min(names - set(arrays))}` is missing; got {sorted(arrays)}"
    if exact and set(arrays) - names:
        return f"`{min(set(arrays) - names)}` is not an input; the inputs are {sorted(names)}"
    bound: dict[str, int] = dict(sizes or {})
    for spec in recipe.inputs:
        wrong = _array_fault(spec, arrays[spec.name], recipe, bound)
        if wrong is not None:
            return f"input `{spec.name}`: {wrong}"
    return None


def _array_fault(spec: InputSpec, array: Array, recipe: Recipe, bound: dict[str, int]) -> str | None:
    if array.dtype != np.dtype(spec.dtype):
        return f"dtype is {array.dtype}, expected {spec.dtype}"
    if array.ndim != len(spec.shape):
        return f"shape is {list(array.shape)} (rank {array.ndim}), expected {list(spec.shape)} (rank {len(spec.shape)})"
    for size, dim in zip(array.shape, spec.shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                return f"shape is {list(array.shape)}, expected {list(spec.shape)}"
            continue
        axis = recipe.axes[dim]
        if not axis.min <= size <= axis.max:
            return f"axis `{dim}` is {size}, outside {axis.min} to {axis.max}"
        if bound.setdefault(dim, size) != size:
            return f"axis `{dim}` is {size}, but {bound[dim]} elsewhere in the same call"
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return "it holds NaN or infinity"
    return None


def check_feeds(recipe: Recipe, arrays: Mapping[str, Array]) -> None:
    """Refuse feeds that the model can't take.

    Raises:
        UsageError: a name, dtype, rank or size is wrong.
    """
    wrong = _fault(recipe, arrays, None, exact=True)
    if wrong is not None:
        raise UsageError(f"recipe `{recipe.name}`: {wrong}", hint="see [[inputs]] and [axes] in recipe.toml")
