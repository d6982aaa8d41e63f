"""Git, as a subprocess: never asks, always answers in English, and its failures are ours to explain."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import ReleaseError

# set while git runs a hook; inherited, they would point our commands at another repository or index
_OF_A_HOOK = frozenset({"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX"})


class GitError(Exception):
    """A git command that failed; `code` is its exit code, `said` the last line that it wrote about it."""

    def __init__(self, command: str, code: int, stderr: str) -> None:
        super().__init__(command)
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("fatal:", "error:"))]
        self.command = command
        self.code = code
        self.stderr = stderr
        self.said = (errors or lines or [f"exit code {code}"])[0]


def run(
    root: Path, *arguments: str, stdin: str | None = None, env: Mapping[str, str] | None = None, config: str = ""
) -> str:
    """Standard output of a git command in `root`, without the last newline.

    Raises:
        GitError: it ended with another code than 0.
        ReleaseError: git is not installed.
    """
    return run_bytes(root, *arguments, stdin=stdin, env=env, config=config).decode(errors="replace").removesuffix("\n")


def run_bytes(
    root: Path, *arguments: str, stdin: str | None = None, env: Mapping[str, str] | None = None, config: str = ""
) -> bytes:
    """As `run`, with the output as it is.

    Raises:
        GitError, ReleaseError: as `run`.
    """
    command = ["git", *(("-c", config) if config else ()), *arguments]
    inherited = {key: value for key, value in os.environ.items() if key not in _OF_A_HOOK}
    environment = {"GIT_SSH_COMMAND": "ssh -oBatchMode=yes", **inherited}
    environment |= {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C", **(env or {})}
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=environment,
            input=None if stdin is None else stdin.encode(),
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        raise ReleaseError("git is not installed", hint="install it (`apt install git`) and run this again") from None
    if done.returncode != 0:
        raise GitError(" ".join(command), done.returncode, done.stderr.decode(errors="replace"))
    return done.stdout


def succeeds(root: Path, *arguments: str) -> bool:
    """Whether a git command, used as a question, ends with 0."""
    try:
        run(root, *arguments)
    except GitError:
        return False
    return True


def top(root: Path) -> Path:
    """The root of the git work tree that holds `root`.

    Raises:
        ReleaseError: there is none.
    """
    try:
        return Path(run(root, "rev-parse", "--show-toplevel"))
    except GitError as error:
        raise ReleaseError(
            f"`{root}` is not in a git work tree: {error.said}",
            hint="releases are git tags: `exportyard init .` makes the repository and what else is missing",
        ) from None


def folder_of(root: Path) -> str:
    """Where `root` is in its git repository, as a POSIX path; empty when it is the repository's root."""
    top(root)
    return run(root, "rev-parse", "--show-prefix").rstrip("/")


def head(root: Path) -> str:
    """The commit that is checked out.

    Raises:
        ReleaseError: not a git repository, or nothing is committed yet.
    """
    top(root)
    try:
        return run(root, "rev-parse", "--verify", "-q", "HEAD")
    except GitError:
        raise ReleaseError(
            f"nothing is committed in `{root}` yet, and a release names the commit that it was made from",
            hint="commit the workspace first: `git add recipes targets && git commit`",
        ) from None


def branch(root: Path) -> str:
    """The full name of the branch that is checked out: ``refs/heads/main``.

    Raises:
        ReleaseError: HEAD is detached, or a merge is under way.
    """
    try:
        name = run(root, "symbolic-ref", "-q", "HEAD")
    except GitError:
        raise ReleaseError(
            "HEAD is detached: a release is a commit on a branch", hint="`git switch main`, then run this again"
        ) from None
    if succeeds(root, "rev-parse", "-q", "--verify", "MERGE_HEAD"):
        raise ReleaseError("a merge is under way in this repository", hint="`git commit` or `git merge --abort` first")
    return name


def check_idle(root: Path) -> None:
    """Refuse to begin while another git command holds the index.

    Raises:
        ReleaseError: its lock is there.
    """
    lock = Path(run(root, "rev-parse", "--path-format=absolute", "--git-path", "index.lock"))
    if lock.exists():
        raise ReleaseError(
            f"another git command is at work in this repository: there is `{lock}`",
            hint="wait until it has ended; if none runs, it was killed: delete that file",
        )


def identity(root: Path) -> str:
    """Who commits, as git writes it into objects: ``Name <mail> <seconds> <zone>``.

    Raises:
        ReleaseError: git doesn't know; a guess from the host's name is not taken.
    """
    try:
        run(root, "var", "GIT_AUTHOR_IDENT", config="user.useConfigOnly=true")
        return run(root, "var", "GIT_COMMITTER_IDENT", config="user.useConfigOnly=true")
    except GitError:
        raise ReleaseError(
            "git doesn't know who you are, and a release is signed with a name",
            hint='`git config user.name "Your Name" && git config user.email you@example.com`',
        ) from None
