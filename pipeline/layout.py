"""The static registry: releases as an OCI image layout, in a place that any web server can show.

    <recipe>/index.json            what there is, replaced last: `Index`
    <recipe>/blobs/sha256/<hex>    bytes, never changed

A release's files come first, then what describes them, and the index at the very end. So whoever reads sees a release
whole or not at all, wherever a writer stops; the next one goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import digest, manifest, tags
from pipeline.depot import Depot
from pipeline.errors import ReleaseError, UsageError, first_line
from pipeline.manifest import Manifest, ReleaseFile
from pipeline.types import Target

INDEX = "index.json"
PULLER = "exportyard-pull.py"

IMAGE_INDEX = "application/vnd.oci.image.index.v1+json"
IMAGE_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
RELEASE = "application/vnd.exportyard.release.v1"
ENGINE = "application/vnd.exportyard.engine.v1"
_JSON, _BYTES = "application/json", "application/octet-stream"

TITLE = "org.opencontainers.image.title"
NAME = "org.opencontainers.image.ref.name"
OF_RECIPE = "dev.exportyard.recipe"
OF_VERSION = "dev.exportyard.version"
OF_TARGET = "dev.exportyard.target"
OF_CHANNEL = "dev.exportyard.channel"
SERIAL = "dev.exportyard.serial"
STATEMENT = "dev.exportyard.statement"
WITHDRAWN = "dev.exportyard.withdrawn"
PART = "dev.exportyard.part"

# our words for hardware, in Go's, which OCI's are
_SYSTEMS = {"linux": "linux", "android": "android", "ios": "ios", "macos": "darwin", "windows": "windows", "web": "js"}
_MACHINES = {
    "x86_64": {"architecture": "amd64"},
    "aarch64": {"architecture": "arm64"},
    "armv7l": {"architecture": "arm", "variant": "v7"},
    "riscv64": {"architecture": "riscv64"},
    "wasm32": {"architecture": "wasm"},
}

Plain = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """One file of a release, or one blob that describes some: its bytes are in `data`, or in the file `source`.

    Attributes:
        title: its path in the release; empty for what isn't a file of it.
    """

    sha256: str
    size_bytes: int
    title: str = ""
    data: bytes | None = None
    source: Path | None = None

    def descriptor(self, kind: str, **more: Any) -> Plain:
        """This as OCI has it."""
        found: Plain = {"mediaType": kind, "digest": f"sha256:{self.sha256}", "size": self.size_bytes, **more}
        return found | {"annotations": {TITLE: self.title, **more.get("annotations", {})}} if self.title else found


@dataclass(frozen=True)
class LaidOut:
    """A release that is in a registry.

    Attributes:
        digest: of the release's own index, ``sha256:...``.
        changed: False when all of it was there already.
    """

    recipe: str
    version: str
    digest: str
    sent_bytes: int
    changed: bool


def lay_out(release: Path, depot: Depot, *, withdrawn: str | None = None, verify: bool = False) -> LaidOut:
    """Put the release in the folder `release` into a registry, or complete what is there of it.

    Args:
        withdrawn: why it is no longer offered; None offers it.
        verify: read what is there, too, and replace what is damaged.

    Raises:
        ReleaseError: the folder holds no whole release, or the registry has another release of that version.
        UnavailableError: the registry can't be reached or written; what is offered there is what was before.
    """
    content = _manifest(release)
    recipe = content.recipe
    tags.check_name(recipe)  # it becomes a folder's name
    blobs, top, targets = _blobs(release, content)
    entries = _entries(content.version, top, targets, withdrawn)
    _check_same(depot, content, blobs, index(depot, recipe), top)
    _put_beside(depot, recipe)
    sent = _send(depot, recipe, blobs, verify=verify)

    def enter(found: Index) -> Index:
        _check_same(depot, content, blobs, found, top)
        return Index(recipe, (*found.without(found.about(content.version)).entries, *entries))

    changed = change(depot, recipe, enter)
    depot.after_sweep(recipe)
    sent += _send(depot, recipe, blobs, verify=False)  # a sweep may have taken what nothing led to
    return LaidOut(recipe, content.version, f"sha256:{top.sha256}", sent, changed or sent > 0)


def _manifest(release: Path) -> Manifest:
    path = release / manifest.FILE
    try:
        return manifest.parse(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ReleaseError(
            f"`{release}` holds no release: can't read `{manifest.FILE}`: {error}", hint="`exportyard pull` gets one"
        ) from None


# --- what a release is in OCI's words --------------------------------------------------------------------------------


def blob_of(value: Mapping[str, Any]) -> Layer:
    """JSON data as a blob, in its one canonical form."""
    return of_bytes(digest.canonical(value).encode())


def of_bytes(data: bytes, title: str = "") -> Layer:
    """`data` as a blob."""
    return Layer(digest.of_bytes(data), len(data), title, data=data)


def _blobs(release: Path, content: Manifest) -> tuple[list[Layer], Layer, dict[str, Plain]]:
    """All blobs of a release; among them its own index; and, by target, the descriptors of the targets' manifests."""
    common = _common(release, content)
    empty = of_bytes(b"{}")
    whole = _image(RELEASE, empty, common, {OF_RECIPE: content.recipe, OF_VERSION: content.version})
    listed = [whole.descriptor(IMAGE_MANIFEST, artifactType=RELEASE, annotations={PART: "release"})]
    blobs, targets = [empty, *common, whole], {}
    for name, engine in sorted(content.engines.items()):
        files = [_layer(release, file) for file in engine.files]
        notes = {OF_RECIPE: content.recipe, OF_VERSION: content.version, OF_TARGET: name}
        image = _image(ENGINE, empty, [*common, *files], notes)
        blobs += [*files, image]
        targets[name] = image.descriptor(IMAGE_MANIFEST, artifactType=ENGINE, annotations={OF_TARGET: name})
        listed.append(targets[name] | _platform(engine.target))
    top = blob_of(
        {
            "schemaVersion": 2,
            "mediaType": IMAGE_INDEX,
            "artifactType": RELEASE,
            "manifests": listed,
            "annotations": {OF_RECIPE: content.recipe, OF_VERSION: content.version},
        }
    )
    return [*blobs, top], top, targets


