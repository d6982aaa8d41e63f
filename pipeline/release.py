"""Publishing what a job made: the whole pipeline as DVC stages, the release folder, and one record of both."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import JsonValue

from pipeline import (
    attest,
    candidates,
    difference,
    digest,
    failures,
    git,
    manifest,
    mirror,
    recipes,
    record,
    registry,
    store,
    tags,
    trust,
    vectors,
)
from pipeline.errors import ReleaseError
from pipeline.job import STATIC_SCHEMES, Job
from pipeline.manifest import Manifest
from pipeline.record import Step, step_name
from pipeline.store import Key, Made
from pipeline.tags import Bump
from pipeline.types import Chosen, Scheme, Target, Tried

if TYPE_CHECKING:
    from pipeline.run import Verdict


@dataclass(frozen=True)
class Published:
    """A release that was made; or, when `fresh` is False, the one that is there already and has the same content.

    Attributes:
        registry: the static registry that holds it, too; None if the workspace has none.
    """

    version: str
    tag: str
    manifest: Path
    fresh: bool
    registry: str | None = None


def publish(
    job: Job,
    verdicts: Sequence[Verdict],
    bump: Bump = "patch",
    *,
    allow_dirty: bool = False,
    allow_regression: bool = False,
) -> Published:
    """Publish the engines that were chosen, all or nothing; a release like the newest one is not made again.

    Raises:
        ReleaseError: a target that is required did not pass, none passed, the recipe's code isn't committed, it
            is worse than the newest release by more than the recipe admits, or git or DVC refused.
        UnavailableError: it is published, but the workspace's static registry can't be written.
    """
    made = _recorded(job, verdicts, bump, allow_dirty=allow_dirty, allow_regression=allow_regression)
    return replace(made, registry=mirror.after_publish(job.workspace.root, job.recipe.name, made.version))


def _recorded(
    job: Job, verdicts: Sequence[Verdict], bump: Bump, *, allow_dirty: bool, allow_regression: bool
) -> Published:
    """Publish in git and DVC."""
    chosen = _chosen(verdicts, job.recipe.require)
    skipped = {found.target.name: f"{found.status}: {found.reason}" for found in verdicts if found.status != "passed"}
    root, recipe = job.workspace.root, job.recipe.name
    with store.explaining(job.folder / "release"), record.queue(root) as turn:
        dirty = registry.dirty_files(root, recipe, recipes.code_of(job.recipe))
        if dirty and not allow_dirty:
            raise ReleaseError(
                f"`{dirty[0]}` is not committed{f', nor are {len(dirty) - 1} other files' if len(dirty) > 1 else ''}, "
                "so nobody could tell what the release was made from",
                hint="`git add` and `git commit` first, or `--allow-dirty` to release it all the same",
            )
        existing = registry.versions(root, recipe)
        for release in [release for release in existing if not release.withdrawn][:1]:
            if release.manifest is not None and _is_same(release.manifest, job, chosen):
                path = root / registry.copy_of_manifest(recipe)
                return Published(str(release.version), release.tag, path, fresh=False)
        version = str(tags.next_version([release.version for release in existing], bump))
        with _kept(job.folder / "release", {str(release.version) for release in existing}):
            tried = {
                found.target.name: candidates.numbers(candidates.of(job, found), found.target) for found in verdicts
            }
            made = _lay_out(job, chosen, skipped, tried, version, git.head(root), dirty=bool(dirty))
            path = made.stored.file(manifest.FILE)
            accepted = _regressions(job, existing, path)
            if accepted and not allow_regression:
                raise _refused(version, accepted)
            message = "\n".join(f"{item.target.name}: {item.scheme}" for item in chosen)
            message += "".join(f"\naccepted regression: {text}" for text in accepted)
            done = record.record(turn, steps(job, chosen), recipe, path.read_text(), version, message)
        return Published(version, done.tag, path, fresh=True)


def _regressions(job: Job, existing: Sequence[registry.Release], path: Path) -> list[str]:
    """What the manifest in `path` loses against the newest release, beyond what the recipe admits."""
    made = manifest.parse(path.read_text(), str(path))
    standing = [release for release in existing if not release.withdrawn and not release.version.label]
    before = standing[0].manifest if standing else None
    if before is None:
        return []
    higher = job.recipe.evaluation.higher_is_better
    return difference.between(before, made, job.recipe.regression, higher_is_better=higher).regressions


def _refused(version: str, regressions: Sequence[str]) -> ReleaseError:
    lines = "\n".join(f"  {text}" for text in regressions[:5])
    more = f"\n  and {len(regressions) - 5} more" if len(regressions) > 5 else ""
    return ReleaseError(
        f"nothing is published: {version} would be worse than the release before\n{lines}{more}",
        hint="`--allow-regression` publishes it all the same; [regression] in recipe.toml says how much is admitted",
    )


@contextlib.contextmanager
def _kept(folder: Path, published: Collection[str]) -> Iterator[None]:
    """If what follows fails, `folder` is again what it was: the last release, which dvc.lock still names.

    Likewise if a publish was killed on the way; `published` are the versions that were not.
    """
    kept = folder.with_name(f".{folder.name}.kept")
    left = store.peek(folder)
    if kept.exists() and left is not None and left.facts.get("version") not in published:
        shutil.rmtree(folder)
        kept.rename(folder)
    shutil.rmtree(kept, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, kept, copy_function=os.link)  # links: both are only ever replaced whole
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if kept.exists():
            kept.rename(folder)
        raise
    shutil.rmtree(kept, ignore_errors=True)


def _chosen(verdicts: Sequence[Verdict], require: Literal["all"] | Sequence[str]) -> list[Chosen]:
    stopped = failures.blocking(verdicts, require)
    if stopped:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in [*stopped.items()][:5])
        if require == "all":
            what = f"since {len(stopped)} of {len(verdicts)} targets failed"
            hint = "correct them, or name the targets to release with `--target T`"
        else:
            what = f"since {len(stopped)} of {len(require)} targets that the recipe requires did not pass"
            hint = "correct them, or take them out of `require` in recipe.toml"
        raise ReleaseError(f"nothing is published, {what}:\n{lines}", hint=hint)
    chosen = [found.chosen() for found in verdicts if found.status == "passed"]
    if not chosen:
        raise ReleaseError(
            "nothing to publish: no target could be built and verified on this host",
            hint="`exportyard targets` says why for each",
        )
    return chosen


def _is_same(found: Manifest, job: Job, chosen: Sequence[Chosen]) -> bool:
    """Whether a release would be a repetition. With a key, only one that this key has signed is."""
    key = trust.signing_key()
    signed = key is None or found.signer == trust.signer(key)
    return signed and _content(found) == _planned_content(job, chosen)


def _content(found: Manifest) -> dict[str, object]:
    """What makes two releases the same: the model, the data, and every engine's bytes and the budget that it kept."""
    engines = {
        name: [
            engine.scheme,
            engine.parity.metric.budget,
            sorted((file.path.removeprefix(manifest.folder_of(name)), file.sha256) for file in engine.files),
        ]
        for name, engine in found.engines.items()
    }
    return {"checkpoint": dict(found.checkpoint), "data": found.data, "engines": engines}


