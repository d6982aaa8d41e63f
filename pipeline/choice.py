"""The choice: which numeric form a target ships. Pure: reports in, a verdict with its reason out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipeline.types import LatencyReport, ParityReport, Scheme, Target

MARGIN = 1.03  # a form must beat fp32 by more than two runs of one engine differ by
NOISE = 0.97  # and may nowhere be slower than fp32 by more than that


def choose(
    target: Target,
    parities: Mapping[Scheme, ParityReport],
    latency: LatencyReport | None,
    left_out: Mapping[Scheme, str],
) -> tuple[Scheme | None, str]:
    """The fastest form within budget, and in one line why; no form when none passed.

    fp32 ships unless another form that passed is measurably faster overall, and slower than fp32 at no size.

    Args:
        target: its schemes are the candidates.
        parities: of every candidate that was built.
        latency: of every candidate that passed; None when this host can't run them.
        left_out: why a candidate was not built.
    """
    passed = [scheme for scheme in target.schemes if scheme in parities and parities[scheme].passed]
    failed = [
        f"{scheme} {parities[scheme].reasons[0]}"
        for scheme in target.schemes
        if scheme in parities and not parities[scheme].passed
    ]
    notes = [*failed, *(f"{scheme} {reason}" for scheme, reason in left_out.items())]
    if not passed:
        return None, "; ".join(notes)
    if latency is None or len(passed) == 1:
        rest = f"; {'; '.join(notes)}" if notes else ""
        why = "the only form that passed" if len(target.schemes) > 1 else "the row's only form"
        return passed[0], f"{why}{rest}"
    ratios = {scheme: speed(latency, scheme) for scheme in passed}
    paying = [scheme for scheme in passed if "fp32" not in passed or pays(latency, scheme)]
    fastest = max(paying, key=lambda scheme: ratios[scheme])
    others = [_against(scheme, ratios[scheme] / ratios[fastest]) for scheme in passed if scheme != fastest]
    return fastest, "; ".join([f"fastest within budget: {', '.join(others)}", *notes])


def pays(latency: LatencyReport, scheme: Scheme) -> bool:
    """Whether a form is worth having beside fp32, by the ratios paired within each round."""
    if scheme == "fp32":
        return True
    ratios = [row.versus_fp32[scheme] for row in latency.rows]
    return _mean(ratios) >= MARGIN and min(ratios) >= NOISE


def _against(scheme: Scheme, ratio: float) -> str:
    return f"{scheme} runs at {ratio:.2f}x of its speed"


def speed(latency: LatencyReport, scheme: Scheme) -> float:
    """Speed relative to eager PyTorch: the geometric mean over all measured sizes."""
    return _mean([row.versus_eager[scheme] for row in latency.rows])


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