def _common(release: Path, content: Manifest) -> list[Layer]:
    """What every target needs: the manifest, the golden vectors, and what is said about the manifest."""
    found = [_small(release, manifest.FILE), _layer(release, content.golden.file)]
    return found + [_small(release, name) for name in content.beside]


def _small(release: Path, name: str) -> Layer:
    try:
        return of_bytes((release / name).read_bytes(), name)
    except OSError as error:
        raise ReleaseError(f"can't read `{release / name}`: {error.strerror}") from error


def _layer(release: Path, file: ReleaseFile) -> Layer:
    return Layer(file.sha256, file.size_bytes, file.path, source=release / file.path)


def _image(kind: str, empty: Layer, layers: Sequence[Layer], notes: Mapping[str, str]) -> Layer:
    return blob_of(
        {
            "schemaVersion": 2,
            "mediaType": IMAGE_MANIFEST,
            "artifactType": kind,
            "config": empty.descriptor(EMPTY),
            "layers": [layer.descriptor(_JSON if layer.title.endswith(".json") else _BYTES) for layer in layers],
            "annotations": dict(notes),
        }
    )


def _platform(target: Target) -> Plain:
    if target.platform not in _SYSTEMS or target.machine not in _MACHINES:
        return {}
    return {"platform": {"os": _SYSTEMS[target.platform], **_MACHINES[target.machine]}}


def _entries(version: str, top: Layer, targets: Mapping[str, Plain], withdrawn: str | None) -> list[Plain]:
    """The lines of the registry's index about one release."""
    notes = {NAME: f"v{version}", OF_VERSION: version}
    if withdrawn is not None:
        notes[WITHDRAWN] = withdrawn or "withdrawn"
    found = [top.descriptor(IMAGE_INDEX, artifactType=RELEASE, annotations=notes)]
    for name, described in targets.items():
        more = {NAME: f"v{version}-{name}", OF_VERSION: version, OF_TARGET: name}
        found.append(described | {"annotations": described["annotations"] | more})
    return found


# --- the registry's index ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Index:
    """``index.json`` of one recipe: descriptors of releases, of their targets, and of channels."""

    recipe: str
    entries: tuple[Plain, ...] = ()

    def text(self) -> bytes:
        """This as it is written; equal contents give equal bytes."""
        plain = {
            "schemaVersion": 2,
            "mediaType": IMAGE_INDEX,
            "manifests": sorted(self.entries, key=_rank),
            "annotations": {OF_RECIPE: self.recipe},
        }
        return (digest.canonical(plain) + "\n").encode()

    def releases(self) -> dict[str, Plain]:
        """By version, the descriptor of each release."""
        return {notes(one)[OF_VERSION]: one for one in self.entries if not {OF_TARGET, OF_CHANNEL} & notes(one).keys()}

    def channels(self) -> dict[str, Plain]:
        """By channel, the descriptor of the release that it points to."""
        return {notes(one)[OF_CHANNEL]: one for one in self.entries if OF_CHANNEL in notes(one)}

    def about(self, version: str) -> list[Plain]:
        """The descriptors of one release and its targets, without channels."""
        return [one for one in self.entries if notes(one)[OF_VERSION] == version and OF_CHANNEL not in notes(one)]

    def without(self, gone: Sequence[Plain]) -> Index:
        """This less some entries."""
        return Index(self.recipe, tuple(one for one in self.entries if one not in gone))


