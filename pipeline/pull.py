"""Pull: a release, or some targets of it, from a workspace or a git URL; checked, then installed in one step."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import dvc, git, manifest, registry, tags, verification
from pipeline.errors import ReleaseError
from pipeline.manifest import Manifest
from pipeline.tags import Tag


@dataclass(frozen=True)
class Pulled:
    """A release that is now in `folder`, checked; `changed` is False when it was there already."""

    manifest: Manifest
    tag: str
    folder: Path
    targets: tuple[str, ...]
    size_bytes: int
    changed: bool

    @property
    def version(self) -> str:
        """The version, without ``v``."""
        return self.manifest.version


@dataclass(frozen=True)
class _Place:
    """Where a release comes from: a git directory to ask, the URL that DVC opens, the workspace's folder inside."""

    git: Path
    url: str
    folder: str
    name: str


def fetch(
    source: Path | str,
    recipe: str,
    version: str | None,
    targets: Collection[str] | None,
    to: Path,
    key: Path | None = None,
) -> Pulled:
    """Install a release into the folder `to`.

    Args:
        source: a workspace, any other git repository with releases, or the URL of one.
        version: with or without ``v``; None is the latest.
        targets: the engines to get; None means all. Manifest and golden vectors always come along.
        to: a folder that doesn't exist, is empty, or holds an older release of the recipe and nothing else.
        key: public key that must have signed the release; None takes it from anybody.

    Raises:
        UsageError: unknown recipe, version or target; the nearest is suggested.
        ReleaseError: the source can't be read, a file arrived with other bytes, `key` did not sign it, or `to`
            holds something else. Then nothing was installed, and what was there is as it was.
    """
    to = Path(os.path.realpath(to))  # unlike `resolve`, it doesn't stumble over a loop of links
    with _opened(source) as place:
        tag = registry.pick(_tags(place), recipe, version, place.name)
        _get_tag(place, tag)
        text = registry.manifest_at(place.git, place.folder, tag)
        if text is None:
            raise ReleaseError(
                f"`{tag}` in {place.name} has no `{registry.copy_of_manifest(recipe)}`; exportyard did not make it",
                hint=f"`dvc artifacts get {place.name} {recipe} --rev v{tag.version}` may get it, unchecked",
            )
        content = manifest.parse(text, f"{tag}:{registry.copy_of_manifest(recipe)}")
        content.files(targets)  # an unknown target is said before anything is made
        try:
            with _one_at_a_time(to):
                changed = _install(place, tag, content, text, targets, to, key)
        except OSError as error:
            raise ReleaseError(
                f"can't write `{to}`: {error.strerror or error}", hint="see that the disk has space and is writable"
            ) from error
    files = content.files(targets)
    kept = tuple(name for name in content.engines if targets is None or name in targets)
    return Pulled(content, str(tag), to, kept, sum(file.size_bytes for file in files), changed)


@contextlib.contextmanager
def _opened(source: Path | str) -> Iterator[_Place]:
    """A local repository is asked where it lies; of a URL only the wanted tag is fetched."""
    if Path(source).is_dir():
        path = Path(source).resolve()
        bare = git.succeeds(path, "rev-parse", "--is-bare-repository") and (
            git.run(path, "rev-parse", "--is-bare-repository") == "true"
        )
        top = path if bare else git.top(path)
        yield _Place(top, str(top), "" if bare else git.folder_of(path), f"`{source}`")
        return
    if isinstance(source, Path) or not any(sign in source for sign in (":", "@")):
        raise ReleaseError(f"there is no folder `{source}`", hint="give a workspace's folder or a git URL")
    with tempfile.TemporaryDirectory(prefix="exportyard-") as scratch:
        git.run(Path(scratch), "init", "--quiet", "--bare")
        yield _Place(Path(scratch), source, "", f"`{source}`")


def _tags(place: _Place) -> list[Tag]:
    if str(place.git) == place.url:
        return [tag for tag in registry.tags_of(place.git) if tag.folder == place.folder]
    try:
        lines = git.run(place.git, "ls-remote", "--tags", "--refs", place.url).splitlines()
    except git.GitError as error:
        raise _unreachable(place, error) from error
    found = [tags.parse_tag(line.partition("\trefs/tags/")[2]) for line in lines]
    return [tag for tag in found if tag is not None and not tag.folder]


def _get_tag(place: _Place, tag: Tag) -> None:
    if str(place.git) == place.url:
        return
    try:
        git.run(place.git, "fetch", "--quiet", "--depth=1", place.url, f"+refs/tags/{tag}:refs/tags/{tag}")
    except git.GitError as error:
        raise _unreachable(place, error) from error


