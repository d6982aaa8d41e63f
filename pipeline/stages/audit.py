"""Stage audit: what an engine really runs in INT8. A graph may ask for integers and its engine still use floats."""

from __future__ import annotations

from pathlib import Path

from pydantic import JsonValue, TypeAdapter

from pipeline import audit as audits
from pipeline import buckets
from pipeline.macs import UnclearError
from pipeline.store import Stored, write_json
from pipeline.types import Audit, AuditRow, Axis, Scheme, Sizes, Target

ENGINE = "model.onnx"
# facts of engines: how many contractions run in INT8; or operator and numbers of each node that multiplies
COUNT, NAMES = "int8", "runs_in"


def audit(engine: Stored, model: Stored, target: Target, scheme: Scheme, out: Path) -> dict[str, JsonValue]:
    """Write ``audit.json``: each operator that multiplies, and what it runs in; or why that can't be told.

    Args:
        engine: of any backend; those of ONNX Runtime that are an ONNX graph can be looked into, others may have
            facts that say it. Of buckets, the one for the opt sizes is looked into.
        model: the ONNX graph that it was built from.
        target: gives the backend.
        scheme: of both.
        out: empty folder.
    """
    found = _audit(engine, model, target, scheme)
    write_json(out / "audit.json", found.plain())
    fallen: list[JsonValue] = [row.node for row in found.rows if row.fell_back]
    return {"int8_share": found.int8_share, "not_audited": found.not_audited, "fell_back": fallen}


def _audit(engine: Stored, model: Stored, target: Target, scheme: Scheme) -> Audit:
    sizes = {name: axis.opt for name, axis in engine.signature().axes.items()}
    bucket = buckets.smallest(buckets.of(engine), sizes)
    if bucket is not None:
        engine, sizes = buckets.part(engine, bucket), sizes | dict(bucket.sizes)
    reason = _closed(engine, target)
    if reason is None:
        try:
            rows = _rows(engine, model, sizes, target)
            return Audit(
                target=target.name,
                scheme=scheme,
                sizes=sizes,
                rows=tuple(rows),
                int8_share=audits.int8_share(rows),
                not_audited=None if rows else "the model has no convolution or matrix product",
            )
        except UnclearError as error:
            reason = str(error)
    return Audit(target=target.name, scheme=scheme, not_audited=reason)


def _rows(engine: Stored, model: Stored, sizes: Sizes, target: Target) -> list[AuditRow]:
    axes = {name: Axis(min=size, opt=size, max=size) for name, size in sizes.items()}
    source, signature = model.file("model.onnx"), model.signature().model_copy(update={"axes": axes})
    if target.backend == "onnxruntime":
        return audits.audit(engine.file(ENGINE), source, signature)
    told = engine.artifact.facts.get(NAMES)
    if told is not None:
        runs_in = TypeAdapter(dict[str, tuple[str, audits.Number]]).validate_python(told)
        return audits.audit_by_names(runs_in, source, signature)
    integers = engine.artifact.facts[COUNT]
    assert isinstance(integers, int)
    return audits.audit_by_count(integers, source, signature)


def _closed(engine: Stored, target: Target) -> str | None:
    """Why nobody can look into the engine, or None."""
    if not {COUNT, NAMES}.isdisjoint(engine.artifact.facts):
        return None
    if "provider" in engine.artifact.facts:
        return f"ONNX Runtime's provider `{engine.artifact.facts['provider']}` compiles the graph as it loads it"
    if target.backend != "onnxruntime":
        return f"engines of backend `{target.backend}` don't say what they run in"
    if ENGINE not in engine.artifact.files:
        return "a graph in the `.ort` format can't be looked into"
    return None
