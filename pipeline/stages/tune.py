"""Stage tune: which schedules are the fastest ones for a model on a target, as far as that was measured."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from pipeline import buckets, fixing
from pipeline.store import Stored, write_json
from pipeline.types import Reporter, Target, Tuner, no_report

CHOICES = "choices.json"


def tune(
    tuner: Tuner, model: Stored, target: Target, shared: Path, out: Path, report: Reporter = no_report
) -> Mapping[str, JsonValue]:
    """Let the row's backend look up, and measure where the row says so, what is the fastest for `model`.

    Args:
        model: what the backend's `source` asks for.
        shared: records of all models on this kind of hardware; new ones are added to it.
        out: gets ``choices.json``; with `buckets` in the row, all that any bucket needs.

    Raises:
        UsageError, UnavailableError: see `Tuner.tune`.
    """
    found = buckets.plan(target, model.signature())
    if not found:
        return tuner.tune(model, target, shared, out, report)
    choices: dict[str, JsonValue] = {}
    facts: dict[str, JsonValue] = {}
    with tempfile.TemporaryDirectory(dir=out) as place:
        for bucket in found:
            fixed = fixing.fixed(model, tuner.source(target), bucket.sizes, Path(place) / bucket.folder)
            part = Path(place) / "choices" / bucket.folder
            part.mkdir(parents=True)
            facts[bucket.folder] = dict(tuner.tune(fixed, target, shared, part, report))
            choices |= json.loads((part / CHOICES).read_text())
    write_json(out / CHOICES, choices)
    return {"buckets": facts}
