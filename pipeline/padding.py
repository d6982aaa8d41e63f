"""Running engines with buckets: what they are given is padded with zeros, and what they answer is cut.

Zeros, since a mask says with them that there is nothing to look at. For a model that minds them, buckets are no good;
the stage parity finds that out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pipeline import buckets
from pipeline.store import Stored
from pipeline.types import DeviceRunner, Runner, Signature, Sizes, axis_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.types import Tensors

    Arrays = dict[str, NDArray[Any]]


def sizes_of(feeds: Tensors, signature: Signature) -> dict[str, int]:
    """What each axis is in this call."""
    return {
        dim: size
        for spec in signature.inputs
        for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }


def fits(feeds: Tensors, signature: Signature, *, parts: bool = False) -> bool:
    """Whether each axis is in the range that the signature has for it; with `parts`, as `in_parts` asks for them."""
    ranges, sizes = signature.axes, sizes_of(feeds, signature)
    axis = rows(signature) if parts else None
    if axis is not None:
        sizes[axis] = min(sizes[axis], ranges[axis].max)
    return all(ranges[name].min <= size <= ranges[name].max for name, size in sizes.items())


def padded(feeds: Tensors, signature: Signature, sizes: Sizes) -> Arrays:
    """`feeds`, made as large as `sizes` with zeros behind; a mask says there that nothing is to be looked at."""
    return {spec.name: _grown(feeds[spec.name], buckets.shape_at(spec, sizes)) for spec in signature.inputs}


def _grown(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if array.shape == shape:
        return array
    whole = np.zeros(shape, array.dtype)
    whole[tuple(map(slice, array.shape))] = array
    return whole


def cut(outputs: Tensors, signature: Signature, sizes: Sizes) -> Arrays:
    """`outputs` without what comes from padding: as large as they are for inputs of `sizes`."""
    return {spec.name: _cut(outputs[spec.name], buckets.shape_at(spec, sizes)) for spec in signature.outputs}


def _cut(array: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    return array if array.shape == shape else np.ascontiguousarray(array[tuple(map(slice, shape))])


@dataclass(frozen=True)
class OnDevice:
    """A runner over buckets on a row's `device`; see `pipeline.types.DeviceRunner`."""

    run: Runner
    clock: Callable[[Tensors, int], float]
    threads: Callable[[], int]

    def __call__(self, feeds: Tensors) -> Arrays:
        """One call of the bucket that holds `feeds`."""
        return self.run(feeds)

    def cores(self) -> int:
        """As any bucket has it."""
        return self.threads()

    def seconds(self, feeds: Tensors, calls: int) -> float:
        """Of the bucket that holds `feeds`."""
        return self.clock(feeds, calls)


class Shelf:
    """The runners of an engine's buckets.

    Args:
        engine: with buckets.
        load: how one of them is loaded.
        room: how many may be loaded at once; None is all of them, which are then loaded at once.

    Raises:
        BuildError, UnavailableError: one can't be loaded.
    """

    def __init__(
        self, engine: Stored, load: Callable[[Stored], AbstractContextManager[Runner]], room: int | None
    ) -> None:
        self.engine, self.load, self.room = engine, load, room
        self.signature, self.buckets = engine.signature(), buckets.of(engine)
        self.stack, self.runners = contextlib.ExitStack(), dict[str, Runner]()

    def __enter__(self) -> Shelf:
        """Load as many as there is room for, so that a broken one is refused now."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.clear)
            for bucket in self.buckets[: self.room]:
                self.runner(bucket)
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Free them all."""
        self.clear()

    def clear(self) -> None:
        """Free what is loaded."""
        self.runners.clear()
        self.stack.close()

    def runner(self, bucket: buckets.Bucket) -> Runner:
        """The runner of one bucket."""
        if bucket.folder not in self.runners:
            if len(self.runners) == self.room:
                self.clear()
            self.runners[bucket.folder] = self.stack.enter_context(self.load(buckets.part(self.engine, bucket)))
        return self.runners[bucket.folder]

    def bucket(self, sizes: Sizes) -> buckets.Bucket:
        """The smallest bucket that holds `sizes`, which must be such as the signature says."""
        found = buckets.smallest(self.buckets, sizes)
        assert found is not None
        return found

    def run(self, feeds: Tensors) -> Arrays:
        """One call: pick, pad, run, cut."""
        sizes = sizes_of(feeds, self.signature)
        bucket = self.bucket(sizes)
        outputs = self.runner(bucket)(padded(feeds, self.signature, bucket.sizes))
        return cut(outputs, self.signature, sizes)

    def seconds(self, feeds: Tensors, calls: int) -> float:
        """See `DeviceRunner`."""
        bucket = self.bucket(sizes_of(feeds, self.signature))
        run = cast("DeviceRunner", self.runner(bucket))
        return run.seconds(padded(feeds, self.signature, bucket.sizes), calls)

    def cores(self) -> int:
        """See `DeviceRunner`."""
        return cast("DeviceRunner", self.runner(self.buckets[0])).cores()


def in_parts(run: Runner, signature: Signature) -> Runner:
    """`run`, also for more rows than it serves: it is then called for some of them at a time.

    Only where rows go in and come out in order, as the first dimension of all that has the axis. Whether they depend
    on each other is for the caller to find out.
    """
    axis = rows(signature)

    def call(feeds: Tensors) -> Arrays:
        count = sizes_of(feeds, signature).get(axis, 0) if axis is not None else 0
        most = signature.axes[axis].max if axis is not None else 0
        if count <= most:
            return run(feeds)
        cuts = np.array_split(np.arange(count), -(-count // most))
        rowed = {spec.name for spec in signature.inputs if axis in spec.shape}
        calls = [run({name: array[rows] if name in rowed else array for name, array in feeds.items()}) for rows in cuts]
        return {spec.name: np.concatenate([one[spec.name] for one in calls]) for spec in signature.outputs}

    return call


def rows(signature: Signature) -> str | None:
    """The axis of independent rows: the first dimension of every output, and of every input that has it."""
    firsts = {spec.shape[0] if spec.shape else None for spec in signature.outputs}
    (first,) = firsts if len(firsts) == 1 else (None,)
    if first not in buckets.dynamic(signature):
        return None
    elsewhere = [dim for spec in (*signature.inputs, *signature.outputs) for dim in spec.shape[1:]]
    return None if first in axis_names(tuple(elsewhere)) else str(first)
