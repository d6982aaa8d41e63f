"""What a publish is about to change, written down first: so that a failure, or the next run after a kill, undoes it.

A journal exists only while a publish works. It holds the bytes that the files had, and later the git objects that
are about to get their names. The names themselves change in one transaction each: on origin, then here.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import ValidationError

from pipeline import git
from pipeline.errors import ReleaseError
from pipeline.store import write_whole
from pipeline.types import Frozen

_NAME = "exportyard-publish.json"
_UNDONE = "exportyard-undone"


class Journal(Frozen):
    """One publish under way.

    Attributes:
        root: the workspace.
        files: bytes in base64 that each file had, by path relative to `root`; None for one that wasn't there.
        head: the commit that `branch` named.
        commit: of the release, once it was made; no branch names it yet.
        tag_object: likewise of the annotated tag.
    """

    root: Path
    tag: str
    branch: str
    head: str
    files: Mapping[str, str | None]
    commit: str | None = None
    tag_object: str | None = None

    def changed(self) -> list[str]:
        """The files that now have other bytes than before."""
        return [name for name, before in self.files.items() if _encoded(self.root / name) != before]


def _path(root: Path) -> Path:
    return common_dir(root) / _NAME


def common_dir(root: Path) -> Path:
    """The git directory that all work trees of the repository share."""
    return Path(git.run(root, "rev-parse", "--path-format=absolute", "--git-common-dir"))


def begin(root: Path, tag: str, branch: str, head: str, names: Iterable[str]) -> Journal:
    """Write down the files `names` as they are now."""
    files = {name: _encoded(root / name) for name in names}
    return save(Journal(root=root, tag=tag, branch=branch, head=head, files=files))


def save(journal: Journal) -> Journal:
    """Write `journal` in one step."""
    write_whole(_path(journal.root), journal.model_dump_json())
    return journal


def close(journal: Journal) -> None:
    """Forget `journal`: everything is as it should be."""
    _path(journal.root).unlink(missing_ok=True)


def find(root: Path) -> Journal | None:
    """What a killed publish left, if anything.

    Raises:
        ReleaseError: it can't be read.
    """
    path = _path(root)
    try:
        return Journal.model_validate_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise ReleaseError(
            f"`{path}`, left by an interrupted publish, can't be read: {str(error).splitlines()[0]}",
            hint=f"see with `git status` that dvc.yaml and dvc.lock are as you want them, then delete `{path}`",
        ) from None


def _encoded(path: Path) -> str | None:
    try:
        return base64.b64encode(path.read_bytes()).decode()
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        raise ReleaseError(f"`{path}` is a folder, expected a file", hint="move it away and publish again") from None


def restore(journal: Journal, *, keep: bool) -> None:
    """Give every file the bytes that it had. With `keep`, what is replaced stays in the git directory."""
    for name in journal.changed():
        path, before = journal.root / name, journal.files[name]
        if keep and path.exists():
            kept = common_dir(journal.root) / _UNDONE / name
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(path.read_bytes())
        if before is None:
            path.unlink()
            continue
        fresh = path.with_name(f".{path.name}.tmp")
        fresh.write_bytes(base64.b64decode(before))
        fresh.replace(path)


def settle(journal: Journal, origin: str | None, *, keep: bool) -> bool:
    """Finish a publish whose tag has its name, here or on `origin`; undo any other. True when it is published."""
    published = journal.tag_object is not None and (_named_here(journal) or _named_there(journal, origin))
    if published:
        _finish(journal, keep=keep)
    else:
        restore(journal, keep=keep)
    close(journal)
    return published


def _finish(journal: Journal, *, keep: bool) -> None:
    root = journal.root
    if not _named_here(journal):
        try:
            move_names(journal)
        except git.GitError:  # the branch has moved on: the tag gets its name, the branch is merged by `git pull`
            git.run(root, "update-ref", f"refs/tags/{journal.tag}", str(journal.tag_object))
    if git.run(root, "rev-parse", "HEAD") == journal.commit:
        refresh(journal)
    elif not git.succeeds(root, "merge-base", "--is-ancestor", str(journal.commit), "HEAD"):
        restore(journal, keep=keep)


def _named_here(journal: Journal) -> bool:
    return git.succeeds(journal.root, "rev-parse", "-q", "--verify", f"refs/tags/{journal.tag}") and (
        git.run(journal.root, "rev-parse", f"refs/tags/{journal.tag}") == journal.tag_object
    )


def _named_there(journal: Journal, origin: str | None) -> bool:
    if origin is None:
        return False
    try:
        answer = git.run(journal.root, "ls-remote", origin, f"refs/tags/{journal.tag}")
    except git.GitError:
        return False  # not to be reached: the next push finds out, and is refused if the tag did arrive
    return answer.split()[:1] == [journal.tag_object]


def move_names(journal: Journal) -> None:
    """Point the branch at the release and create its tag, both or neither.

    Raises:
        git.GitError: the branch moved meanwhile, or the tag exists.
    """
    lines = ["start", f"update {journal.branch} {journal.commit} {journal.head}"]
    lines += [f"create refs/tags/{journal.tag} {journal.tag_object}", "prepare", "commit", ""]
    git.run(journal.root, "update-ref", "-m", f"release {journal.tag}", "--stdin", stdin="\n".join(lines))


def refresh(journal: Journal) -> None:
    """Bring git's index up to the new commit, for the files of the release only; what else is staged stays staged.

    Raises:
        ReleaseError: another git command holds the index. The journal stays, and the next publish comes here again.
    """
    try:
        git.run(journal.root, "reset", "-q", "HEAD", "--", *journal.files)
    except git.GitError as error:
        raise ReleaseError(
            f"`{journal.tag}` is published, but git's index could not be brought up to it: {error.said[:200]}",
            hint="when no other git command works here, publish again: that brings it up, and makes nothing twice",
        ) from error
