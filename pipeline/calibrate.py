"""Calibration in constant memory: one pass over the samples, then ranges by any method.

Each tensor's values go into a histogram whose bins are a power of two wide and have an edge at zero. When a
value lies outside, neighbouring bins are joined two by two and the width doubles; this loses nothing that the
wider bins could have told. So the result doesn't depend on the order of the samples or on how they were sharded:
statistics of shards merge into exactly what one pass would have found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pipeline import probe
from pipeline.errors import DataError, StoreError
from pipeline.types import RangeMethod, Reporter, no_report

HALF = 2048  # bins on each side of zero; the largest magnitude lies in the outer half of them
BINS = 2 * HALF
_HALF_BITS = 11
_CHUNK = 1 << 15  # elements at a time: the work arrays stay in the processor's second-level cache
_LOWEST = -100  # exponent of the finest bins: 2**-100; below it everything counts as zero
PERCENTILE = 99.999
_LEVELS = 128  # what a candidate range is quantised to when distributions are compared
_COARSE = 128  # bins on each side of zero then; so entropy may cut a range to half of what was seen, not more

Array = NDArray[Any]


@dataclass(frozen=True)
class TensorStatistics:
    """What calibration saw of one tensor.

    Attributes:
        low: least finite value; 0 when there was none.
        high: greatest finite value.
        exponent: bin ``i`` of `counts` holds values from ``(i - HALF) * 2**exponent`` to below the next edge.
        counts: int64 ``[BINS]``.
        stray: how many values were NaN or infinite.
    """

    low: float
    high: float
    exponent: int
    counts: NDArray[np.int64]
    stray: int = 0

    @property
    def edges(self) -> NDArray[np.float64]:
        """The ``BINS + 1`` edges of the bins."""
        return np.ldexp(np.arange(-HALF, HALF + 1, dtype=np.float64), self.exponent)


Statistics = Mapping[str, TensorStatistics]


def collect(
    model: Path,
    samples: Iterable[Mapping[str, Array]],
    report: Reporter = no_report,
    wanted: Sequence[str] | None = None,
) -> Statistics:
    """One pass of `samples` (feeds by input name) through the model; statistics of each tensor that a scheme may need.

    Memory doesn't grow with the number of samples, and only by a bounded amount with the size of one.

    Args:
        model: the float graph.
        samples: feeds by input name.
        report: told of each sample.
        wanted: only these tensors.

    Raises:
        DataError: there is no sample, or the model can't run one of them.
    """
    found: dict[str, TensorStatistics] = {}
    count = 0
    for count, feeds in enumerate(probe.over(model, samples, wanted), start=1):
        for name, array in feeds:
            seen = observe(array)
            found[name] = joined(found[name], seen) if name in found else seen
        report(count, 0, "calibration")
    if count == 0:
        raise DataError("there is no calibration sample", hint="give at least one; 100 to 500 are usual")
    return dict(sorted(found.items()))


def observe(array: Array) -> TensorStatistics:
    """Statistics of one array of a floating-point dtype."""
    flat = np.ascontiguousarray(array, dtype=np.float32).reshape(-1)
    if flat.size == 0:
        return TensorStatistics(0.0, 0.0, _LOWEST, np.zeros(BINS, np.int64))
    low, high, stray = float(flat.min()), float(flat.max()), 0
    if not (math.isfinite(low) and math.isfinite(high)):
        kept = flat[np.isfinite(flat)]
        stray, flat = flat.size - kept.size, kept
        low, high = (float(flat.min()), float(flat.max())) if flat.size else (0.0, 0.0)
    exponent = _exponent(max(abs(low), abs(high)))
    return TensorStatistics(low, high, exponent, _histogram(flat, exponent), stray)


def _exponent(magnitude: float) -> int:
    """The least exponent at which `magnitude` lies inside the bins."""
    # frexp gives magnitude < 2**e, so that magnitude / 2**(e - 11) < 2048 = HALF
    return max(math.frexp(magnitude)[1] - _HALF_BITS, _LOWEST) if magnitude else _LOWEST


def _histogram(flat: NDArray[np.float32], exponent: int) -> NDArray[np.int64]:
    counts = np.zeros(BINS, np.int64)
    # a product with a power of two is exact, unless it gets too small for the dtype; then float64 is wide enough
    dtype: type[np.floating[Any]] = np.float32 if exponent <= 0 else np.float64
    scale = dtype(math.ldexp(1.0, -exponent))
    scaled, index = np.empty(min(_CHUNK, flat.size), dtype), np.empty(min(_CHUNK, flat.size), np.int64)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        work, place = scaled[: part.size], index[: part.size]
        np.multiply(part, scale, out=work)
        np.floor(work, out=work)
        np.copyto(place, work, casting="unsafe")
        np.add(place, HALF, out=place)
        counts += np.bincount(place, minlength=BINS)
    return counts


def joined(one: TensorStatistics, two: TensorStatistics) -> TensorStatistics:
    """The statistics that one pass over the values of both would have given, exactly."""
    exponent = max(one.exponent, two.exponent)
    # a tensor without a finite value says nothing about the range
    seen = [each for each in (one, two) if each.counts.any()] or [one]
    return TensorStatistics(
        low=min(each.low for each in seen),
        high=max(each.high for each in seen),
        exponent=exponent,
        counts=_coarser(one, exponent) + _coarser(two, exponent),
        stray=one.stray + two.stray,
    )


def _coarser(one: TensorStatistics, exponent: int) -> NDArray[np.int64]:
    shift = exponent - one.exponent
    if shift == 0:
        return one.counts
    used = np.flatnonzero(one.counts)
    counts = np.zeros(BINS, np.int64)
    # an arithmetic shift rounds down, as floor did when the values were counted
    np.add.at(counts, ((used - HALF) >> min(shift, 62)) + HALF, one.counts[used])
    return counts


def merge(one: Statistics, two: Statistics) -> Statistics:
    """Statistics of two shards of samples as if they had been collected in one pass.

    Raises:
        DataError: they are not of the same graph.
    """
    if set(one) != set(two):
        odd = min(set(one) ^ set(two))
        raise DataError(f"these statistics are of different graphs: only one of them has `{odd}`")
    return {name: joined(one[name], two[name]) for name in one}


def save(statistics: Statistics, path: Path) -> None:
    """Write `statistics` as one safetensors file: equal statistics, equal bytes."""
    names = sorted(statistics)
    rows = [statistics[name] for name in names]
    # only the used part of each histogram is kept; after a ReLU that is half of it
    spans = [_span(row.counts) for row in rows]
    parts = [row.counts[first:last] for row, (first, last) in zip(rows, spans, strict=True)]
    save_file(
        {
            "range": np.array([(row.low, row.high) for row in rows], np.float64).reshape(-1, 2),
            "whole": np.array(
                [(row.exponent, row.stray, *span) for row, span in zip(rows, spans, strict=True)], np.int64
            ).reshape(-1, 4),
            "counts": np.concatenate(parts) if parts else np.zeros(0, np.int64),
        },
        path,
        # one key only: safetensors writes several in no fixed order
        metadata={"tensors": json.dumps(names)},
    )
    path.chmod(0o644)


def _span(counts: NDArray[np.int64]) -> tuple[int, int]:
    used = np.flatnonzero(counts)
    return (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)


def load(path: Path) -> Statistics:
    """What `save` wrote.

    Raises:
        StoreError: the file is damaged or something else.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = json.loads((file.metadata() or {})["tensors"])
            ends, whole, packed = (file.get_tensor(key) for key in ("range", "whole", "counts"))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise StoreError(
            f"`{path}` holds no calibration statistics: {error}", hint="remove it and export again"
        ) from None
    found, start = {}, 0
    for name, (low, high), (exponent, stray, first, last) in zip(names, ends, whole, strict=True):
        counts = np.zeros(BINS, np.int64)
        counts[first:last] = packed[start : start + last - first]
        start += int(last - first)
        found[name] = TensorStatistics(float(low), float(high), int(exponent), counts, int(stray))
    return found


