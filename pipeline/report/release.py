"""What has changed since the last release; and where all of it comes from."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline import difference, evidence, git, host, recipes, registry
from pipeline.difference import Pair
from pipeline.errors import ExportyardError, first_line
from pipeline.manifest import Engine, Manifest
from pipeline.report.data import Changed, LastRelease, Made, Provenance, Side, Since

if TYPE_CHECKING:
    from pipeline.job import Job
    from pipeline.run import Verdict

SHARED = ("checkpoint", "data", "program", "statistics")


def since(job: Job, verdicts: Sequence[Verdict]) -> LastRelease:
    """The newest release beside what would be released now. No git and no release are facts, and not failures."""
    try:
        last = registry.newest(job.workspace.root, job.recipe.name)
    except ExportyardError as error:
        return LastRelease(told=f"not compared with a release: {first_line(error)}")
    if last is None:
        return LastRelease(told="none, this would be the first")
    if last.manifest is None:
        return LastRelease(tag=last.tag, told=f"not compared with {last.tag}: {last.problem}")
    now = {one.target.name: evidence.engine(one.chosen()) for one in verdicts if one.status == "passed"}
    skipped = {one.target.name: f"{one.status}: {one.reason}" for one in verdicts if one.status != "passed"}
    higher = job.recipe.evaluation.higher_is_better
    pairs = difference.pairs(last.manifest.engines, now, skipped, job.recipe.regression, higher_is_better=higher)
    changes = _changes(job, last.manifest)
    return LastRelease(
        tag=last.tag,
        version=str(last.version),
        date=last.date,
        told=_told(last.tag, pairs, changes),
        judged=job.recipe.regression is not None,
        changes=changes,
        targets=tuple(_pair(one) for one in pairs),
    )


def _told(tag: str, pairs: Sequence[Pair], changes: Sequence[Changed]) -> str:
    worse = sum(bool(pair.regressions) for pair in pairs)
    if worse:
        return f"{worse} of {len(pairs)} targets are worse than in {tag} by more than the recipe admits"
    if all(pair.same for pair in pairs):
        return f"the same engines as in {tag}"
    gone, new = (sum(getattr(pair, side) is None for pair in pairs) for side in ("after", "before"))
    other = sum(not pair.same for pair in pairs) - gone - new
    parts = [f"{count} {what}" for count, what in ((other, "changed"), (new, "new"), (gone, "gone")) if count]
    why = f"; what went into them differs in {len(changes)} things" if changes else ""
    return f"since {tag}: engines of {', '.join(parts)} of {len(pairs)} targets{why}"


def _changes(job: Job, before: Manifest) -> tuple[Changed, ...]:
    checkpoint, data, program = (job.made[step].stored for step in ("checkpoint", "data", "program"))
    weights = {name: fact.sha256 for name, fact in checkpoint.artifact.files.items()}
    found = difference.changed("checkpoint", before.checkpoint, weights)
    found += difference.changed("", {"data": before.data}, {"data": data.digest})
    found += difference.changed("tool", before.tools, program.artifact.tools)
    return tuple(Changed(what=one.what.strip(), before=one.before, after=one.after) for one in found)


def _pair(one: Pair) -> Since:
    old, new = one.before, one.after
    both = difference.both_timed(old, new) if old is not None and new is not None else (None, None)
    return Since(
        target=one.target,
        before=None if old is None else _side(old, both[0]),
        after=None if new is None else _side(new, both[1]),
        same=one.same,
        fall=one.fall,
        time_ratio=one.slower,
        size_ratio=one.larger,
        not_compared=_not_compared(old, new) if one.slower is None else None,
        regressions=one.regressions,
    )


def _side(engine: Engine, median_ms: float | None) -> Side:
    size = sum(file.size_bytes for file in engine.files)
    return Side(scheme=engine.scheme, metric=engine.parity.metric.engine, size_bytes=size, median_ms=median_ms)


def _not_compared(old: Engine | None, new: Engine | None) -> str | None:
    if old is None or new is None:
        return None
    if not old.latency.rows or not new.latency.rows:
        return "not timed in both"
    if old.latency.cpu != new.latency.cpu:
        return f"timed on another CPU then ({old.latency.cpu})"
    return "timed at other sizes then"


def provenance(job: Job, verdicts: Sequence[Verdict]) -> Provenance:
    """What went in, what made it, and where."""
    root = job.workspace.root
    try:
        commit = git.head(root)
        dirty = bool(registry.dirty_files(root, job.recipe.name, recipes.code_of(job.recipe)))
    except ExportyardError:
        commit, dirty = None, True
    checkpoint = job.made.get("checkpoint")
    forms = sorted(step for step in job.made if step.startswith(("onnx/", "programs/")))
    engines = [f"engine/{one.built_for or one.target.name}/{one.scheme}" for one in verdicts if one.engine is not None]
    steps = dict.fromkeys(step for step in (*SHARED, *forms, *engines) if step in job.made)
    made = [
        Made(step=step, digest=found.digest, tools=dict(sorted(found.artifact.tools.items())))
        for step in steps
        for found in [job.made[step].stored]
    ]
    return Provenance(
        commit=commit,
        dirty=dirty,
        checkpoint={name: fact.sha256 for name, fact in checkpoint.stored.artifact.files.items()} if checkpoint else {},
        made=tuple(made),
        host=platform.node(),
        cpu=host.cpu_name(),
        threads=host.cpu_count(),
        system=f"{host.system()} {host.machine()}",
        python=platform.python_version(),
        exportyard=host.version("exportyard") or "",
    )
