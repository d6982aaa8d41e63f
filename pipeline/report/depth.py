"""What the report says beyond the verdicts: tensors as calibration saw them, operators in the order of the graph.

It needs numpy and onnx, so that it is asked only where a page is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline import calibrate, candidates
from pipeline.calibrate import TensorStatistics
from pipeline.job import STATIC_SCHEMES
from pipeline.report.data import Kept, Report, SensitiveOperator, Sensitivity, Tensor
from pipeline.stages.quantize import STATISTICS
from pipeline.types import RangeMethod

if TYPE_CHECKING:
    from pipeline.job import Job

MODEL = "model.onnx"
BINS = 40  # of a picture as wide as a phone: finer ones can't be told apart
WORST = 10


def deepened(job: Job, found: Report) -> Report:
    """`found` with tensors and sensitivity, as far as the job has made what they are read from."""
    graph = job.made.get("onnx/fp32")
    order = _order(graph.stored.file(MODEL)) if graph and MODEL in graph.stored.artifact.files else {}
    return found.model_copy(
        update={
            "sensitivity": tuple(_sensitivity(job, found, order)),
            "tensors": tuple(_tensors(job)),
        }
    )


def _order(model: Path) -> dict[str, int]:
    nodes = onnx.load(model, load_external_data=False).graph.node
    return {node.name: place for place, node in enumerate(nodes)}


def _sensitivity(job: Job, found: Report, order: dict[str, int]) -> Iterator[Sensitivity]:
    for scheme in sorted(STATIC_SCHEMES):
        made = job.made.get(f"onnx/{scheme}")
        ranked = candidates.ranking(made.stored) if made is not None else ()
        if not ranked:
            continue
        operators = [
            SensitiveOperator(
                node=one.node,
                operator=one.operator,
                module=one.module,
                sqnr_db=one.sqnr_db,
                macs_share=one.macs_share,
                rank=rank,
            )
            for rank, one in enumerate(ranked, start=1)
        ]
        operators.sort(key=lambda one: (order.get(one.node, len(order)), one.rank))
        places = sorted(range(len(operators)), key=lambda place: operators[place].rank)
        yield Sensitivity(
            scheme=scheme,
            targets=tuple(dict.fromkeys(one.target for one in found.tried if one.scheme == scheme)),
            operators=tuple(operators),
            worst=tuple(places[:WORST]),
        )


def _tensors(job: Job) -> Iterator[Tensor]:
    made = job.made.get("statistics")
    if made is None or STATISTICS not in made.stored.artifact.files:
        return
    methods = _methods(job)
    for name, one in calibrate.load(made.stored.file(STATISTICS)).items():
        first, width, counts = coarse(one)
        yield Tensor(
            name=name,
            low=one.low,
            high=one.high,
            stray=one.stray,
            values=int(one.counts.sum()),
            first=first,
            width=width,
            counts=tuple(counts),
            kept=tuple(_kept(one, methods)),
        )


def _methods(job: Job) -> list[RangeMethod]:
    """Range methods of the forms that were made."""
    used = {made.stored.artifact.facts.get("method") for made in job.made.values()}
    return [method for method in get_args(RangeMethod) if method in used]


def _kept(one: TensorStatistics, methods: Sequence[RangeMethod]) -> Iterable[Kept]:
    for method in methods:
        low, high = calibrate.range_of(one, method)
        yield Kept(method=method, low=low, high=high)


def coarse(one: TensorStatistics) -> tuple[float, float, list[int]]:
    """The histogram in at most `BINS` equal bins over what was seen: lower edge of the first, width, counts."""
    used: NDArray[np.intp] = np.flatnonzero(one.counts)
    if not used.size:
        return one.low, 0.0, []
    first, last = int(used[0]), int(used[-1]) + 1
    joint = -(-(last - first) // BINS)
    padded = np.zeros(-(-(last - first) // joint) * joint, np.int64)
    padded[: last - first] = one.counts[first:last]
    counts = padded.reshape(-1, joint).sum(axis=1)
    width = float(one.edges[1] - one.edges[0])
    return float(one.edges[first]), width * joint, [int(count) for count in counts]