def _planned_content(job: Job, chosen: Sequence[Chosen]) -> dict[str, object]:
    checkpoint = job.checkpoint().stored.artifact.files
    engines = {
        item.target.name: [
            item.scheme,
            item.parity.metric.budget,
            sorted((name, fact.sha256) for name, fact in item.engine.artifact.files.items()),
        ]
        for item in chosen
    }
    return {
        "checkpoint": {name: fact.sha256 for name, fact in checkpoint.items()},
        "data": job.data().stored.digest,
        "engines": engines,
    }


def _lay_out(
    job: Job,
    chosen: Sequence[Chosen],
    skipped: Mapping[str, str],
    tried: Mapping[str, tuple[Tried, ...]],
    version: str,
    commit: str,
    *,
    dirty: bool,
) -> Made:
    program, checkpoint, data = job.program().stored, job.checkpoint().stored, job.data().stored
    inputs = {item.target.name: item.engine.digest for item in chosen}
    inputs |= {"program": program.digest, "checkpoint": checkpoint.digest, "data": data.digest}
    evidence: list[object] = [[item.scheme, item.reason, item.parity.plain(), item.latency.plain()] for item in chosen]
    evidence.append({name: [one.plain() for one in found] for name, found in tried.items()})
    config: dict[str, JsonValue] = {"version": version, "commit": commit, "dirty": dirty, "skipped": dict(skipped)}
    key, source = trust.signing_key(), attest.public_uri(registry.origin_url(job.workspace.root))
    signer = None if key is None else trust.signer(key)
    config |= {"source": source, "signer": signer}

    def work(out: Path) -> Mapping[str, JsonValue]:
        from pipeline.stages.publish import lay_out

        models = (program, checkpoint, data)
        facts = lay_out(
            job.recipe,
            chosen,
            skipped,
            tried,
            *models,
            version,
            commit,
            dirty,
            out,
            beside=attest.names(key),
            signer=signer,
        )
        attest.write(out, source, key, _tools(job))
        return facts

    return store.make(
        job.folder / "release", Key("release", inputs, config | {"evidence": digest.of_json(evidence)}), work
    )


def _tools(job: Job) -> set[tuple[str, str]]:
    """Name and version of every tool that decided the bytes of a step on the way."""
    return {tool for made in job.made.values() for tool in made.stored.artifact.tools.items()}


