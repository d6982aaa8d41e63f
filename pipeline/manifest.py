"""``manifest.json``: what a release is, why each engine was chosen, and the digest of every file in it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline import digest
from pipeline.errors import ReleaseError, unknown
from pipeline.types import Axis, Distance, Frozen, MetricResult, Scheme, Signature, Target, Timing, Tolerance, Tried

FILE = "manifest.json"
GOLDEN = "golden.safetensors"
# about the manifest, and so not described by it
PROVENANCE: Final = "provenance.json"
SBOM: Final = "sbom.json"
SIGNATURE: Final = "signature.json"
_NOTE = "artifact.json"  # the store's own description; beside a release, never part of it


def folder_of(target: str) -> str:
    """Where the files of a target's engine are in a release, with a slash at the end."""
    return f"engines/{target}/"


class ReleaseFile(Frozen):
    """One file of the release; `path` is POSIX, relative to the release folder."""

    path: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)

    @model_validator(mode="after")
    def _inside(self) -> ReleaseFile:
        # a manifest may come from anywhere, and its paths are written to
        if any(part in ("", ".", "..") for part in self.path.split("/")) or set(self.path) & {"\\", "\0", "\n"}:
            raise ValueError(f"`{self.path}` is not a plain path below the release folder")
        return self


class Source(Frozen):
    """The code that made the release: a git commit, and whether recipe or targets had uncommitted changes."""

    commit: str
    dirty: bool


class ParitySummary(Frozen):
    """The worst that was measured, per output, over `sizes` combinations of axis sizes; and the recipe's metric."""

    sizes: int
    vs_onnx: tuple[Distance, ...]
    vs_eager: tuple[Distance, ...]
    metric: MetricResult


class LatencyLine(Frozen):
    """Wall time of one call at one combination of axis sizes; `versus_eager` is how many times faster the engine is.

    On a device there is no eager PyTorch to compare with.
    """

    sizes: Mapping[str, int]
    threads: int
    eager: Timing | None = None
    engine: Timing
    versus_eager: float | None = None


class Latency(Frozen):
    """How fast the engine is, and on what that was measured; or why it wasn't."""

    cpu: str
    rows: tuple[LatencyLine, ...]
    not_measured: str | None = None


class Bucket(Frozen):
    """The files for inputs of up to `sizes`; paths as in `ReleaseFile`. They are an engine of fixed sizes."""

    sizes: Mapping[str, int]
    files: tuple[str, ...] = Field(min_length=1)


class Selector(Frozen):
    """Which of an engine's files are for which inputs. The first bucket that is large enough in every axis is for them.

    Attributes:
        axes: sizes that are served; the max is that of the largest bucket.
        buckets: smaller before larger.
    """

    axes: Mapping[str, Axis]
    buckets: tuple[Bucket, ...] = Field(min_length=1)


class Engine(Frozen):
    """What the release ships for one target.

    Attributes:
        target: the whole row, as it was when the engine was built.
        reason: why this scheme was chosen.
        tools: versions, and host facts, that decided the engine's bytes.
        golden: for each output, how far a device may be from the golden outputs, of the cases whose sizes are served.
        selector: where the row has `buckets`; without it the files are one engine, for all sizes of the signature.
    """

    target: Target
    scheme: Scheme
    reason: str
    tools: Mapping[str, str]
    files: tuple[ReleaseFile, ...] = Field(min_length=1)
    parity: ParitySummary
    latency: Latency
    golden: Mapping[str, Tolerance]
    selector: Selector | None = None


class Golden(Frozen):
    """Test vectors: eager fp32's outputs for a few inputs. Keys are ``<case>/in/<name>`` and ``<case>/out/<name>``."""

    file: ReleaseFile
    cases: Mapping[str, Mapping[str, int]]


Beside = Literal["provenance.json", "sbom.json", "signature.json"]


