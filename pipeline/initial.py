"""A new workspace: files to start from, under git and DVC. What exists already is never overwritten."""

from __future__ import annotations

from pathlib import Path

from pipeline import dvc, git
from pipeline.errors import ReleaseError, UsageError, WorkspaceError

_SCAFFOLD = Path(__file__).with_name("scaffold")
# stored without their dots and folders, since packaging tools leave hidden files out
_FILES = {
    "README.md": "README.md",
    "dvc.yaml": "dvc.yaml",
    "prefect.yaml": "prefect.yaml",
    "gitignore": ".gitignore",
    "dvcignore": ".dvcignore",
    "targets.toml": "targets/targets.toml",
}
_LISTS = (".gitignore", ".dvcignore")
_EXAMPLE = ("recipe.toml", "model.py")
_DVC_FILES = (".dvc/config", ".dvc/.gitignore")


def init(folder: Path, remote: Path | None = None) -> list[str]:
    """Make `folder` a workspace, or add what one lacks; returns what was done, a line each.

    Args:
        remote: a folder to be the default DVC remote, which releases are pushed to; made if it isn't there.

    Raises:
        UsageError: `folder` is a file.
        WorkspaceError: it can't be written, or git or DVC refused.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`{folder}` is a file", hint="name a folder; it is made if it doesn't exist")
    try:
        written = _write_files(folder)
        if remote is not None:
            remote.resolve().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkspaceError(
            f"can't write `{error.filename or folder}`: {error.strerror}", hint="name a folder that you can write to"
        ) from error
    done = [f"wrote {name}" for name in written]
    try:
        done += _under_git(folder)
        fresh = not (folder / ".dvc").is_dir()
        done += _under_dvc(folder, remote)
        done += _commit(folder, [*written, *(_DVC_FILES if fresh or remote is not None else ())])
    except git.GitError as error:
        raise WorkspaceError(
            f"`{error.command}` failed in `{folder}`: {error.said}", hint="correct that and run `exportyard init` again"
        ) from error
    return done or [f"`{folder}` is a workspace already, and lacks nothing"]


def _write_files(folder: Path) -> list[str]:
    """Write what is missing; returns the paths, relative to `folder`."""
    contents = {place: (_SCAFFOLD / name).read_text() for name, place in _FILES.items()}
    if not any((folder / "recipes").glob("*/recipe.toml")):
        contents |= {f"recipes/example/{name}": (_SCAFFOLD / "example" / name).read_text() for name in _EXAMPLE}
    (folder / "artifacts").mkdir(parents=True, exist_ok=True)
    written = []
    for place, text in contents.items():
        path = folder / place
        if place in _LISTS and path.exists():
            text = _with_lines(path.read_text(), text)
            if text == path.read_text():
                continue
        elif path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        written.append(place)
    return written


def _with_lines(text: str, wanted: str) -> str:
    """`text` with those lines of `wanted` that it lacks at its end; comments aren't wanted for themselves."""
    present = set(text.splitlines())
    missing = [line for line in wanted.splitlines() if line not in present and not line.startswith("#")]
    if not missing:
        return text
    return text + ("" if text.endswith("\n") or not text else "\n") + "\n".join(missing) + "\n"


def _under_git(folder: Path) -> list[str]:
    # a folder that an outer repository ignores is nobody's: it gets a repository of its own
    if git.succeeds(folder, "rev-parse", "--show-toplevel") and not git.succeeds(folder, "check-ignore", "-q", "."):
        return []
    git.run(folder, "init", "--quiet", "--initial-branch", "main")
    return ["made a git repository"]


def _under_dvc(folder: Path, remote: Path | None) -> list[str]:
    fresh = not (folder / ".dvc").is_dir()
    if not fresh and remote is None:
        return []
    subdir = git.top(folder) != folder
    url = None if remote is None else str(remote.resolve())
    try:
        answer = dvc.ask(folder, "init", subdir=subdir, remote=url)
    except dvc.DvcError as error:
        raise WorkspaceError(
            f"DVC could not set up `{folder}`: {error.words}", hint="correct that and run `exportyard init` again"
        ) from error
    done = ["made a DVC repository"] if fresh else []
    default = answer["remote"]
    if default is None:
        done.append("no DVC remote yet: `dvc remote add -d storage /path/or/s3://bucket/path` before you publish")
    elif url is not None:
        done.append(f"DVC's default remote is {default}")
    return done


def _commit(folder: Path, names: list[str]) -> list[str]:
    """Make the first commit of a repository; in one that has commits, that is left to whoever made them."""
    present = [name for name in names if (folder / name).exists()]
    if not present:
        return []
    if git.succeeds(folder, "rev-parse", "-q", "--verify", "HEAD"):
        return [f"not committed: `git add {' '.join(present)}` and commit when you like it"]
    try:
        git.identity(folder)
    except ReleaseError as error:
        return [f"not committed, since git doesn't know who you are: {error.hint}, then `git add . && git commit`"]
    git.run(folder, "add", "--", *present)
    git.run(folder, "commit", "--quiet", "-m", "Make an exportyard workspace", "--", *present)
    return ["committed it"]
