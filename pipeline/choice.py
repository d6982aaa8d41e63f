"""The choice: which numeric form a target ships. Pure: reports in, a verdict with its reason out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipeline.types import Audit, Comparison, LatencyReport, LatencyRow, ParityReport, Scheme, Target

MARGIN = 1.05  # a form must beat fp32 by more than two runs of one engine differ by
WAITING = 0.97  # on several threads, which wait for each other unevenly, a form counts as slower only below that


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
    if "fp32" in parities and not parities["fp32"].passed:
        return None, "; ".join(["fp32 itself failed, so no form can be measured against it", *notes])
    if latency is None or len(passed) == 1:
        why = "the only form that passed" if len(target.schemes) > 1 else "the row's only form"
        return passed[0], "; ".join([why, *notes])
    if not latency.rows:
        return passed[0], "; ".join([f"the row's first form that passed ({latency.not_measured})", *notes])
    dear = {scheme: reason for scheme in passed if (reason := unpaid(latency, scheme)) is not None}
    paying = [scheme for scheme in passed if scheme not in dear]
    fastest = max(paying, key=lambda scheme: speed(latency, scheme))
    others = [
        f"{dear.get(scheme) or _against(speed(latency, scheme) / speed(latency, fastest))}"
        for scheme in passed
        if scheme != fastest
    ]
    told = [f"{scheme} {text}" for scheme, text in zip((one for one in passed if one != fastest), others, strict=True)]
    return fastest, "; ".join(["fastest form within budget", *told, *notes])


def _against(ratio: float) -> str:
    return f"has {ratio:.2f}x of its speed"


def too_little_int8(audit: Audit, least: float | None) -> str | None:
    """Why an INT8 form doesn't run enough of its compute in INT8, or None; `least` is what the recipe asks for."""
    if least is None or not audit.scheme.startswith("int8"):
        return None
    if audit.int8_share is None:
        return f"can't be shown to run {least:.1%} of its compute in INT8: {audit.not_audited}"
    if audit.int8_share < least:
        return f"runs {audit.int8_share:.1%} of its compute in INT8, the recipe asks for {least:.1%}"
    return None


def unpaid(latency: LatencyReport, scheme: Scheme) -> str | None:
    """Why a form isn't worth having beside fp32, or None if it is (or if there is no fp32 to compare with).

    It must be faster by more than the margin on one thread, where a second run agrees; and nowhere slower, which is
    when three quarters of the rounds say so.
    """
    rows = [row for row in latency.rows if scheme in row.versus_fp32]
    if scheme == "fp32" or not rows:
        return None
    overall = _mean([row.versus_fp32[scheme].median for row in _telling(rows)])
    low = _mean([row.versus_fp32[scheme].p25 for row in _telling(rows)])
    if overall < MARGIN or low < 1:
        return f"is not faster than fp32 ({overall:.2f}x)"
    for row in rows:
        if row.versus_fp32[scheme].p75 < (1 if row.threads == 1 else WAITING):
            sizes = " ".join(f"{name}={size}" for name, size in row.sizes.items())
            where = ", ".join(part for part in (sizes, f"{row.threads} thread{'s' * (row.threads > 1)}") if part)
            return f"is slower than fp32 at {where} ({row.versus_fp32[scheme].median:.2f}x)"
    return None


def speed(latency: LatencyReport, scheme: Scheme) -> float:
    """Speed on one thread, the geometric mean over all measured sizes: relative to eager PyTorch, or on a device,
    where there is none, in calls a millisecond.
    """
    return _mean(
        [
            row.versus_eager[scheme].median if row.versus_eager else 1 / row.engines[scheme].median_ms
            for row in _telling(latency.rows)
        ]
    )


def fastest_row(found: Comparison) -> tuple[str, str]:
    """The row whose engine is the fastest, over all measured sizes, and in one line why."""
    speeds = {name: _mean([at[name].median for at in found.versus_eager]) for name in found.versus_eager[0]}
    best = max(speeds, key=lambda name: speeds[name])
    told = [f"{name} {_against(speeds[name] / speeds[best])}" for name in speeds if name != best]
    return best, "; ".join([f"{best} is the fastest row, {speeds[best]:.1f}x of eager PyTorch", *told])


def _telling(rows: Sequence[LatencyRow]) -> list[LatencyRow]:
    """The rows on one thread, if there are any: with more, a busy machine measures the other work."""
    return [row for row in rows if row.threads == 1] or list(rows)


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
