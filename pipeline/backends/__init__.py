"""Backends are plug-ins: found by entry point, one flat file each, held to one contract (tests/contract)."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, cast

from pipeline import buckets
from pipeline.errors import BuildError, ExportyardError, UsageError, last_line, nearest, unknown
from pipeline.types import Backend, Runner, Scheme, Signature, Target, TensorSpec, Tuner

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.store import Stored
    from pipeline.types import Tensors

GROUP = "exportyard.backends"


@functools.cache
def _entries() -> Mapping[str, EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}


def names() -> list[str]:
    """Names of all installed backends, sorted."""
    return sorted(_entries())


@functools.cache
def find(name: str) -> Backend:
    """The backend called `name`. Nothing heavy is imported.

    Raises:
        UsageError: there is none; the nearest name is suggested.
        BuildError: it comes from a plug-in that can't be imported; the distribution is named.
    """
    entry = _entries().get(name)
    if entry is None:
        raise unknown("backend", name, _entries())
    try:
        backend: Backend = entry.load()
    except Exception as error:  # a plug-in's module may raise anything
        owner = entry.dist.name if entry.dist is not None else entry.module
        raise BuildError(
            f"backend `{name}` of the package `{owner}` can't be imported: {type(error).__name__}: {error}",
            hint=f"repair or uninstall `{owner}`; `python -c 'import {entry.module}'` shows the whole error",
        ) from error
    return backend


def tuner(name: str) -> Tuner:
    """The backend called `name`, which must be one that tunes."""
    backend = find(name)
    assert hasattr(backend, "build_tuned"), name  # the caller asked `tuning_file` first
    return cast("Tuner", backend)


def tuning_file(target: Target) -> str | None:
    """Name of the file with records for `target`, below ``targets/tuning/``; None if the row asks for no tuning."""
    records = getattr(find(target.backend), "records", None)
    return None if records is None else cast("str | None", records(target))


def can_profile(target: Target) -> bool:
    """Whether the row's backend is a `Profiler`."""
    return hasattr(find(target.backend), "load_profiled")


def quantizer(target: Target, scheme: Scheme) -> str | None:
    """Which quantizer makes the program that `target` builds from in this form; None if it takes an ONNX graph.

    Raises:
        UsageError: the row's backend reads programs, and has none for INT8 forms.
    """
    backend = find(target.backend)
    if not scheme.startswith("int8") or backend.source(target) != "program":
        return None
    name = getattr(backend, "quantizer", None)
    if name is None:
        raise UsageError(
            f"backend `{target.backend}` reads programs, which it can't have in `{scheme}` (target `{target.name}`)",
            hint=f"remove `{scheme}` from the row",
        )
    return cast("str", name)


@contextlib.contextmanager
def loaded(engine: Stored, target: Target, threads: int | None = None) -> Iterator[Runner]:
    """The engine, ready to run; see `Backend.load`. Whatever a plug-in's `load` raises, a caller meets `BuildError`.

    An engine with buckets is one runner, too: for all sizes that its buckets hold.

    Raises:
        BuildError, UnavailableError: it can't be loaded.
    """
    load = functools.partial(_loaded, target=target, threads=threads)
    if not buckets.of(engine):
        with load(engine) as run:
            yield run
        return
    from pipeline import padding

    # a board may not have the memory for two, and its server has one client at a time
    room = None if target.device is None else 1
    with padding.Shelf(engine, load, room) as shelf:
        run = checked(shelf.run, shelf.signature)
        yield run if target.device is None else padding.OnDevice(run, shelf.seconds, shelf.cores)


@contextlib.contextmanager
def _loaded(engine: Stored, target: Target, threads: int | None) -> Iterator[Runner]:
    with contextlib.ExitStack() as stack:
        try:
            run = stack.enter_context(find(target.backend).load(engine, target, threads))
        except ExportyardError:
            raise
        except Exception as error:
            raise BuildError(
                f"backend `{target.backend}` can't load `{engine.path}`: {type(error).__name__}: {last_line(error)}",
                hint="`exportyard export` builds it again; if that does not help, it is a fault of the backend",
            ) from error
        yield run


def checked(run: Runner, signature: Signature) -> Runner:
    """`run`, with feeds checked before a call and output names after it; outputs come in the signature's order.

    Every backend wraps its runner in this: engines answer a wrong dtype or size in many ways, some with a crash.

    Raises (when called):
        UsageError: a feed is absent, unknown, of wrong dtype, rank or size, or an axis is out of its range.
        BuildError: the engine's outputs are not the signature's.
    """
    outputs = [spec.name for spec in signature.outputs]

    def call(feeds: Tensors) -> dict[str, NDArray[np.generic]]:
        wrong = _fault(feeds, signature)
        if wrong is not None:
            raise UsageError(wrong, hint="`signature.json` beside the engine lists names, dtypes, shapes and axes")
        found = run(feeds)
        if set(found) != set(outputs):
            raise BuildError(f"the engine returned {sorted(found)}, its signature says {sorted(outputs)}")
        return {name: found[name] for name in outputs}

    return call


def _fault(feeds: Tensors, signature: Signature) -> str | None:
    """What is wrong with `feeds`, or None."""
    wanted = [spec.name for spec in signature.inputs]
    extra = [name for name in feeds if name not in wanted]
    if extra:
        close = nearest(extra[0], wanted)
        return f"`{extra[0]}` is not an input" + (f"; did you mean `{close}`?" if close else f"; inputs are {wanted}")
    sizes: dict[str, int] = {}
    for spec in signature.inputs:
        if spec.name not in feeds:
            return f"input `{spec.name}` is missing; got {sorted(feeds)}"
        wrong = _array_fault(spec, feeds[spec.name], signature, sizes)
        if wrong is not None:
            return f"input `{spec.name}`: {wrong}"
    return None


def _array_fault(
    spec: TensorSpec, array: NDArray[np.generic], signature: Signature, sizes: dict[str, int]
) -> str | None:
    """What is wrong with one array; `sizes` collects what each axis is in this call."""
    if array.dtype.name != spec.dtype:
        return f"dtype is {array.dtype}, expected {spec.dtype}"
    if array.ndim != len(spec.shape):
        return f"shape is {list(array.shape)}, expected {list(spec.shape)}"
    for size, dim in zip(array.shape, spec.shape, strict=True):
        if isinstance(dim, int):
            if size != dim:
                return f"shape is {list(array.shape)}, expected {list(spec.shape)}"
            continue
        axis = signature.axes.get(dim)
        if axis is not None and not axis.min <= size <= axis.max:
            return f"axis `{dim}` is {size}, outside {axis.min} to {axis.max}"
        if sizes.setdefault(dim, size) != size:
            return f"axis `{dim}` is {size}, but {sizes[dim]} elsewhere in the same call"
    return None