def steps(job: Job, chosen: Sequence[Chosen]) -> list[Step]:
    """The chain of one recipe as DVC stages: the command line's own commands, over the same folders."""
    recipe, name = job.recipe, job.recipe.name
    calibration = recipe.calibration.data if recipe.calibration else None
    feeds, metric = (recipe.feeds,), (recipe.evaluation.metric,)
    named = [recipe.checkpoint] if recipe.checkpoint and job.given_checkpoint is None else []
    found = [
        _step(job, "checkpoint", [*_files(job, *named), *_sources(job, recipe.train)]),
        _step(
            job,
            "data",
            [*_files(job, calibration, recipe.evaluation.data), *_sources(job, calibration, recipe.evaluation.data)],
        ),
        _step(job, "program", [_out(name, "checkpoint"), *_sources(job, recipe.factory, *feeds)]),
        _step(job, "onnx/fp32", [_out(name, "program"), *_sources(job, recipe.translations)]),
    ]
    tried = {step.partition("/")[2] for step in job.made if step.startswith("onnx/")} - {"fp32"}
    if "statistics" in job.made:
        found.append(_step(job, "statistics", [_out(name, "onnx/fp32"), _out(name, "data")]))
    for scheme in sorted(tried):
        measured = [*(_out(name, step) for step in ("statistics", "program", "data")), *_sources(job, *metric)]
        found.append(
            _step(job, f"onnx/{scheme}", [_out(name, "onnx/fp32"), *(measured if scheme in STATIC_SCHEMES else [])])
        )
    for step in sorted(step for step in job.made if step.startswith("programs/")):
        found.append(_step(job, step, [_out(name, "program"), _out(name, "data"), *_sources(job, *metric)]))
    built = [target for target in job.targets if any(step.startswith(f"engine/{target.name}/") for step in job.made)]
    for target in built:
        found += _target_steps(job, target, [*_sources(job, *metric, *feeds), *_vectors(job)])
    evidence = [
        _out(name, f"{kind}/{item.built_for or item.target.name}")
        for item in chosen
        for kind in ("engine", "parity", "latency")
    ]
    return [*found, _step(job, "release", evidence)]


def _target_steps(job: Job, target: Target, code: list[str]) -> list[Step]:
    name = job.recipe.name
    forms = [step for scheme in target.schemes for step in _forms(job, target, scheme)]
    graphs = [_out(name, step) for step in forms if step in job.made]
    row = {"targets/targets.toml": (f"targets.{target.name}",)}
    sources, found = [*graphs, _out(name, "program")], []
    if any(step.startswith(f"tuning/{target.name}/") for step in job.made):
        found.append(_step(job, f"tuning/{target.name}", sources, row))
        sources.append(_out(name, f"tuning/{target.name}"))
    found.append(_step(job, f"engine/{target.name}", sources, row))
    if any(step.startswith(f"parity/{target.name}/") for step in job.made):
        inputs = [_out(name, f"engine/{target.name}"), *graphs, _out(name, "program"), _out(name, "data"), *code]
        found.append(_step(job, f"parity/{target.name}", inputs, row))
    if any(step.startswith(f"audit/{target.name}/") for step in job.made):
        found.append(_step(job, f"audit/{target.name}", [_out(name, f"engine/{target.name}"), *graphs]))
    if f"latency/{target.name}" in job.made:
        found.append(_step(job, f"latency/{target.name}", [_out(name, f"engine/{target.name}"), _out(name, "program")]))
    return found


def _forms(job: Job, target: Target, scheme: Scheme) -> list[str]:
    """The folder with the model in this numeric form."""
    found = ["onnx/fp32"] if scheme == "fp32" else [step for step, _ in job.form_steps(target, scheme)]
    return found[-1:]


def _step(job: Job, step: str, deps: Sequence[str], params: Mapping[str, tuple[str, ...]] | None = None) -> Step:
    name = job.recipe.name
    settings = f"recipes/{name}/recipe.toml"
    return Step(
        name=step_name(name, step),
        cmd=f"exportyard make {name} {step}",
        deps=tuple(sorted({settings, *deps})) if step != "release" else tuple(sorted(set(deps))),
        outs=(_out(name, step),),
        params=params or {},
    )


def _out(recipe: str, step: str) -> str:
    return f"artifacts/{recipe}/{step}"


def _sources(job: Job, *sources: str | None) -> list[str]:
    return [path.relative_to(job.recipe.root).as_posix() for path in recipes.code_files(job.recipe, *sources)]


def _vectors(job: Job) -> list[str]:
    """Kept inputs, relative to the workspace."""
    return [path.relative_to(job.recipe.root).as_posix() for path in vectors.files(job.recipe)]


def _files(job: Job, *names: str | None) -> list[str]:
    """Settings that name a file of the workspace, relative to the workspace."""
    paths = [(job.recipe.folder / name).resolve() for name in names if name is not None and not recipes.is_code(name)]
    root = job.recipe.root
    return [path.relative_to(root).as_posix() for path in paths if path.is_file() and path.is_relative_to(root)]
