"""The registry, read: which releases there are, from git alone. `record` writes it, `pull` gets what is in it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from pipeline import git, manifest, tags
from pipeline.errors import ReleaseError, nearest, unknown
from pipeline.manifest import Manifest
from pipeline.tags import Tag, Version

ORIGIN = "origin"


@dataclass(frozen=True)
class Release:
    """One release tag.

    Attributes:
        commit: the commit that the tag names; it holds ``dvc.lock`` and the manifest's copy.
        date: when the tag was made, ISO 8601 with the zone of who made it.
        withdrawn: there is a tag ``<recipe>@v<version>!``; such a release is never the latest.
        manifest: None when the tag's commit holds none that can be read; `problem` then says why.
    """

    recipe: str
    version: Version
    tag: str
    commit: str
    date: str
    withdrawn: bool
    manifest: Manifest | None
    problem: str = ""

    def plain(self) -> dict[str, JsonValue]:
        """This as plain JSON data, with the targets that it has an engine for."""
        return {
            "recipe": self.recipe,
            "version": str(self.version),
            "tag": self.tag,
            "commit": self.commit,
            "date": self.date,
            "withdrawn": self.withdrawn,
            "targets": {name: engine.scheme for name, engine in sorted(self.manifest.engines.items())}
            if self.manifest
            else None,
            "problem": self.problem or None,
        }


def row(release: Release) -> list[str]:
    """One line of a table of releases: version, date, commit, targets with their scheme."""
    content = release.manifest
    targets = [f"{name} ({engine.scheme})" for name, engine in sorted(content.engines.items())] if content else []
    version = f"{release.version} (withdrawn)" if release.withdrawn else str(release.version)
    return [version, release.date[:10], release.commit[:10], ", ".join(targets) or release.problem]


def has_origin(root: Path) -> bool:
    """Whether the git repository at `root` has a remote to share releases with."""
    return ORIGIN in git.run(root, "remote").splitlines()


def origin_url(root: Path) -> str | None:
    """The address of the remote to share releases with, as git has it; it may hold a password."""
    return git.run(root, "remote", "get-url", ORIGIN) if has_origin(root) else None


def copy_of_manifest(recipe: str) -> str:
    """Where git keeps a copy of the newest manifest, relative to the workspace; so no list of releases needs DVC."""
    return f"artifacts/{recipe}/release.json"


def versions(root: Path, recipe: str) -> list[Release]:
    """All releases of `recipe`, the newest version first. Empty when there is none.

    Raises:
        ReleaseError: `root` is not in a git work tree.
    """
    git.top(root)
    folder = git.folder_of(root)
    return _releases(root, folder, [tag for tag in tags_of(root) if tag.recipe == recipe and tag.folder == folder])


def newest(root: Path, recipe: str) -> Release | None:
    """The newest release of `recipe` that is neither withdrawn nor a pre-release; None where there is none.

    Raises:
        ReleaseError: `root` is not in a git work tree.
    """
    git.top(root)
    folder = git.folder_of(root)
    mine = [tag for tag in tags_of(root) if tag.recipe == recipe and tag.folder == folder]
    withdrawn = {tag.version for tag in mine if tag.withdrawn}
    standing = [tag for tag in mine if tag.version not in withdrawn and not tag.version.label]
    last = max(standing, key=lambda tag: tag.version, default=None)
    return None if last is None else _release(root, folder, last, withdrawn=False)


def manifest_of(root: Path, recipe: str, version: str) -> Manifest:
    """The manifest of one release of `recipe`, from git alone.

    Args:
        version: with or without ``v``.

    Raises:
        UsageError: there is no such version; the nearest is suggested.
        ReleaseError: `root` is not in a git work tree, or git has no readable manifest of that version.
    """
    known = versions(root, recipe)
    tag = pick([tag for tag in tags_of(root) if tag.folder == git.folder_of(root)], recipe, version, "this workspace")
    found = next(release for release in known if release.version == tag.version)
    if found.manifest is None:
        raise ReleaseError(f"nothing is known of `{tag}`: {found.problem}", hint=f"`exportyard releases {recipe}`")
    return found.manifest


def changed_files(root: Path, recipe: str, before: str, after: str) -> list[str]:
    """Files of the recipe and of ``targets/`` that differ between two commits; none where git lacks one of them."""
    try:
        names = git.run(root, "diff", "--name-only", "--relative", before, after, "--", f"recipes/{recipe}", "targets")
    except git.GitError:
        return []
    return names.splitlines()


def tags_of(root: Path) -> list[Tag]:
    """All release tags of the git repository at `root`, those that withdraw one included."""
    names = git.run(root, "for-each-ref", "--format=%(refname:strip=2)", "refs/tags").splitlines()
    return [tag for name in names if (tag := tags.parse_tag(name)) is not None]


def _releases(root: Path, folder: str, found: Iterable[Tag]) -> list[Release]:
    known = list(found)
    withdrawn = {tag.version for tag in known if tag.withdrawn}
    listed = [_release(root, folder, tag, tag.version in withdrawn) for tag in known if not tag.withdrawn]
    return sorted(listed, key=lambda release: release.version, reverse=True)


def _release(root: Path, folder: str, tag: Tag, withdrawn: bool) -> Release:
    name = str(tag)
    line = git.run(root, "for-each-ref", "--format=%(creatordate:iso-strict) %(*objectname) %(objectname)", _ref(name))
    date, *commits = line.split()
    text, problem = manifest_at(root, folder, tag), ""
    content = None
    try:
        content = manifest.parse(text, f"{name}:{copy_of_manifest(tag.recipe)}") if text is not None else None
    except ReleaseError as error:
        problem = error.message
    if text is None:
        problem = f"the tag's commit has no `{copy_of_manifest(tag.recipe)}`; exportyard did not make it"
    return Release(tag.recipe, tag.version, name, commits[0], date, withdrawn, content, problem)


def _ref(tag: str) -> str:
    return f"refs/tags/{tag}"


def manifest_at(root: Path, folder: str, tag: Tag) -> str | None:
    """The manifest's text as git has it at a tag, or None."""
    path = f"{folder}/{copy_of_manifest(tag.recipe)}".lstrip("/")
    try:
        return git.run_bytes(root, "cat-file", "blob", f"{_ref(str(tag))}:{path}").decode(errors="replace")
    except git.GitError:
        return None


