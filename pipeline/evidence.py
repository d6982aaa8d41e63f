"""What a manifest says in short of an engine's parity and latency; the report compares it with the last release."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.manifest import Engine, Latency, LatencyLine, ParitySummary, ReleaseFile, folder_of
from pipeline.types import Chosen, Distance, ParityReport


def parity(report: ParityReport) -> ParitySummary:
    """A parity report in short: the worst of each number, per output, over all sizes."""
    return ParitySummary(
        sizes=len(report.sizes),
        vs_onnx=worst(distance for row in report.sizes for distance in row.vs_onnx),
        vs_eager=worst(distance for row in report.sizes for distance in row.vs_eager),
        metric=report.metric,
    )


def worst(distances: Iterable[Distance]) -> tuple[Distance, ...]:
    """For each output, in order of appearance, the worst of each number."""
    found: dict[str, Distance] = {}
    for one in distances:
        found[one.output] = _worse(found[one.output], one) if one.output in found else one
    return tuple(found.values())


def _worse(one: Distance, other: Distance) -> Distance:
    shares = [share for share in (one.argmax_agreement, other.argmax_agreement) if share is not None]
    return Distance(
        output=one.output,
        kind=one.kind,
        max_abs=max(one.max_abs, other.max_abs),
        max_over_peak=max(one.max_over_peak, other.max_over_peak),
        rmse=max(one.rmse, other.rmse),
        sqnr_db=min(one.sqnr_db, other.sqnr_db),
        cosine=min(one.cosine, other.cosine),
        argmax_agreement=min(shares) if shares else None,
    )


def latency(item: Chosen) -> Latency:
    """What was timed of the form that a target ships."""
    rows = tuple(
        LatencyLine(
            sizes=row.sizes,
            threads=row.threads,
            eager=row.eager,
            engine=row.engines[item.scheme],
            versus_eager=row.versus_eager[item.scheme].median if row.versus_eager else None,
        )
        for row in item.latency.rows
    )
    return Latency(cpu=item.latency.cpu, rows=rows, not_measured=item.latency.not_measured)


def files(item: Chosen) -> tuple[ReleaseFile, ...]:
    """The engine's files, by their place in a release."""
    folder = folder_of(item.target.name)
    return tuple(
        ReleaseFile(path=folder + name, **fact.model_dump())
        for name, fact in sorted(item.engine.artifact.files.items())
    )


def engine(item: Chosen) -> Engine:
    """What a release would say of an engine, as far as it is known without golden vectors: none are in it."""
    return Engine(
        target=item.target.model_copy(update={"device": None}),  # where our board is concerns nobody
        scheme=item.scheme,
        reason=item.reason,
        tools=item.engine.artifact.tools,
        files=files(item),
        parity=parity(item.parity),
        latency=latency(item),
        golden={},
    )