def _unreachable(place: _Place, error: git.GitError) -> ReleaseError:
    return ReleaseError(
        f"can't read the git repository {place.name}: {error.said[:300]}", hint="see that `git ls-remote` can reach it"
    )


@contextlib.contextmanager
def _one_at_a_time(to: Path) -> Iterator[None]:
    """Pulls into one folder queue; the parent folder itself is the lock, so that no lock file stays."""
    to.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(to.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _install(
    place: _Place,
    tag: Tag,
    content: Manifest,
    text: str,
    targets: Collection[str] | None,
    to: Path,
    key: Path | None,
) -> bool:
    displaced = to.with_name(f".{to.name}.old")
    if displaced.exists() and not to.exists():
        displaced.rename(to)  # a pull was killed between its two renames
    if _is_there(to, content, text, targets, key):
        return False
    _check_destination(to, content.recipe)
    fresh = Path(tempfile.mkdtemp(prefix=f".{to.name}.", suffix=".tmp", dir=to.parent))
    try:
        fresh.chmod(0o755)
        _download(place, tag, content, targets, fresh)
        (fresh / manifest.FILE).write_text(text)
        _check_papers(fresh, place, tag, content, key)
        if displaced.exists():
            shutil.rmtree(displaced)
        if to.exists():
            to.rename(displaced)
        fresh.rename(to)
        shutil.rmtree(displaced, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return True


def _check_papers(fresh: Path, place: _Place, tag: Tag, content: Manifest, key: Path | None) -> None:
    try:
        verification.papers(fresh, content, key)
    except ReleaseError as error:
        raise ReleaseError(
            f"`{tag}` from {place.name} was refused, nothing was installed: {error.message}", hint=error.hint
        ) from None


def _is_there(to: Path, content: Manifest, text: str, targets: Collection[str] | None, key: Path | None) -> bool:
    try:
        if (to / manifest.FILE).read_text() != text:
            return False
        manifest.check(to, content, targets)
        verification.papers(to, content, key)
    except (OSError, UnicodeDecodeError, ReleaseError):
        return False
    return True


def _check_destination(to: Path, recipe: str) -> None:
    """Refuse a folder whose content a new release must not replace."""
    elsewhere = "pull into another folder with `--to DIR`"
    if not to.exists():
        return
    if not to.is_dir():
        raise ReleaseError(f"`{to}` is a file", hint=elsewhere)
    if not any(to.iterdir()):
        return
    path = to / manifest.FILE
    if not path.is_file():
        raise ReleaseError(f"`{to}` is not empty and holds no release", hint=elsewhere)
    try:
        older = manifest.parse(path.read_text(), str(path))
    except (UnicodeDecodeError, ReleaseError):
        raise ReleaseError(f"`{path}` is not a manifest of ours", hint=f"{elsewhere}, or delete `{to}`") from None
    if older.recipe != recipe:
        raise ReleaseError(f"`{to}` holds a release of `{older.recipe}`", hint=elsewhere)
    strange = manifest.strangers(to, {file.path for file in older.files()}.union(older.beside))
    if strange:
        raise ReleaseError(
            f"`{to / strange[0]}` is not part of the release there and would be lost", hint=f"move it, or {elsewhere}"
        )


def _download(place: _Place, tag: Tag, content: Manifest, targets: Collection[str] | None, fresh: Path) -> None:
    front = f"/{place.folder}/artifacts/{content.recipe}/release".replace("//", "/")
    wanted = content.files(targets)
    names = [*(file.path for file in wanted), *content.beside]
    pairs = [(f"{front}/{name}", str(fresh / name)) for name in names]
    try:
        dvc.ask(fresh, "fetch", url=place.url, rev=str(tag), files=pairs)
    except dvc.DvcError as error:
        raise _not_there(place, tag, error, front) from error
    for file in wanted:
        wrong = manifest.fault(fresh, file)
        if wrong is not None:
            raise ReleaseError(
                f"`{tag}` from {place.name} was refused, nothing was installed: {wrong}",
                hint="the DVC remote or cache there is damaged: whoever published it can restore it with `dvc push`",
            )


def _not_there(place: _Place, tag: Tag, error: dvc.DvcError, front: str) -> ReleaseError:
    if "No space left" in error.detail:
        return ReleaseError(
            f"no space left for `{tag}`; nothing was installed", hint="free some space (`df -h`), or pull elsewhere"
        )
    name, _, why = error.detail.partition("\n")
    what = f"`{name.removeprefix(front).strip('/')}`: {why[:300]}" if error.kind == "file" else error.words
    return ReleaseError(
        f"can't get `{tag}` from {place.name}, nothing was installed: {what}",
        hint="see that the DVC remote can be reached from here, and that it holds the release (`dvc fetch`)",
    )
