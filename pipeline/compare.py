"""Distances between tensors: pure functions over arrays. A mismatch is a result, not an exception."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ParityError
from pipeline.types import Distance, OutputKind, Tolerance

Array = NDArray[Any]


def distances(
    reference: Mapping[str, Array], other: Mapping[str, Array], kinds: Mapping[str, OutputKind]
) -> tuple[Distance, ...]:
    """The distance of each output of `other` from `reference`, in the order of `reference`.

    Raises:
        ParityError: the two don't have the same outputs, or one of them has another shape.
    """
    if set(reference) != set(other):
        missing, extra = sorted(set(reference) - set(other)), sorted(set(other) - set(reference))
        raise ParityError(f"the engine's outputs are not the model's: missing {missing}, unexpected {extra}")
    return tuple(distance(name, reference[name], other[name], kinds.get(name, "other")) for name in reference)


def distance(name: str, reference: Array, other: Array, kind: OutputKind = "other") -> Distance:
    """How far `other` is from `reference`. Computed in float64; NaN equals nothing, an infinity equals itself.

    Raises:
        ParityError: the shapes differ.
    """
    if reference.shape != other.shape:
        raise ParityError(f"output `{name}` has shape {list(other.shape)}, the model's is {list(reference.shape)}")
    if reference.size == 0:
        return Distance(output=name, kind=kind, max_abs=0, max_over_peak=0, rmse=0, sqnr_db=math.inf, cosine=1)
    ref = reference.astype(np.float64)
    oth = other.astype(np.float64)
    equal = ref == oth
    with np.errstate(invalid="ignore", over="ignore"):
        gap = np.where(equal, 0.0, np.abs(ref - oth))
    gap[np.isnan(gap)] = np.inf
    finite = np.isfinite(ref)
    peak = float(np.abs(ref[finite]).max()) if finite.any() else 0.0
    max_abs = float(gap.max())
    rmse = _norm(gap) / math.sqrt(gap.size) if math.isfinite(max_abs) else math.inf
    return Distance(
        output=name,
        kind=kind,
        max_abs=max_abs,
        max_over_peak=_ratio(max_abs, peak),
        rmse=rmse,
        sqnr_db=_sqnr_db(ref[finite], gap[finite]) if math.isfinite(max_abs) else -math.inf,
        cosine=_cosine(ref[finite], oth[finite]) if math.isfinite(max_abs) else 0.0,
        argmax_agreement=_agreement(reference, other, kind),
    )


def _ratio(value: float, peak: float) -> float:
    if peak > 0:
        return value / peak
    return 0.0 if value == 0 else math.inf


def _norm(array: Array) -> float:
    """Euclidean norm; scaled first, so that squares of very large or very small values neither overflow nor vanish."""
    top = float(np.abs(array).max(initial=0))
    return top * math.sqrt(float(np.sum(np.square(array / top)))) if top > 0 else 0.0


def _sqnr_db(reference: Array, gap: Array) -> float:
    noise, signal = _norm(gap), _norm(reference)
    if noise == 0:
        return math.inf
    return 20 * (math.log10(signal) - math.log10(noise)) if signal > 0 else -math.inf


def _cosine(reference: Array, other: Array) -> float:
    one, two = _norm(reference), _norm(other)
    if one == 0 or two == 0:
        return 1.0 if one == two else 0.0
    return max(-1.0, min(1.0, float(np.sum((reference / one) * (other / two)))))


def _agreement(reference: Array, other: Array, kind: OutputKind) -> float | None:
    if kind == "indices":
        return float(np.mean(reference == other))
    if kind in ("logits", "probabilities", "scores") and reference.ndim >= 2 and reference.shape[-1] > 1:
        return float(np.mean(reference.argmax(axis=-1) == other.argmax(axis=-1)))
    return None


def violations(found: Distance, tolerance: Tolerance) -> list[str]:
    """The bounds of `tolerance` that `found` breaks, in words; empty when it holds."""
    if found.kind == "indices":
        least = 1.0 if tolerance.argmax_agreement is None else tolerance.argmax_agreement
        share = found.argmax_agreement if found.argmax_agreement is not None else 1.0
        return [] if share >= least else [f"`{found.output}` equal indices {share:.4f} < {least:.4f}"]
    broken = []
    for name in ("max_abs", "max_over_peak", "rmse"):
        bound, value = getattr(tolerance, name), getattr(found, name)
        if bound is not None and not value <= bound:
            broken.append(f"`{found.output}` {name} {value:.3g} > {bound:.3g}")
    for name in ("sqnr_db", "cosine", "argmax_agreement"):
        bound, value = getattr(tolerance, name), getattr(found, name)
        if bound is not None and value is not None and not value >= bound:
            broken.append(f"`{found.output}` {name} {value:.5g} < {bound:.5g}")
    return broken


def share(found: Distance, tolerance: Tolerance) -> float:
    """How much of what `tolerance` allows `found` takes, by the bound that it is nearest to: above 1 it breaks that.

    In amplitudes: 6 dB less SQNR are twice as much.
    """
    if found.kind == "indices":
        return _taken("argmax_agreement", found.argmax_agreement, tolerance.argmax_agreement or 1.0)
    names = [name for name in Tolerance.model_fields if getattr(tolerance, name) is not None]
    return max(_taken(name, getattr(found, name), getattr(tolerance, name)) for name in names)


def _taken(name: str, value: float | None, bound: float) -> float:
    if value is None:  # a bound on what this kind of output doesn't have
        return 0.0
    if name == "sqnr_db":
        gap = (bound - value) / 20
        return 10**gap if gap < 300 else math.inf  # beyond that it is no float
    taken, allowed = (1 - value, 1 - bound) if name in ("cosine", "argmax_agreement") else (value, bound)
    return _ratio(max(0.0, taken), allowed)


def worst(found: Iterable[Distance]) -> Distance | None:
    """The distance with the least SQNR, None when there is none."""
    return min(found, key=lambda one: (one.sqnr_db, one.cosine), default=None)


def pooled(name: str, reference: Sequence[Array], other: Sequence[Array], kind: OutputKind = "other") -> Distance:
    """The distance over many calls at once, whose shapes may differ between calls.

    Cosine is the mean over calls (and over rows for embeddings), the rest is over all elements together.
    """
    each = [distance(name, one, two, kind) for one, two in zip(reference, other, strict=True)]
    flat = distance(name, _flat(reference), _flat(other), kind)
    agreements = [one.argmax_agreement for one in each if one.argmax_agreement is not None]
    return flat.model_copy(
        update={
            "cosine": row_cosine(reference, other)
            if kind == "embedding"
            else float(np.mean([one.cosine for one in each])),
            "argmax_agreement": float(np.mean(agreements)) if agreements else None,
        }
    )


def _flat(arrays: Sequence[Array]) -> Array:
    return np.concatenate([array.reshape(-1) for array in arrays]) if arrays else np.zeros(0)


def row_cosine(reference: Sequence[Array], other: Sequence[Array]) -> float:
    """Mean cosine over the last dimension of all rows of all calls; the usual measure for embeddings."""
    values: list[float] = []
    for one, two in zip(reference, other, strict=True):
        rows_one, rows_two = one.reshape(-1, one.shape[-1]), two.reshape(-1, two.shape[-1])
        values += [_cosine(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(rows_one, rows_two, strict=True)]
    return float(np.mean(values)) if values else 1.0