def ranges(
    statistics: Statistics, method: RangeMethod, *, percentile: float = PERCENTILE
) -> dict[str, tuple[float, float]]:
    """The range that each tensor should be quantised over; always inside what was seen.

    ``minmax`` keeps every value, ``percentile`` cuts ``100 - percentile`` percent of them (half on each side),
    ``entropy`` keeps the distribution closest to what was seen (Kullback-Leibler, thresholds symmetric about
    zero), ``mse`` makes the expected squared error of 8 bits least.
    """
    return {name: range_of(one, method, percentile=percentile) for name, one in statistics.items()}


def range_of(one: TensorStatistics, method: RangeMethod, *, percentile: float = PERCENTILE) -> tuple[float, float]:
    """The range of one tensor; see `ranges`."""
    if method == "minmax" or not one.low < one.high:
        return one.low, one.high
    if method == "percentile":
        low, high = _by_percentile(one, percentile)
    elif method == "entropy":
        low, high = _by_entropy(one)
    else:
        low, high = _by_mse(one)
    return max(low, one.low), min(high, one.high)


def _by_percentile(one: TensorStatistics, percentile: float) -> tuple[float, float]:
    share = (100.0 - percentile) / 200.0
    below = np.concatenate(([0], np.cumsum(one.counts))) / one.counts.sum()
    low = one.edges[np.searchsorted(below, share, side="right") - 1]
    high = one.edges[np.searchsorted(below, 1.0 - share, side="left")]
    return float(low), float(high)


