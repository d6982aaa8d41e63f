"""Stage build: an ONNX graph or a program becomes the engine of one target."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from pipeline import backends, buckets, fixing, targets
from pipeline.buckets import Bucket
from pipeline.errors import BuildError, ExportyardError, UnavailableError, UsageError, last_line
from pipeline.store import Stored, write_json
from pipeline.types import Scheme, Target

SIGNATURE = "signature.json"
GRAPH_BREAKS = "graph_breaks"  # fact of an engine that was built from a program


def build(
    model: Stored, target: Target, scheme: Scheme, out: Path, tuning: Path | None = None
) -> Mapping[str, JsonValue]:
    """Let the target's backend write the engine into `out`, with the model's ``signature.json`` beside it.

    Args:
        model: what the backend's `source` asks for: the ONNX graph in the form `scheme`, or the program.
        tuning: the folder that the stage `tune` wrote, for a row that asks for it.

    Raises:
        UsageError: the backend or an option doesn't exist, or the backend can't carry `scheme`.
        UnavailableError: this host can't build the target.
        BuildError: the backend failed, or wrote nothing.
    """
    backend = backends.find(target.backend)
    targets.check_options(target, backend.option_names)
    if scheme not in backend.schemes:
        raise UsageError(
            f"backend `{target.backend}` can't carry scheme `{scheme}` (target `{target.name}`)",
            hint=f"it carries {', '.join(f'`{one}`' for one in sorted(backend.schemes))}",
        )
    reason = backend.missing(target)
    if reason is not None:
        raise UnavailableError(
            f"`{target.name}` can't be built on this host: {reason}",
            hint="`exportyard doctor` says what to install",
        )
    found = buckets.plan(target, model.signature())
    if not found and getattr(backend, "static_only", False) and buckets.dynamic(model.signature()):
        axes = ", ".join(f"`{name}`" for name in buckets.dynamic(model.signature()))
        raise buckets.needed(target, f"builds models of fixed sizes only, and {axes} may vary")
    facts = (
        _buckets(model, target, scheme, found, out, tuning) if found else _engine(model, target, scheme, out, tuning)
    )
    if backend.source(target) == "program":
        # a program is one graph, since capture refuses a model that breaks; a backend that breaks it itself has counted
        return {GRAPH_BREAKS: 0, **facts}
    return facts


def _engine(model: Stored, target: Target, scheme: Scheme, out: Path, tuning: Path | None) -> Mapping[str, JsonValue]:
    """One engine in the folder `out`."""
    try:
        if tuning is None:
            facts = backends.find(target.backend).build(model, target, out)
        else:
            facts = backends.tuner(target.backend).build_tuned(model, target, tuning, out)
    except (ExportyardError, OSError, MemoryError):
        raise  # OSError: a full disk is the store's to explain
    except Exception as error:  # whatever a library throws, the user sees one line of it
        raise BuildError(
            f"backend `{target.backend}` failed on `{target.name}` ({scheme}): {last_line(error)}",
            hint="leave the target out in the recipe's `targets`, or report it to the authors of the backend",
        ) from error
    if not any(path.is_file() for path in out.rglob("*")):
        raise BuildError(
            f"backend `{target.backend}` wrote nothing for `{target.name}`", hint="this is a bug of the backend"
        )
    shutil.copyfile(model.file(SIGNATURE), out / SIGNATURE)
    return facts


def _buckets(
    model: Stored, target: Target, scheme: Scheme, found: tuple[Bucket, ...], out: Path, tuning: Path | None
) -> Mapping[str, JsonValue]:
    """An engine for each bucket, in a folder of its own; the backend meets models of fixed sizes."""
    source = backends.find(target.backend).source(target)
    warnings = dict.fromkeys(buckets.doubts(target, model.signature()))
    facts: dict[str, JsonValue] = {}
    for bucket in found:
        folder = out / bucket.folder
        folder.mkdir()
        with tempfile.TemporaryDirectory(dir=out) as place:
            fixed = fixing.fixed(model, source, bucket.sizes, Path(place) / "model")
            made = dict(_engine(fixed, target, scheme, folder, tuning))
        told = made.pop("warnings", [])
        warnings |= dict.fromkeys(map(str, told)) if isinstance(told, list) else {}
        facts[bucket.folder] = made
    signature = buckets.served(model.signature(), found)
    write_json(out / SIGNATURE, signature.plain())
    write_json(out / buckets.FILE, buckets.Index(buckets=found).plain())
    return {"buckets": facts, "warnings": list(warnings)}
