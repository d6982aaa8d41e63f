"""All that was tried for a target, form by form, with what was found out about each: one line of a table, or JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline import choice
from pipeline.job import SEARCH
from pipeline.store import Stored
from pipeline.types import Audit, Frozen, LatencyReport, ParityReport, Scheme, Speed, Target, Tried

if TYPE_CHECKING:
    from pipeline.job import Job
    from pipeline.run import Verdict


class LeftInFloat(Frozen):
    """An operator that a scheme left in float, or that the engine runs in float all the same."""

    node: str
    module: str
    why: str


class Sensitive(Frozen):
    """An operator that was looked at in a search for sensitive ones; `sqnr_db` is of its own output in 8 bits."""

    node: str
    operator: str = ""
    module: str = ""
    sqnr_db: float
    macs_share: float | None = None


class Candidate(Tried):
    """One numeric form of one target, with all that a page can show of it.

    Attributes:
        left_in_float: operators that multiply and that this INT8 form leaves in float, by its own choice.
        fell_back: those that the engine runs in float although the form wants them in INT8.
        sensitive: operators by what 8 bits cost them, the most sensitive first; empty where no search was made.
    """

    target: str
    left_in_float: tuple[LeftInFloat, ...] = ()
    fell_back: tuple[LeftInFloat, ...] = ()
    sensitive: tuple[Sensitive, ...] = ()


def of(job: Job, verdict: Verdict) -> list[Candidate]:
    """Every form of the verdict's target, in the row's order; none where nothing was built.

    Of a row that chooses, every form of the rows that it chose among.
    """
    if verdict.rows:
        return [_of_row(verdict, row, one) for row in verdict.rows for one in of(job, row)]
    if verdict.status == "not built here":
        return []
    return [_candidate(job, verdict, scheme) for scheme in verdict.target.schemes]


def numbers(found: list[Candidate], target: Target) -> tuple[Tried, ...]:
    """What of them the manifest keeps with `target`."""
    kept = [Tried.model_validate(one.model_dump(include=set(Tried.model_fields))) for one in found]
    return tuple(one.model_copy(update={"target": None}) if one.target == target.name else one for one in kept)


def _of_row(verdict: Verdict, row: Verdict, one: Candidate) -> Candidate:
    """A form of one of the rows among which the verdict's target chose."""
    if not one.chosen or row.target.name == verdict.built_for:
        return one
    return one.model_copy(update={"chosen": False, "outcome": "the best of its row, which another one outdoes"})


def _candidate(job: Job, verdict: Verdict, scheme: Scheme) -> Candidate:
    found: dict[str, Any] = {
        "target": verdict.target.name,
        "scheme": scheme,
        "outcome": _outcome(verdict, scheme),
        "chosen": scheme == verdict.scheme,
    }
    audit = verdict.audits.get(scheme)
    if audit is not None:  # so it was built
        graph = job.form(verdict.target, scheme).stored
        found |= {
            "size_bytes": job.engine(verdict.target, scheme).stored.size_bytes,
            "method": graph.artifact.facts.get("method"),
            "left_in_float": _left_in_float(graph, audit),
            "fell_back": tuple(
                LeftInFloat(
                    node=row.node, module=row.module, why=f"the engine runs it as {row.operator} in {row.runs_in}"
                )
                for row in audit.rows
                if row.fell_back
            ),
            "sensitive": ranking(graph),
            "int8_share": audit.int8_share,
            "not_audited": audit.not_audited,
        }
    parity = verdict.candidates.get(scheme)
    if parity is not None:
        found |= _accuracy(parity)
    if verdict.latency is not None:
        found["speeds"] = _speeds(verdict.latency, scheme)
    return Candidate(**found)


def _outcome(verdict: Verdict, scheme: Scheme) -> str:
    if scheme == verdict.scheme:
        return "chosen"
    if scheme in verdict.left_out:
        return verdict.left_out[scheme]
    parity = verdict.candidates.get(scheme)
    if parity is None:
        return "not measured on the device" if verdict.status == "not verified" else verdict.reason
    if not parity.passed:
        return "; ".join(parity.reasons)
    if verdict.latency is None or verdict.scheme is None:
        return "within budget"
    if not verdict.latency.rows:
        return f"within budget, {verdict.latency.not_measured}"
    unpaid = choice.unpaid(verdict.latency, scheme)
    if unpaid is not None:
        return unpaid
    ratio = choice.speed(verdict.latency, scheme) / choice.speed(verdict.latency, verdict.scheme)
    return f"within budget, {ratio:.2f}x of the chosen form's speed"


def _left_in_float(graph: Stored, audit: Audit) -> tuple[LeftInFloat, ...]:
    because = graph.artifact.facts.get("float_because")
    if not isinstance(because, Mapping):
        return ()
    modules = {row.node: row.module for row in audit.rows}
    order = {node: place for place, node in enumerate(modules)}  # as they run
    return tuple(
        LeftInFloat(node=node, module=modules.get(node, ""), why=str(because[node]))
        for node in sorted(because, key=lambda node: (order.get(node, len(order)), node))
    )


def ranking(graph: Stored) -> tuple[Sensitive, ...]:
    """The ranked operators in the ``search.json`` that a search for sensitive ones leaves beside a graph."""
    if SEARCH not in graph.artifact.files:
        return ()
    return tuple(
        Sensitive(**{name: row[name] for name in Sensitive.model_fields if name in row})
        for row in _rows(json.loads(graph.file(SEARCH).read_text()))
    )


def _rows(data: Any) -> list[dict[str, Any]]:
    """The first list of operators with a ``sqnr_db`` in the file, which keeps other things, too."""
    if (
        isinstance(data, list)
        and data
        and all(isinstance(row, dict) and {"node", "sqnr_db"} <= set(row) for row in data)
    ):
        return data
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    return next((found for value in inner if (found := _rows(value))), [])


def _accuracy(parity: ParityReport) -> dict[str, float]:
    metric = parity.metric
    # indices are right or wrong: a distance between them means nothing
    outputs = [one for one in metric.vs_eager if one.kind != "indices"]
    found = {"metric": metric.engine, "eager_metric": metric.eager, "drop": metric.drop, "budget": metric.budget}
    if outputs:
        found["sqnr_db"] = min(one.sqnr_db for one in outputs)
        found["cosine"] = min(one.cosine for one in outputs)
    return found


def _speeds(latency: LatencyReport, scheme: Scheme) -> tuple[Speed, ...]:
    return tuple(
        Speed(
            sizes=row.sizes,
            threads=row.threads,
            median_ms=row.engines[scheme].median_ms,
            versus_fp32=row.versus_fp32[scheme].median if scheme in row.versus_fp32 else None,
        )
        for row in latency.rows
        if scheme in row.engines
    )


def versus_fp32(candidate: Candidate) -> float | None:
    """How many times faster than fp32 a candidate is on one thread; None where that wasn't measured."""
    timed = [speed for speed in candidate.speeds if speed.versus_fp32 is not None]
    telling = [speed for speed in timed if speed.threads == 1] or timed
    ratios = [speed.versus_fp32 for speed in telling if speed.versus_fp32]
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios)) if ratios else None
