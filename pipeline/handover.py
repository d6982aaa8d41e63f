"""What passes between the process that leads an export and the workers that build its targets.

The leader names a row, a commit and the artifacts to build from; the worker answers with a verdict and the artifacts
that prove it. Files travel through the `Exchange`, so that what is said here is small: names and digests.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError

from pipeline import backends, digest, git, host, recipes, registry, store, timeline, turns, vectors
from pipeline.errors import StoreError, WorkspaceError, first_line
from pipeline.exchange import AbsentError, Exchange
from pipeline.job import TUNING, Job, Maker, Work
from pipeline.run import Status, Verdict
from pipeline.store import Key, Made
from pipeline.timeline import StepTime
from pipeline.types import Audit, Frozen, LatencyReport, ParityReport, Scheme, Target
from pipeline.workspace import Workspace

_FULL_BYTES = 1_000_000

log = logging.getLogger("pipeline.handover")


@dataclass
class SharedMaker(Maker):
    """Makes what no worker has made yet: it looks into the exchange first, and hands over what it makes.

    While it makes something, nothing is measured on this machine; while it measures, nothing else is done.

    Attributes:
        references: of all that went through this maker, by folder.
    """

    exchange: Exchange
    references: dict[Path, str] = field(default_factory=dict)

    def make(self, folder: Path, key: Key, work: Work) -> Made:
        """See `store.make`."""

        def in_turn(out: Path) -> Mapping[str, JsonValue]:
            with turns.on_this_machine(alone=key.kind == "latency"):
                return work(out)

        made = self._found(folder, key) or super().make(folder, key, in_turn)
        if folder not in self.references:
            self.references[folder] = self.exchange.put(made.stored)
        return made

    def _found(self, folder: Path, key: Key) -> Made | None:
        stored, _ = store.state_of(folder, key)
        if stored is not None:
            return Made(stored, "cached")
        reference = self.exchange.reference(key)
        if reference is None:
            return None
        try:
            if self.exchange.description(reference).key != key.digest:
                return None
            stored = self.exchange.get(reference, folder)
        except AbsentError as error:
            log.warning("%s is made again: %s", folder.name, error.message)
            return None
        self.references[folder] = reference
        return Made(stored, "cached")


# --- from the leader to a worker -----------------------------------------------------------------------------------


def rows(job: Job, target: Target) -> list[Target]:
    """The rows that a worker builds when it is asked for `target`: itself, or those among which it chooses."""
    known = {one.name: one for one in job.targets}
    return [known[name] for name in target.candidates] if target.candidates else [target]


def inputs(job: Job, target: Target) -> dict[str, Made]:
    """What a worker needs to build `target`, by step: of that, what this job has made."""
    steps = ["data", "program", "onnx/fp32"]
    for row in rows(job, target):
        for scheme in row.schemes:
            steps += [step for step, _ in job.form_steps(row, scheme) if step != "statistics"]
    return {step: job.made[step] for step in dict.fromkeys(steps) if step in job.made}


def request(job: Job, target: Target) -> str:
    """Digest of all that the leader knows to decide the answer; equal requests need to be made once.

    What only the worker knows (its tools, its processor) is not in it.
    """
    recipe = job.recipe
    code = recipes.code_digest(recipe, recipe.factory, recipe.feeds, recipe.translations, recipe.evaluation.metric)
    built = rows(job, target)
    records = {name for row in built if (name := backends.tuning_file(row)) is not None}
    shared = [job.workspace.root / TUNING / name for name in sorted(records)]
    return digest.of_json(
        {
            "exportyard": host.versions(["exportyard"]),
            "recipe": recipe.model_dump(mode="json", exclude={"summary", "targets", "require", "regression"}),
            "code": code,
            "vectors": vectors.digests(recipe),
            "rows": [row.model_dump(mode="json", exclude={"summary", "limits"}) for row in (target, *built)],
            "records": [digest.of_file(path) for path in shared if path.is_file()],
            "inputs": {step: made.stored.digest for step, made in inputs(job, target).items()},
        }
    )


def check_code(job: Job, code: Sequence[Path]) -> str:
    """The commit that workers are to check out.

    Args:
        job: what is exported.
        code: files beside the recipe's folder that it imports, relative to the workspace.

    Raises:
        WorkspaceError: what is to be built isn't committed, or the repository's origin doesn't have it.
        ReleaseError: no git repository, or nothing committed.
    """
    root = job.workspace.root
    commit = git.head(root)
    dirty = registry.dirty_files(root, job.recipe.name, code)
    if dirty:
        raise WorkspaceError(
            f"`{dirty[0]}` is not committed, and workers build what is committed",
            hint="`git add` and `git commit` it; or `-p where=here` to build everything in one process",
        )
    if registry.has_origin(root) and not git.run(root, "branch", "--remotes", "--contains", commit):
        raise WorkspaceError(
            f"the commit {commit[:10]} is not at the remote `origin`, from which workers get it",
            hint="`git push`; or `-p where=here` to build everything in one process",
        )
    return commit


@contextlib.contextmanager
def scratch(clone: Path, run: str) -> Iterator[Path]:
    """A place for the files of one run on this machine; they are gone when the context ends.

    If this process is killed, they are removed by the next run here.
    """
    folder = clone / ".scratch" / "runs" / run
    for left in folder.parent.glob("*.lock"):
        if turns.is_free(left):  # the process that held it was killed
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            left.unlink(missing_ok=True)
    lock = folder.with_suffix(".lock")
    with turns.only_one(lock, lambda: None):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def check_out(clone: Path, commit: str, folder: Path) -> Workspace:
    """The workspace of `clone` as it is in `commit`, written below `folder`; the clone's own files stay as they are.

    Args:
        clone: a workspace on the worker's machine, in a git repository of which the worker's owner knows what is in it.
        commit: fetched from its remote `origin` if the clone lacks it.
        folder: empty or missing.

    Raises:
        WorkspaceError: neither the clone nor its origin has this commit.
        StoreError: it can't be written, as when the disk is full.
    """
    if not _has(clone, commit):
        with turns.only_one(clone / ".scratch" / "fetch.lock", lambda: None):
            _fetch(clone, commit)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as aside:
        index = {"GIT_INDEX_FILE": os.path.join(aside, "index")}  # noqa: PTH118
        top = git.top(clone)
        try:
            git.run(top, "read-tree", commit, env=index)
            git.run(top, "checkout-index", "--all", "--force", f"--prefix={folder}/", env=index)
        except git.GitError as error:
            if shutil.disk_usage(folder).free < _FULL_BYTES:  # git doesn't say why it can't write
                raise store.explained(OSError(errno.ENOSPC, "No space left on device"), folder) from error
            raise StoreError(
                f"can't write the commit {commit[:10]} below `{folder}`: {error.said}",
                hint=f"see that the clone `{clone}` is whole (`git fsck`)",
            ) from error
    return Workspace(folder / git.folder_of(clone))


def _has(clone: Path, commit: str) -> bool:
    return git.succeeds(clone, "cat-file", "-e", f"{commit}^{{commit}}")


def _fetch(clone: Path, commit: str) -> None:
    said = "it has no remote `origin`"
    if registry.has_origin(clone):
        try:
            git.run(clone, "fetch", "--quiet", registry.ORIGIN)
            said = "nor has its remote `origin`"
        except git.GitError as error:
            said = error.said
    if not _has(clone, commit):
        raise WorkspaceError(
            f"the worker's workspace `{clone}` lacks the commit {commit[:10]}: {said}",
            hint="push the commit, and let the worker's workspace be a clone of the same repository",
        )


# --- from a worker to the leader -----------------------------------------------------------------------------------


class Outcome(Frozen):
    """What a worker found out about one row.

    Attributes:
        verdict: see `_Verdict`.
        steps: what it made, as the exchange names it.
        worker: which machine it was, for people.
        times: when and how long it was at work on these steps.
    """

    verdict: _Verdict
    steps: dict[str, str]
    worker: str
    times: tuple[StepTime, ...] = ()


class _Verdict(Frozen):
    """`run.Verdict` as plain data; engine, parity and latency are named by their steps."""

    target: str
    status: Status
    reason: str
    scheme: Scheme | None
    built: str | None
    parity: ParityReport | None
    latency: LatencyReport | None
    candidates: dict[Scheme, ParityReport]
    left_out: dict[Scheme, str]
    audits: dict[Scheme, Audit]
    exit_code: int
    rows: tuple[_Verdict, ...]
    built_for: str | None


Outcome.model_rebuild()


def outcome(job: Job, found: Verdict, maker: SharedMaker, given: Mapping[str, Made]) -> Outcome:
    """What a worker tells about one row: of all that `job` made, what it wasn't `given`."""
    steps = {step: maker.references[job.folder / step] for step in job.made if step not in given}
    times = timeline.read(job.folder, {step: job.made[step].stored.artifact.key for step in steps})
    return Outcome(verdict=_plain(job, found), steps=steps, worker=timeline.here(), times=tuple(times))