class Manifest(Frozen):
    """All of ``manifest.json``.

    Attributes:
        version: a semantic version without ``v``.
        checkpoint: sha256 of each file of the checkpoint.
        data: content digest of the calibration and evaluation data.
        tools: versions that decided the bytes of the captured program.
        skipped: for each target without an engine here, the reason.
        tried: for each target, every numeric form that was tried, with its numbers; empty in older releases.
        beside: names of the files about the manifest that the release has; `attest` writes them.
        signer: identity of the key that has signed it (`trust.key_id`), where there is a signature.
    """

    format: Literal[1] = 1
    recipe: str
    version: str
    source: Source
    checkpoint: Mapping[str, str]
    data: str
    tools: Mapping[str, str]
    signature: Signature
    engines: Mapping[str, Engine]
    skipped: Mapping[str, str]
    tried: Mapping[str, tuple[Tried, ...]] = {}
    golden: Golden
    beside: tuple[Beside, ...] = ()
    signer: str | None = None

    def text(self) -> str:
        """This as it is written: indented, with sorted keys, without what is None, and with a final newline."""
        plain = json.loads(self.model_dump_json(exclude_none=True))
        return json.dumps(plain, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"

    def files(self, targets: Collection[str] | None = None) -> list[ReleaseFile]:
        """Every file that the manifest describes; with `targets`, the golden vectors and those targets' files.

        Raises:
            UsageError: the release has no engine for one of `targets`; the nearest name is suggested.
        """
        for name in targets or ():
            if name in self.skipped:
                raise ReleaseError(
                    f"`{self.recipe}` v{self.version} has no engine for `{name}`: {self.skipped[name]}",
                    hint="it has: " + (", ".join(f"`{known}`" for known in self.engines) or "none"),
                )
            if name not in self.engines:
                raise unknown("target", name, self.engines, where=f"`{self.recipe}` v{self.version}")
        chosen = [engine for name, engine in self.engines.items() if targets is None or name in targets]
        return [self.golden.file, *(file for engine in chosen for file in engine.files)]


def parse(text: str, where: str) -> Manifest:
    """The manifest in `text`, which was read from `where`.

    Raises:
        ReleaseError: it isn't one, or is of a newer format.
    """
    try:
        found = Manifest.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise ReleaseError(
            f"`{where}` is not a release manifest: {key + ': ' if key else ''}{fault['msg']}",
            hint="get the release again; if it was made by a newer exportyard, update this one",
        ) from None
    twice = repeated(file.path for file in found.files())
    if twice is not None:
        raise ReleaseError(f"`{where}` lists `{twice}` twice", hint="get the release again")
    return found


def repeated(names: Iterable[str]) -> str | None:
    """The first of `names` that was there before."""
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), None)  # type: ignore[func-returns-value]


def load(folder: Path, targets: Collection[str] | None = None) -> Manifest:
    """The manifest of the release in `folder`, after every file in it was verified.

    Args:
        folder: a release folder, whole or with the engines of `targets` only.
        targets: the engines that must be there; None means all of them.

    Raises:
        ReleaseError: a file is missing, has another size or digest, or doesn't belong to the release.
        UsageError: the release has no such target.
    """
    path = folder / FILE
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ReleaseError(
            f"`{folder}` holds no release: there is no `{FILE}`", hint="`exportyard pull` gets one"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ReleaseError(f"can't read `{path}`: {error}", hint="get the release again") from None
    found = parse(text, str(path))
    check(folder, found, targets)
    return found


def check(folder: Path, manifest: Manifest, targets: Collection[str] | None = None) -> None:
    """Compare every file in `folder` with `manifest`.

    Raises:
        ReleaseError, UsageError: as `load`.
    """
    wanted = manifest.files(targets)
    strange = strangers(folder, {file.path for file in wanted}.union(manifest.beside))
    if strange:
        raise _refused(folder, f"`{strange[0]}` is not part of the release", "move it out of the folder")
    for name in manifest.beside:
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise _refused(folder, f"`{name}` is missing", "get the release again with `exportyard pull`")
    for file in wanted:
        wrong = fault(folder, file)
        if wrong is not None:
            raise _refused(folder, wrong, "get the release again with `exportyard pull`")


def strangers(folder: Path, known: Collection[str]) -> list[str]:
    """Names of the files in `folder` that are neither in `known` nor beside every release; links count as files."""
    present = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    return sorted(present - set(known) - {FILE, _NOTE})


def fault(folder: Path, file: ReleaseFile) -> str | None:
    """What is wrong with one file, or None when it has the size and digest that the manifest says."""
    path = folder / file.path
    if path.is_symlink() or not path.is_file():
        return f"`{file.path}` is missing"
    size = path.stat().st_size
    if size != file.size_bytes:
        return f"`{file.path}` has {size} bytes, the manifest says {file.size_bytes}"
    if digest.of_file(path) != file.sha256:
        return f"`{file.path}` has other bytes than the manifest says (sha256 differs)"
    return None


def _refused(folder: Path, what: str, hint: str) -> ReleaseError:
    return ReleaseError(f"the release in `{folder}` is not what was published: {what}", hint=hint)
