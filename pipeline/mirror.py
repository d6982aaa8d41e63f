"""From git and DVC into the static registry: whatever git has as a release is there, too, and nothing else is told."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pipeline import channels, depots, git, layout, manifest, pull, registry, tags
from pipeline.channels import Promoted
from pipeline.depot import Depot
from pipeline.errors import ExportyardError, ReleaseError, UnavailableError, WorkspaceError, unknown
from pipeline.registry import Release
from pipeline.tags import Version


@dataclass(frozen=True)
class Mirrored:
    """What was done about one recipe: versions that are in the registry now, of them those that were not before."""

    recipe: str
    versions: tuple[str, ...]
    fresh: tuple[str, ...]
    sent_bytes: int


def released(root: Path, recipe: str | None, versions: Collection[Version] | None) -> list[str]:
    """Names of all recipes with a release; or `recipe` alone, if it has one, and all of `versions`.

    Raises:
        UsageError: there is no such recipe or version; the nearest is suggested.
    """
    folder = git.folder_of(root)
    known = [tag for tag in registry.tags_of(root) if tag.folder == folder]
    if recipe is None:
        return sorted({tag.recipe for tag in known})
    if recipe not in {tag.recipe for tag in known}:
        raise unknown("released recipe", recipe, {tag.recipe for tag in known}, where="this repository")
    for version in versions or ():
        registry.pick(known, recipe, str(version), "this repository")
    return [recipe]


def mirror(
    root: Path, depot: Depot, recipe: str, versions: Collection[Version] | None = None, *, verify: bool = False
) -> Mirrored:
    """Put releases into a registry that aren't there yet, and say there which are withdrawn and where channels point.

    Args:
        root: a workspace.
        versions: which; None is all that git has.
        verify: get those that are there again, too, compare every byte, and replace what is damaged.

    Raises:
        ReleaseError: a release can't be read, or the registry has another one of that version; the others are there.
        UnavailableError: the registry can't be reached or written.
    """
    found = registry.versions(root, recipe)
    wanted = [one for one in reversed(found) if versions is None or one.version in versions]
    known = layout.index(depot, recipe).releases()
    there, fresh, sent, failures = [], [], 0, []
    for release in wanted:
        entry = known.get(str(release.version))
        why = _why_withdrawn(root, release)
        if entry is None or verify or layout.notes(entry).get(layout.WITHDRAWN) != why:
            try:
                done = _put(root, depot, release, why, verify=verify)
            except ReleaseError as error:  # the others are none the worse for it
                failures.append(error)
                continue
            sent += done.sent_bytes
            fresh += [done.version] if done.changed else []
        there.append(str(release.version))
    channels.carry_over(root, depot, recipe)
    if failures:
        more = f" (and {len(failures) - 1} other versions failed, too)" if len(failures) > 1 else ""
        raise ReleaseError(
            f"{failures[0].message}{more}; the registry has {len(there)} versions", hint=failures[0].hint
        )
    return Mirrored(recipe, tuple(there), tuple(fresh), sent)


def promoted(root: Path, depot: Depot, recipe: str, done: Promoted) -> None:
    """Say in a registry what git says already: where a channel points.

    Raises:
        UnavailableError: the registry does not say so yet; git does.
    """
    try:
        mirror(root, depot, recipe, [tags.parse(done.version)])
    except (ReleaseError, UnavailableError) as error:
        raise _later(
            f"`{recipe}#{done.channel}` is {done.version}, but not in the registry yet", recipe, error
        ) from error


def after_publish(root: Path, recipe: str, version: str) -> str | None:
    """Put a release that was just made into the workspace's registry; returns where that is, None if there is none.

    Raises:
        UnavailableError: it isn't there yet; the release stands.
    """
    try:
        depot = depots.of(root)
        if depot is not None:
            mirror(root, depot, recipe, [tags.parse(version)])
    except (ReleaseError, UnavailableError, WorkspaceError) as error:
        raise _later(f"`{recipe}` {version} is published, but not in the registry yet", recipe, error) from error
    return depot.name if depot is not None else None


def _later(what: str, recipe: str, error: ExportyardError) -> UnavailableError:
    more = f" ({error.hint})" if error.hint else ""
    return UnavailableError(
        f"{what}: {error.message}", hint=f"`exportyard mirror {recipe}` brings it there, once that is in order{more}"
    )


def _put(root: Path, depot: Depot, release: Release, why: str | None, *, verify: bool) -> layout.LaidOut:
    here = root / "artifacts" / release.recipe / "release"
    if _is(here, release):
        try:
            return layout.lay_out(here, depot, withdrawn=why, verify=verify)
        except ReleaseError:
            if not _damaged(here):
                raise
    scratch = root / ".scratch"
    scratch.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="mirror-") as folder:
        pull.fetch(root, release.recipe, str(release.version), None, Path(folder) / "release")
        return layout.lay_out(Path(folder) / "release", depot, withdrawn=why, verify=verify)


def _is(folder: Path, release: Release) -> bool:
    """Whether the release in `folder` is this one."""
    path = folder / manifest.FILE
    try:
        return release.manifest is not None and path.read_text() == release.manifest.text()
    except (OSError, UnicodeDecodeError):
        return False


def _damaged(folder: Path) -> bool:
    """Whether the working copy of a release isn't whole; DVC may still have it."""
    try:
        manifest.load(folder)
    except ReleaseError:
        return True
    return False


def _why_withdrawn(root: Path, release: Release) -> str | None:
    """What the tag says that withdraws a release; None for one that is not withdrawn."""
    if not release.withdrawn:
        return None
    line = git.run(root, "for-each-ref", "--format=%(objecttype) %(contents:subject)", f"refs/tags/{release.tag}!")
    kind, _, said = line.partition(" ")
    return said.strip() if kind == "tag" and said.strip() else "withdrawn"
