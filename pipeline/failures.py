"""What failed: whether that keeps a release back, and how to see it again on one's own machine."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from pipeline import git, registry
from pipeline.errors import BuildError, ExportyardError, ParityError

if TYPE_CHECKING:
    from pipeline.job import Job
    from pipeline.run import Verdict

_SHOWN = 12  # characters of a commit or digest


@dataclass(frozen=True)
class Failure:
    """One target that failed.

    Attributes:
        stage: ``engine``, ``parity`` or ``latency``.
        command: what shows it again.
        explain: what names the operator at fault; empty where the engine was not compared.
        inputs: what the command must find to do the same: a commit, and the checkpoint's digest.
    """

    target: str
    stage: str
    reason: str
    command: str
    inputs: str
    explain: str = ""

    def plain(self) -> dict[str, str]:
        """This as plain data."""
        return asdict(self)

    @property
    def again(self) -> str:
        """How to see it again, in one line."""
        why = f"; where it departs: `{self.explain}`" if self.explain else ""
        return f"{self.stage} of `{self.target}` again: `{self.command}` ({self.inputs}){why}"


def of(job: Job, verdicts: Sequence[Verdict]) -> list[Failure]:
    """Every target that failed, in the order of `verdicts`."""
    failed = [verdict for verdict in verdicts if verdict.status == "failed"]
    inputs = _inputs(job) if failed else ""
    return [_failure(job, one, inputs) for one in failed]


def blocking(verdicts: Sequence[Verdict], require: Literal["all"] | Sequence[str]) -> Mapping[str, str]:
    """Targets that keep a release back, and why; see `Recipe.require`."""
    if require == "all":
        return {one.target.name: one.reason for one in verdicts if one.status == "failed"}
    known = {one.target.name: one for one in verdicts}
    found = {name: known[name].reason if name in known else "it was not asked for" for name in require}
    return {name: reason for name, reason in found.items() if name not in known or known[name].status != "passed"}


def _failure(job: Job, verdict: Verdict, inputs: str) -> Failure:
    name, stage = verdict.target.name, _stage(verdict)
    explain = _command(job, "explain", name) if stage == "parity" else ""
    return Failure(name, stage, verdict.reason, _command(job, "export", name), inputs, explain)


def _stage(verdict: Verdict) -> str:
    if verdict.exit_code == ParityError.exit_code:
        return "parity"
    return "engine" if verdict.exit_code == BuildError.exit_code or not verdict.candidates else "latency"


def _command(job: Job, verb: str, target: str) -> str:
    words = ["exportyard", verb, job.recipe.name, "--target", target]
    given = job.given_checkpoint
    if given is not None:
        root = job.workspace.root
        words += ["--checkpoint", str(given.relative_to(root) if given.is_relative_to(root) else given)]
    return shlex.join(words)


def _inputs(job: Job) -> str:
    root = job.workspace.root
    try:
        commit = f"commit {git.head(root)[:_SHOWN]}"
        if registry.dirty_files(root, job.recipe.name):
            commit += " and what is not committed"
    except ExportyardError:
        commit = "no commit"
    checkpoint = job.made.get("checkpoint")
    file = None if checkpoint is None else checkpoint.stored.artifact.inputs.get("file")
    return commit if file is None else f"{commit}, checkpoint sha256 {file[:_SHOWN]}"