def pick(known: Collection[Tag], recipe: str, version: str | None, where: str) -> Tag:
    """The tag of one version of `recipe`; of the latest that is neither withdrawn nor a pre-release without `version`.

    Raises:
        UsageError: there is no such recipe or version; the nearest is suggested.
        ReleaseError: everything that there is was withdrawn.
    """
    mine = [tag for tag in known if tag.recipe == recipe]
    if not mine:
        raise unknown("released recipe", recipe, {tag.recipe for tag in known}, where=where)
    withdrawn = {tag.version for tag in mine if tag.withdrawn}
    standing = [tag for tag in mine if not tag.withdrawn]
    if version is not None:
        wanted = tags.parse(version)
        exact = next((tag for tag in standing if tag.version == wanted), None)
        if exact is None:
            raise _no_version(recipe, wanted, standing, where)
        return exact
    usable = [tag for tag in standing if tag.version not in withdrawn]
    final = [tag for tag in usable if not tag.version.label] or usable
    if not final:
        raise ReleaseError(f"every release of `{recipe}` was withdrawn", hint="name a version to get it all the same")
    return max(final, key=lambda tag: tag.version)


def _no_version(recipe: str, wanted: Version, standing: Collection[Tag], where: str) -> Exception:
    known = [str(tag.version) for tag in sorted(standing, key=lambda tag: tag.version, reverse=True)]
    error = unknown("version", str(wanted), known, where=f"the releases of `{recipe}` in {where}")
    if nearest(str(wanted), known) is not None and len(known) > 1:
        error.hint = f"{error.hint} (there are {', '.join(f'`{version}`' for version in known[:8])})"
    return error


def dirty_files(root: Path, recipe: str, code: Iterable[Path] = ()) -> list[str]:
    """Files that decide a release and differ from what is committed, untracked ones included, relative to `root`.

    Args:
        code: files beside the recipe's folder and ``targets/`` that the recipe imports.

    Raises:
        ReleaseError: `root` is not in a git work tree.
    """
    git.top(root)
    paths = [f"recipes/{recipe}", "targets", *(str(path) for path in code)]
    text = git.run(root, "status", "--porcelain=v1", "-z", "--no-renames", "--untracked-files=all", "--", *paths)
    front = git.folder_of(root)
    names = [entry[3:] for entry in text.split("\0") if entry]
    return sorted(name.removeprefix(f"{front}/") if front else name for name in names)