def notes(entry: Mapping[str, Any]) -> dict[str, str]:
    """The annotations of a descriptor."""
    found: dict[str, str] = entry["annotations"]
    return found


def _rank(entry: Plain) -> tuple[Any, ...]:
    """Releases first, in the order of their versions, each before its targets; then channels."""
    found = notes(entry)
    return OF_CHANNEL in found, tags.parse(found[OF_VERSION]), found.get(OF_TARGET, ""), found.get(OF_CHANNEL, "")


def index(depot: Depot, recipe: str) -> Index:
    """What the registry has of a recipe.

    Raises:
        ReleaseError: what is there is no index of ours.
        UnavailableError: the registry can't be read.
    """
    return _parsed(depot, recipe, depot.read(f"{recipe}/{INDEX}"))


def _parsed(depot: Depot, recipe: str, data: bytes | None) -> Index:
    if data is None:
        return Index(recipe)
    try:
        entries = json.loads(data)["manifests"]
        for entry in entries:
            tags.parse(notes(entry)[OF_VERSION])
            _ = entry["digest"], entry["size"]
        return Index(recipe, tuple(entries))
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise ReleaseError(
            f"`{recipe}/{INDEX}` in the registry `{depot.name}` can't be understood: {why}",
            hint=f"move that file away; `exportyard mirror {recipe}` makes it anew from git and DVC",
        ) from None


def change(depot: Depot, recipe: str, work: Callable[[Index], Index]) -> bool:
    """Replace the recipe's index by what `work` makes of it; whether that is another one."""
    changed = False

    def bytes_of(data: bytes | None) -> bytes | None:
        nonlocal changed
        made = work(_parsed(depot, recipe, data)).text()
        changed = made != data
        return made if changed else None

    depot.change(f"{recipe}/{INDEX}", bytes_of)
    return changed


def _check_same(depot: Depot, content: Manifest, blobs: Sequence[Layer], found: Index, top: Layer) -> None:
    """Two layouts of one release may differ in what is said about it, but not in the release.

    Raises:
        ReleaseError: the registry has another one.
    """
    known = found.releases().get(content.version)
    if known is None or known["digest"] == f"sha256:{top.sha256}":
        return
    before = _manifest_of(depot, content.recipe, known)
    after = next(one.sha256 for one in blobs if one.title == manifest.FILE)
    if before not in (None, f"sha256:{after}"):
        raise ReleaseError(
            f"the registry `{depot.name}` has another release under the number {content.version} of "
            f"`{content.recipe}`; nothing there was changed",
            hint="a release never changes: publish under a new number, or use another registry",
        )


def _manifest_of(depot: Depot, recipe: str, entry: Plain) -> str | None:
    """The digest of ``manifest.json`` in a release; None where the registry has lost what describes it."""
    for part in ("manifests", "layers"):
        data = depot.read(blob(recipe, entry["digest"]))
        if data is None:
            return None
        entry = json.loads(data)[part][0]
    found: str = entry["digest"]
    return found


# --- bytes -------------------------------------------------------------------------------------------------------


def blob(recipe: str, sha256: str) -> str:
    """Where the blob with this digest is, with or without ``sha256:`` in front."""
    return f"{recipe}/blobs/sha256/{sha256.removeprefix('sha256:')}"


def put_blob(depot: Depot, recipe: str, data: bytes) -> str:
    """Write a blob; returns ``sha256:...``."""
    made = of_bytes(data)
    depot.put(blob(recipe, made.sha256), data)
    return f"sha256:{made.sha256}"


def _send(depot: Depot, recipe: str, blobs: Sequence[Layer], *, verify: bool) -> int:
    """Write what isn't there yet; returns how many bytes that was."""
    wanted = {blob(recipe, one.sha256): one for one in blobs}
    there = depot.sizes(wanted)
    sent = 0
    for name, one in wanted.items():
        if there.get(name) == one.size_bytes and not (verify and depot.digest(name) != one.sha256):
            continue
        if one.data is not None:
            depot.put(name, one.data)
        elif one.source is not None:
            depot.put_file(name, one.source, one.sha256)
        sent += one.size_bytes
    return sent


def _put_beside(depot: Depot, recipe: str) -> None:
    """What makes the folder an OCI layout; and the program with which a device gets a release, one file."""
    wanted = {f"{recipe}/oci-layout": digest.canonical({"imageLayoutVersion": "1.0.0"}).encode()}
    program = Path(__file__).with_name("puller.py")
    if program.is_file():
        wanted[PULLER] = program.read_bytes()
    for name, data in wanted.items():
        if depot.read(name) != data:
            depot.put(name, data)
