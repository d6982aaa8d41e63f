"""Publish, the part on disk: a folder that holds all a device needs, and nothing that it can't check."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue
from safetensors.numpy import save_file

from pipeline import backends, buckets, compare, digest, evidence, manifest, padding, reference, samples
from pipeline.errors import ReleaseError, StoreError
from pipeline.evidence import worst
from pipeline.manifest import (
    Beside,
    Bucket,
    Engine,
    Golden,
    Manifest,
    ReleaseFile,
    Selector,
)
from pipeline.store import Stored
from pipeline.types import Axis, Chosen, Distance, Recipe, Runner, Tolerance, Tried

Array = NDArray[Any]
SEED = 20_000  # of the golden inputs; any number that parity does not use
MARGIN = 2.0  # another CPU rounds otherwise than the one that measured
FLOOR = 1e-6  # of the largest golden value: two correct float32 kernels differ by about that


def lay_out(
    recipe: Recipe,
    chosen: Sequence[Chosen],
    skipped: Mapping[str, str],
    tried: Mapping[str, tuple[Tried, ...]],
    program: Stored,
    checkpoint: Stored,
    data: Stored,
    version: str,
    commit: str,
    dirty: bool,
    out: Path,
    *,
    beside: Sequence[Beside] = (),
    signer: str | None = None,
) -> dict[str, JsonValue]:
    """Write a release into the empty folder `out`: engines, golden vectors and ``manifest.json``.

    Args:
        skipped: for each target without an engine, the reason.
        tried: for each target, every numeric form that was tried.
        version: semantic version without ``v``.
        commit: of the code that made the engines; `dirty` if recipe or targets had uncommitted changes.
        beside: the files that `attest` will add; `signer`: identity of the key that will sign, if any.

    Raises:
        ReleaseError: there is no engine, or one of them failed parity.
        StoreError: an engine's file changed while it was copied.
        BuildError: an engine that this host can run does not load or run.
    """
    _check(recipe, chosen)
    sizes = golden_sizes(recipe)
    feeds = {case: samples.feeds(recipe, at, SEED + place) for place, (case, at) in enumerate(sizes.items())}
    with reference.eager(program) as eager:
        expected = {case: eager(arrays) for case, arrays in feeds.items()}
    save_file(_keyed(feeds, expected), out / manifest.GOLDEN)
    engines = {item.target.name: _engine(item, feeds, expected, out) for item in chosen}
    made = Manifest(
        recipe=recipe.name,
        version=version,
        source=manifest.Source(commit=commit, dirty=dirty),
        checkpoint={name: fact.sha256 for name, fact in sorted(checkpoint.artifact.files.items())},
        data=data.digest,
        tools=program.artifact.tools,
        signature=program.signature(),
        engines=engines,
        skipped=dict(skipped),
        tried=dict(tried),
        golden=Golden(file=_described(out, manifest.GOLDEN), cases=sizes),
        beside=tuple(beside),
        signer=signer,
    )
    (out / manifest.FILE).write_text(made.text())
    size = sum(file.size_bytes for file in made.files())
    return {"version": version, "targets": [*sorted(engines)], "size_bytes": size}


def _check(recipe: Recipe, chosen: Sequence[Chosen]) -> None:
    if not chosen:
        raise ReleaseError(
            f"there is no engine of `{recipe.name}` to publish",
            hint=f"`exportyard status {recipe.name}` says why each target has none",
        )
    for item in chosen:
        if not item.parity.passed:
            why = item.parity.reasons[0] if item.parity.reasons else "it failed parity"
            raise ReleaseError(
                f"`{item.target.name}` ({item.scheme}) of `{recipe.name}` failed parity and is not published: {why}",
                hint=f"`exportyard parity {recipe.name}` shows every distance; the engine is kept in artifacts/",
            )


def golden_sizes(recipe: Recipe) -> dict[str, dict[str, int]]:
    """Axis sizes of the golden cases: every axis at ``min``, at an ``odd`` size, and at ``opt``; equal ones once."""
    axes = recipe.axes.items()
    cases = {
        "min": {name: axis.min for name, axis in axes},
        "odd": {name: _odd(axis) for name, axis in axes},
        "opt": {name: axis.opt for name, axis in axes},
    }
    if cases["odd"] in (cases["min"], cases["opt"]):
        del cases["odd"]
    if cases["opt"] == cases["min"]:
        del cases["opt"]
    return cases


def _odd(axis: Axis) -> int:
    """The odd size above 1 that is nearest to opt, and not opt itself; opt where there is none."""
    sizes = [size for size in range(axis.min, axis.max + 1) if size % 2 and size not in (1, axis.opt)]
    return min(sizes, key=lambda size: abs(size - axis.opt), default=axis.opt)


def _keyed(feeds: Mapping[str, Mapping[str, Array]], expected: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
    tensors = {f"{case}/in/{name}": array for case, arrays in feeds.items() for name, array in arrays.items()}
    return tensors | {
        f"{case}/out/{name}": array for case, arrays in expected.items() for name, array in arrays.items()
    }


def _engine(
    item: Chosen, feeds: Mapping[str, Mapping[str, Array]], expected: Mapping[str, Mapping[str, Array]], out: Path
) -> Engine:
    for name, file in zip(sorted(item.engine.artifact.files), evidence.files(item), strict=True):
        _copy(item.engine.file(name), out, file)
    found = [distance for rows in _measured(item, feeds, expected) for distance in rows]
    known = evidence.engine(item)
    golden = bounds(worst([*known.parity.vs_eager, *found]), expected.values())
    return known.model_copy(update={"golden": golden, "selector": _selector(item)})


def _selector(item: Chosen) -> Selector | None:
    found = buckets.of(item.engine)
    if not found:
        return None
    folder = manifest.folder_of(item.target.name)
    return Selector(
        axes=item.engine.signature().axes,
        buckets=tuple(
            Bucket(
                sizes=one.sizes,
                files=tuple(
                    f"{folder}{one.folder}/{name}" for name in sorted(buckets.part(item.engine, one).artifact.files)
                ),
            )
            for one in found
        ),
    )


def _copy(source: Path, out: Path, file: ReleaseFile) -> None:
    """Copy one file and check it, in one pass over its bytes.

    A copy, not a hard link: a link would share its bytes with the store, and whoever edits, truncates or appends to
    a file of the release would damage the engine as well.
    """
    path = out / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    hashed = hashlib.sha256()
    with source.open("rb") as reader, path.open("wb") as writer:
        while block := reader.read(1 << 20):
            hashed.update(block)
            writer.write(block)
    if hashed.hexdigest() != file.sha256:
        raise StoreError(
            f"`{source}` has other bytes than were built",
            hint="`exportyard export` builds it again; then publish again",
        )


def _described(out: Path, name: str) -> ReleaseFile:
    path = out / name
    return ReleaseFile(path=name, sha256=digest.of_file(path), size_bytes=path.stat().st_size)


def _measured(
    item: Chosen, feeds: Mapping[str, Mapping[str, Array]], expected: Mapping[str, Mapping[str, Array]]
) -> Iterable[tuple[Distance, ...]]:
    """Distances of the engine from the golden outputs, case by case, as far as it serves their sizes.

    None where this host can't run it, or lacks the packages: another host has built and compared it then.
    """
    backend = backends.find(item.target.backend)
    if backend.missing(item.target) is not None or backend.not_runnable(item.target) is not None:
        return []
    signature = item.engine.signature()
    kinds = {spec.name: spec.kind for spec in signature.outputs}
    served = {case: arrays for case, arrays in feeds.items() if padding.fits(arrays, signature)}
    with backends.loaded(item.engine, item.target) as run:
        return [compare.distances(expected[case], _run(run, arrays), kinds) for case, arrays in served.items()]


def _run(run: Runner, arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {name: value.copy() for name, value in run(arrays).items()}


def bounds(measured: Iterable[Distance], expected: Iterable[Mapping[str, Array]]) -> dict[str, Tolerance]:
    """How far a device may be from the golden outputs: `MARGIN` times the worst that was measured here.

    Indices are compared by the share that is equal, since the distance between two indices says nothing.
    """
    outputs = list(expected)
    found: dict[str, Tolerance] = {}
    for one in measured:
        if one.kind == "indices":
            share = 1.0 if one.argmax_agreement is None else one.argmax_agreement
            found[one.output] = Tolerance(argmax_agreement=max(0.0, 1 - MARGIN * (1 - share)))
            continue
        peak = max(_peak(arrays[one.output]) for arrays in outputs)
        found[one.output] = Tolerance(max_abs=MARGIN * one.max_abs + FLOOR * peak)
    return found


def _peak(array: Array) -> float:
    finite = np.abs(array[np.isfinite(array)].astype(np.float64))
    return float(finite.max()) if finite.size else 0.0