def _plain(job: Job, found: Verdict) -> _Verdict:
    engine = found.engine
    place = f"{job.workspace.root}/"  # gone when somebody reads this
    return _Verdict(
        target=found.target.name,
        status=found.status,
        reason=found.reason.replace(place, ""),
        scheme=found.scheme,
        built=None if engine is None else engine.path.relative_to(job.folder).as_posix(),
        parity=found.parity,
        latency=found.latency,
        candidates=dict(found.candidates),
        left_out={scheme: reason.replace(place, "") for scheme, reason in found.left_out.items()},
        audits=dict(found.audits),
        exit_code=found.exit_code,
        rows=tuple(_plain(job, one) for one in found.rows),
        built_for=found.built_for,
    )


def accept(job: Job, target: Target, found: Outcome, exchange: Exchange) -> Verdict:
    """A worker's verdict on `target`, after everything that it made was placed where this job would have made it.

    Raises:
        AbsentError: the exchange lacks some of it.
        UnavailableError: the remote can't be reached.
    """
    for step, reference in found.steps.items():
        job.made[step] = Made(exchange.get(reference, job.folder / safe(step)), "built")
    timeline.note(job.folder, found.times)
    return _restored(job, target, found.verdict)


def recall(job: Job, target: Target, found: Outcome) -> Verdict | None:
    """As `accept`, if all of it lies here already and is whole; None if not."""
    made = {}
    for step in found.steps:
        try:
            made[step] = Made(store.load(job.folder / safe(step)), "cached")
        except StoreError:
            return None
    job.made |= made
    return _restored(job, target, found.verdict)