def _by_entropy(one: TensorStatistics) -> tuple[float, float]:
    """The threshold whose clipped and quantised distribution diverges least from the clipped one."""
    counts, width = _around_zero(one)
    half = len(counts) // 2
    # zeros that a ReLU or padding makes are exact in any range; as one high bin they would decide everything
    counts[half] = min(counts[half], counts[half + 1])
    bounds = range(_LEVELS // 2, half + 1)
    best = bounds[int(np.argmin([_divergence(counts, bound) for bound in bounds]))]
    return -best * width, best * width


def _around_zero(one: TensorStatistics) -> tuple[NDArray[np.float64], float]:
    """The histogram in `_COARSE` bins on each side of zero, out to the farthest value, and the width of a bin.

    Bins much finer than a level make the divergence see differences that eight bits can't keep anyway.
    """
    used = np.flatnonzero(one.counts)
    farthest = int(max(HALF - used[0], used[-1] + 1 - HALF))
    joint = -(-farthest // _COARSE)
    reach = joint * _COARSE
    padded = np.zeros(2 * reach)
    first, last = max(HALF - reach, 0), min(HALF + reach, BINS)
    padded[first - HALF + reach : last - HALF + reach] = one.counts[first:last]
    return padded.reshape(-1, joint).sum(axis=1), math.ldexp(joint, one.exponent)


def _divergence(counts: NDArray[np.float64], bound: int) -> float:
    """Kullback-Leibler divergence of the values within `bound` bins of zero from their `_LEVELS` levels."""
    half = len(counts) // 2
    inner = counts[half - bound : half + bound]
    seen = inner.copy()
    seen[0] += counts[: half - bound].sum()
    seen[-1] += counts[half + bound :].sum()
    level = np.arange(2 * bound) * _LEVELS // (2 * bound)
    live = seen > 0
    # each level's values are spread evenly over those of its bins that hold any
    share = np.bincount(level, weights=inner) / np.maximum(np.bincount(level, weights=live), 1)
    kept = np.where(live, share[level], 0.0)
    if kept.sum() == 0:
        return math.inf
    wanted, got = seen[live] / seen.sum(), kept[live] / kept.sum()
    # a bin that holds only clipped values has no share of its own; a small one keeps the logarithm finite
    return float(np.sum(wanted * np.log(wanted / np.maximum(got, 1e-9))))


def _by_mse(one: TensorStatistics) -> tuple[float, float]:
    """The range with the least expected squared error of 256 even levels: rounding inside, clipping outside."""
    centre = (one.edges[:-1] + one.edges[1:]) / 2
    weight = one.counts / one.counts.sum()
    moments = [np.concatenate(([0.0], np.cumsum(weight * centre**power))) for power in range(3)]
    shrink = np.linspace(1.0, 1 / 64, 64)
    lows, highs = min(one.low, 0.0) * shrink, max(one.high, 0.0) * shrink
    low_at = np.searchsorted(one.edges, lows, side="left")
    high_at = np.searchsorted(one.edges, highs, side="left")

    def beyond(bound: NDArray[np.float64], sums: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.asarray(sums[2] - 2 * bound * sums[1] + bound**2 * sums[0])

    left = beyond(lows, [sums[low_at] for sums in moments])
    right = beyond(highs, [sums[-1] - sums[high_at] for sums in moments])
    inside = moments[0][high_at][None, :] - moments[0][low_at][:, None]
    step = (highs[None, :] - lows[:, None]) / 255
    error = left[:, None] + right[None, :] + inside * step**2 / 12
    row, column = np.unravel_index(int(np.argmin(error)), error.shape)
    return float(lows[row]), float(highs[column])
