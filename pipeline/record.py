"""The registry, written: one release, all or nothing.

The order is what makes it so. DVC's files are written and the data pushed first; nobody looks at data that no
commit names. The commit and the tag are then made as objects without a name. They get their names in one atomic
push to origin and one transaction here. Whatever fails before that is undone from the journal.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import JsonValue

from pipeline import dvc, git, journal, manifest, tags
from pipeline.errors import ReleaseError
from pipeline.journal import Journal
from pipeline.registry import ORIGIN, copy_of_manifest, has_origin, origin_url, tags_of
from pipeline.store import write_whole
from pipeline.tags import Tag

_LOST = ("fetch first", "non-fast-forward", "already exists", "cannot lock ref", "failed to update ref", "stale info")


@dataclass(frozen=True)
class Step:
    """One DVC stage: a command, and the paths that it reads and makes, POSIX and relative to the workspace.

    Attributes:
        params: for each TOML, YAML or JSON file, the keys that the command depends on.
    """

    name: str
    cmd: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]
    params: Mapping[str, tuple[str, ...]]

    def entry(self) -> dict[str, JsonValue]:
        """This as dvc.yaml has it."""
        entry: dict[str, Any] = {"cmd": self.cmd}
        if self.deps:
            entry["deps"] = list(self.deps)
        if self.params:
            entry["params"] = [{file: list(keys)} for file, keys in self.params.items()]
        return entry | {"outs": list(self.outs)}


def step_name(*parts: str) -> str:
    """A stage name that DVC takes: letters, digits, ``-`` and ``_``; other characters become ``-``."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", "-".join(parts))


@dataclass(frozen=True)
class Turn:
    """The right to publish from a repository, until the context of `queue` ends.

    Attributes:
        finished: tag of a release whose publish was killed at the very end, and that is complete now.
        undone: tag of a release whose publish was killed earlier; it left nothing behind.
    """

    root: Path
    lock: int
    finished: str | None = None
    undone: str | None = None


@dataclass(frozen=True)
class Recorded:
    """A release that is published; `pushed_to` is the URL of origin, None in a repository without one."""

    tag: str
    commit: str
    pushed_to: str | None
    objects_pushed: int


