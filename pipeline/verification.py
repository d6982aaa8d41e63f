"""Whether a release folder is what was published, and by whom: files, provenance, SBOM, signature. Offline."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import JsonValue, ValidationError

from pipeline import attest, digest, manifest, sbom, trust
from pipeline.errors import ReleaseError
from pipeline.manifest import PROVENANCE, SBOM, SIGNATURE, Manifest
from pipeline.papers import Paper, Provenance, Sbom, Signed

Kind = TypeVar("Kind", bound=Paper)

_AGAIN = "get the release again, from where it was published"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `unchecked`: it is there, but there was nothing to check it with."""

    what: str
    state: Literal["verified", "unchecked", "absent"]
    details: str


@dataclass(frozen=True)
class Verified:
    """A release in which nothing was found to be wrong; `targets` are those whose engines are in the folder."""

    manifest: Manifest
    targets: tuple[str, ...]
    checks: tuple[Check, ...]

    def plain(self) -> dict[str, JsonValue]:
        """This as plain JSON data."""
        return {
            "recipe": self.manifest.recipe,
            "version": self.manifest.version,
            "targets": [*self.targets],
            "checks": [asdict(check) for check in self.checks],
        }


def verify(folder: Path, key: Path | None, expected: str | None = None) -> Verified:
    """Check everything that there is about the release in `folder`, which may have the engines of some targets only.

    Args:
        key: public key, PEM; with it, a release that it did not sign is refused.
        expected: ``recipe`` or ``recipe@version`` that the release must be; an older one may be signed as well.

    Raises:
        ReleaseError: something is missing, was changed, is about another release, or is not signed by `key`.
    """
    found, targets = _files(folder)
    if expected is not None:
        _check_expected(folder, found, expected)
    count = len(found.files(targets))
    files = Check("files", "verified", f"{count} files have the sha256 that the manifest says")
    return Verified(found, targets, (files, *papers(folder, found, key)))


def papers(folder: Path, found: Manifest, key: Path | None) -> tuple[Check, ...]:
    """Check what lies beside the manifest of a release whose files were compared with it before.

    Raises:
        ReleaseError: as `verify`.
    """
    return _provenance(folder, found), _sbom(folder, found), _signature(folder, found, key)


def _files(folder: Path) -> tuple[Manifest, tuple[str, ...]]:
    """The manifest, and the targets of which anything is there, every file of which was compared."""
    path = folder / manifest.FILE
    try:
        known = manifest.parse(path.read_text(), str(path)).engines
    except (OSError, UnicodeDecodeError):
        known = {}  # `load` says it better
    targets = tuple(name for name in known if (folder / manifest.folder_of(name)).exists())
    return manifest.load(folder, targets), targets


def _check_expected(folder: Path, found: Manifest, expected: str) -> None:
    recipe, _, version = expected.partition("@")
    wanted = (recipe, version.removeprefix("v") or found.version)
    if (found.recipe, found.version) != wanted:
        raise ReleaseError(f"`{folder}` holds `{found.recipe}@{found.version}`, expected `{expected}`", hint=_AGAIN)


def _provenance(folder: Path, found: Manifest) -> Check:
    if PROVENANCE not in found.beside:
        return _absent("provenance", found)
    said = _read(folder, PROVENANCE, Provenance)
    subjects = [(one.name, one.digest.get("sha256", "")) for one in said.subject]
    _same_files(PROVENANCE, subjects, _digests(folder, found, ()))
    definition = said.predicate.definition
    if (definition.parameters.recipe, definition.parameters.version) != (found.recipe, found.version):
        raise _refused(f"`{PROVENANCE}` is about another release")
    expected = {one["name"]: one["digest"] for one in attest.dependencies(found, None)}
    told = {one.name: one.digest for one in definition.dependencies}
    for name in sorted({*expected, *told}):
        if expected.get(name) != told.get(name):
            raise _refused(f"`{PROVENANCE}` and the manifest do not agree on `{name}`")
    dirty = " with uncommitted changes" if found.source.dirty else ""
    return Check("provenance", "verified", f"made from commit {found.source.commit[:10]}{dirty}")


def _sbom(folder: Path, found: Manifest) -> Check:
    if SBOM not in found.beside:
        return _absent("SBOM", found)
    said = _read(folder, SBOM, Sbom)
    about, whole = said.metadata.component, digest.of_file(folder / manifest.FILE)
    if (about.version, about.files()) != (found.version, [(found.recipe, whole)]):
        raise _refused(f"`{SBOM}` is about another release")
    files = [pair for one in said.components for pair in one.files()]
    _same_files(SBOM, files, {file.path: file.sha256 for file in found.files()})
    packages = {(one.name, one.version or "") for one in said.components if one.type == "library"}
    strange = packages.symmetric_difference(sbom.packages(found))
    if strange:
        raise _refused(f"`{SBOM}` and the manifest do not agree on the package `{min(strange)[0]}`")
    return Check("SBOM", "verified", f"{len(found.engines)} engines, made by {len(packages)} packages")


def _signature(folder: Path, found: Manifest, key: Path | None) -> Check:
    if SIGNATURE not in found.beside:
        if key is not None:
            raise ReleaseError(
                f"`{found.recipe}@{found.version}` is not signed, and `{key}` was given to verify it with",
                hint=f"publish it with `{trust.SIGNING_KEY}`, or verify it without a key",
            )
        return _absent("signature", found)
    statement = trust.read_bundle((folder / SIGNATURE).read_text(errors="replace"), key, f"`{folder / SIGNATURE}`")
    try:
        said = Signed.model_validate(statement)
    except ValidationError as error:
        raise _unreadable(SIGNATURE, error) from None
    signed = [(one.name, one.digest) for one in said.predicate.resources]
    _same_files(SIGNATURE, signed, _digests(folder, found, [name for name in found.beside if name != SIGNATURE]))
    if key is None:
        by = f"by the key {found.signer[:10]}; " if found.signer else ""
        return Check("signature", "unchecked", f"{by}give the public key (`--key` or {trust.PUBLIC_KEY}) to check it")
    return Check("signature", "verified", f"every file is signed by `{key}`")


def _digests(folder: Path, found: Manifest, beside: Collection[str]) -> dict[str, str]:
    """sha256 by path of all that the release has, those files included that are not in the folder."""
    there = {name: digest.of_file(folder / name) for name in (manifest.FILE, *beside)}
    return there | {file.path: file.sha256 for file in found.files()}


def _same_files(where: str, told: Sequence[tuple[str, str]], there: Mapping[str, str]) -> None:
    twice = manifest.repeated(name for name, _ in told)
    if twice is not None:
        raise _refused(f"`{where}` speaks twice about `{twice}`")
    digests = dict(told)
    for path in sorted({*digests, *there}):
        if path not in digests:
            raise _refused(f"`{where}` says nothing about `{path}`")
        if path not in there:
            raise _refused(f"`{where}` is also about `{path}`, which the release does not have")
        if digests[path] != there[path]:
            raise _refused(f"`{path}` is not what `{where}` says (sha256 differs)")


def _absent(what: str, found: Manifest) -> Check:
    return Check(what, "absent", f"`{found.recipe}@{found.version}` was published without")


def _read(folder: Path, name: str, kind: type[Kind]) -> Kind:
    try:
        return kind.model_validate_json((folder / name).read_bytes())
    except ValidationError as error:
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: ValidationError) -> ReleaseError:
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    return _refused(f"`{name}` is not in its form: {key + ': ' if key else ''}{fault['msg']}")


def _refused(what: str) -> ReleaseError:
    return ReleaseError(f"the release is not what was published: {what}", hint=_AGAIN)