def safe(step: str) -> str:
    """`step`, unless it would lead out of the recipe's folder."""
    if step.startswith("/") or ".." in step.split("/"):
        raise StoreError(f"a worker named the step `{step}`, which is none")
    return step


def _restored(job: Job, target: Target, found: _Verdict) -> Verdict:
    known = {one.name: one for one in (target, *job.targets)}
    row = known[found.target]
    if found.built_for is not None:  # it chose, and ships what was built for another row
        row = known[found.built_for].model_copy(update={"name": row.name, "summary": row.summary, "pool": row.pool})
    return Verdict(
        row,
        found.status,
        found.reason,
        found.scheme,
        None if found.built is None else job.made[found.built].stored,
        found.parity,
        found.latency,
        found.candidates,
        found.left_out,
        found.audits,
        found.exit_code,
        tuple(_restored(job, target, one) for one in found.rows),
        found.built_for,
    )


# --- what was found out before --------------------------------------------------------------------------------------


class _Kept(Frozen):
    request: str
    outcome: Outcome


def _place(job: Job, target: Target) -> Path:
    return job.folder / ".workers" / f"{target.name}.json"


def keep(job: Job, target: Target, asked: str, found: Outcome) -> None:
    """Remember the answer to the request `asked`."""
    store.write_whole(_place(job, target), _Kept(request=asked, outcome=found).model_dump_json())


def kept(job: Job, target: Target, asked: str) -> Outcome | None:
    """The answer to the same request when it was asked last, if it was a good one."""
    try:
        found = _Kept.model_validate_json(_place(job, target).read_text())
    except (OSError, ValidationError, UnicodeDecodeError):
        return None
    good = found.request == asked and found.outcome.verdict.status in ("passed", "not verified")
    return found.outcome if good else None


def known(job: Job, target: Target, asked: str) -> tuple[Verdict, str] | None:
    """What `kept` has, and whose answer it was, if all that it says lies here."""
    outcome = kept(job, target, asked)
    verdict = None if outcome is None else recall(job, target, outcome)
    return None if outcome is None or verdict is None else (verdict, outcome.worker)


def read(note: Mapping[str, Any]) -> Outcome:
    """The outcome that a worker has left as a note.

    Raises:
        StoreError: it is none, as one of another version of exportyard.
    """
    try:
        return Outcome.model_validate(note)
    except ValidationError as error:
        raise StoreError(
            f"a worker's answer can't be read: {first_line(error)}",
            hint="install the same version of exportyard on all machines",
        ) from None