@contextlib.contextmanager
def queue(root: Path) -> Iterator[Turn]:
    """Wait until nobody else publishes from this repository, then settle what a killed publish left.

    Choose the version inside: outside, another publish may take it.

    Raises:
        ReleaseError: `root` is not in a git work tree, or what was left can't be read.
    """
    git.top(root)
    with (journal.common_dir(root) / "exportyard-publish.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        left = journal.find(root)
        if left is None:
            yield Turn(root, lock.fileno())
        elif journal.settle(left, _origin(left.root), keep=True):
            yield Turn(root, lock.fileno(), finished=left.tag)
        else:
            yield Turn(root, lock.fileno(), undone=left.tag)


def record(
    turn: Turn, steps: Sequence[Step], recipe: str, manifest_text: str, version: str, message: str = ""
) -> Recorded:
    """Publish what lies in ``artifacts/<recipe>/``: DVC's files and remote, a commit, the tag, origin.

    Before the tag exists any failure leaves dvc.yaml, dvc.lock, the manifest's copy, the index and HEAD as they were.
    Git's hooks that check commits do not run, since only generated files are in this one; pre-push does.

    Args:
        steps: the whole pipeline of the recipe; stages of it that are no longer there are dropped from dvc.yaml.
        version: with or without ``v``; must be the manifest's.
        message: of the tag and the commit, after the first line.

    Raises:
        ReleaseError: no identity, branch, commit or DVC remote; the version exists; DVC or a push failed; or another
            publisher was first.
    """
    tag = _planned(turn.root, steps, recipe, manifest_text, version)
    origin = _origin(turn.root)
    note = journal.begin(turn.root, str(tag), git.branch(turn.root), git.head(turn.root), _touched(recipe, steps))
    try:
        count = _track(turn, steps, recipe, manifest_text)
        note = journal.save(_make_objects(note, f"Release {tag}\n\n{message}".strip()))
        _push(note, origin)
        journal.move_names(note)
        journal.refresh(note)
    except BaseException as error:
        if not journal.settle(note, origin, keep=False) or not isinstance(error, git.GitError):
            raise _explained(note, error) from error
    journal.close(note)
    return Recorded(str(tag), str(note.commit), origin_url(turn.root), count)


def _planned(root: Path, steps: Sequence[Step], recipe: str, manifest_text: str, version: str) -> Tag:
    """Check all that can be known before anything is touched."""
    tags.check_name(recipe)
    git.identity(root)
    git.check_idle(root)
    tag = Tag(recipe, tags.parse(version), git.folder_of(root))
    content = manifest.parse(manifest_text, "the manifest of the release")
    if (content.recipe, content.version) != (recipe, str(tag.version)):
        raise ReleaseError(f"the manifest says `{content.recipe}` {content.version}, expected `{recipe}` {tag.version}")
    taken = [known for known in tags_of(root) if (known.recipe, known.folder) == (tag.recipe, tag.folder)]
    if tag.version in {known.version for known in taken}:
        raise ReleaseError(f"`{tag}` exists already", hint="a release never changes; publish again with `--bump`")
    if not (root / ".dvc").is_dir():
        raise ReleaseError(f"`{root}` is not a DVC repository", hint=f"`exportyard init {root}` adds what is missing")
    names = [step.name for step in steps]
    if len(set(names)) < len(names) or any(step_name(name) != name for name in names):
        raise ReleaseError(f"stage names must be unique and made of letters, digits, `-` and `_`: {names}")
    outs = [out for step in steps for out in step.outs]
    if _folder(recipe) not in outs:
        raise ReleaseError(f"no step of the pipeline makes `{_folder(recipe)}`")
    missing = [out for out in outs if not (root / out).exists()]
    if missing:
        raise ReleaseError(f"`{missing[0]}` is missing", hint=f"`exportyard export {recipe}` makes it")
    return tag


def _folder(recipe: str) -> str:
    return f"artifacts/{recipe}/release"


def _touched(recipe: str, steps: Sequence[Step]) -> list[str]:
    """Every file that a publish may write: ours, DVC's, and the lists of ignored files that DVC keeps."""
    ignores = {(PurePosixPath(out).parent / ".gitignore").as_posix() for step in steps for out in step.outs}
    return ["dvc.yaml", "dvc.lock", copy_of_manifest(recipe), *sorted(ignores)]


def _track(turn: Turn, steps: Sequence[Step], recipe: str, manifest_text: str) -> int:
    """Write dvc.yaml, dvc.lock and the manifest's copy, fill DVC's cache and push it; returns the objects pushed."""
    entry = {"path": _folder(recipe), "type": "model", "desc": f"engines of {recipe}, one for each target"}
    try:
        answer = dvc.ask(
            turn.root,
            "record",
            keep_open=[turn.lock],
            stages={step.name: step.entry() for step in steps},
            artifacts={recipe: entry},
            below=f"artifacts/{recipe}/",
        )
    except dvc.DvcError as error:
        raise _dvc_failed(error) from error
    write_whole(turn.root / copy_of_manifest(recipe), manifest_text)
    return int(answer["pushed"])


def _dvc_failed(error: dvc.DvcError) -> ReleaseError:
    if error.kind == "no-remote":
        return ReleaseError(
            "this workspace has no default DVC remote, so nobody could download the release",
            hint="`dvc remote add -d storage /path/or/s3://bucket/path`, commit .dvc/config, then publish again",
        )
    if error.kind == "yaml":
        return ReleaseError(error.detail, hint="correct it, or get the last good one with `git checkout -- dvc.yaml`")
    return ReleaseError(
        f"DVC could not record or push the release; nothing was changed\n  {error.words}",
        hint="see with `dvc remote list` and `dvc push` that the remote is there and writable; then publish again",
    )


def _make_objects(note: Journal, message: str) -> Journal:
    """Write the commit and the annotated tag into git's object store; neither has a name yet."""
    root = note.root
    with tempfile.TemporaryDirectory() as scratch:
        # an index of our own: what the user has staged is neither committed nor disturbed
        own = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
        git.run(root, "read-tree", note.head, env=own)
        git.run(root, "update-index", "--add", "--", *note.changed(), env=own)
        tree = git.run(root, "write-tree", env=own)
    signing = ["-S"] if _wants_signature(root) else []
    commit = git.run(root, "commit-tree", *signing, tree, "-p", note.head, stdin=message + "\n")
    lines = [f"object {commit}", "type commit", f"tag {note.tag}", f"tagger {git.identity(root)}", "", message, ""]
    return note.model_copy(update={"commit": commit, "tag_object": git.run(root, "mktag", stdin="\n".join(lines))})


def _wants_signature(root: Path) -> bool:
    try:
        return git.run(root, "config", "--type=bool", "commit.gpgsign") == "true"
    except git.GitError:
        return False


def _origin(root: Path) -> str | None:
    return ORIGIN if has_origin(root) else None


def _push(note: Journal, origin: str | None) -> None:
    """Give commit and tag their names on origin, both or neither."""
    if origin is None:
        return
    names = [f"{note.commit}:{note.branch}", f"{note.tag_object}:refs/tags/{note.tag}"]
    git.run(note.root, "push", "--quiet", "--atomic", origin, *names)


def _explained(note: Journal, error: BaseException) -> BaseException:
    if not isinstance(error, git.GitError):
        return error
    if "push" in error.command and any(sign in error.stderr for sign in _LOST):
        return ReleaseError(
            f"origin has commits or tags that are not here, so `{note.tag}` was not published; nothing was changed",
            hint="`git pull --rebase --tags`, then publish again",
        )
    if "push" in error.command:
        return ReleaseError(
            f"the push of `{note.tag}` to origin failed; nothing was changed\n  {_last(error)}",
            hint="see with `git push --dry-run` that origin can be reached and takes pushes; then publish again",
        )
    return ReleaseError(
        f"git could not record `{note.tag}`; nothing was changed\n  {_last(error)}",
        hint="see with `git status` that nothing else works in this repository; then publish again",
    )


def _last(error: git.GitError) -> str:
    return error.said[:300]
