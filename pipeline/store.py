"""The store: folders that are complete and described, or not there at all.

A folder is written beside its place and renamed into it; a folder without ``artifact.json`` does not exist.
The key of an artifact is a digest over all that decides its bytes; an equal key means there is nothing to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import JsonValue, ValidationError

from pipeline import digest
from pipeline.errors import StoreError
from pipeline.types import Artifact, FileFact, Kind, Signature

MANIFEST = "artifact.json"
_PAGE = 4096  # bytes; a disk with less left is full
FORMAT = 3  # part of every key: raise it when the meaning of a stage's files changes

State = Literal["cached", "built", "rebuilt"]


@dataclass(frozen=True)
class Key:
    """All that decides the bytes of an artifact; equal keys, equal artifacts."""

    kind: Kind
    inputs: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, JsonValue] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 of the key's canonical JSON."""
        return digest.of_json(
            {
                "format": FORMAT,
                "kind": self.kind,
                "inputs": dict(self.inputs),
                "config": dict(self.config),
                "tools": dict(self.tools),
            }
        )


@dataclass(frozen=True)
class Stored:
    """An artifact on disk whose files were verified against their digests."""

    path: Path
    artifact: Artifact

    @property
    def digest(self) -> str:
        """Content digest: equal bytes have equal digests, however they were made."""
        return digest.of_json({name: fact.sha256 for name, fact in self.artifact.files.items()})

    @property
    def size_bytes(self) -> int:
        """Sum of the sizes of all files."""
        return sum(fact.size_bytes for fact in self.artifact.files.values())

    def file(self, name: str) -> Path:
        """Path of one file of the artifact.

        Raises:
            StoreError: the artifact has no such file.
        """
        if name not in self.artifact.files:
            raise StoreError(f"`{self.path}` has no file `{name}`; it has {', '.join(sorted(self.artifact.files))}")
        return self.path / name

    def signature(self) -> Signature:
        """The calling convention, kept by program, onnx and engine artifacts in ``signature.json``."""
        return Signature.model_validate_json(self.file("signature.json").read_text())


@dataclass(frozen=True)
class Made:
    """What `make` did: nothing (cached), the work (built), or the work again because files were damaged (rebuilt)."""

    stored: Stored
    state: State
    reason: str = ""


def peek(folder: Path) -> Artifact | None:
    """The description of `folder` without a look at its files; None when it does not exist or can't be read."""
    try:
        return Artifact.model_validate_json((folder / MANIFEST).read_text())
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


def damage(folder: Path, artifact: Artifact) -> str | None:
    """What is wrong with the files of `folder`, or None when each has the digest that `artifact` says."""
    present = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()
    } - {MANIFEST}
    extra = present - set(artifact.files)
    if extra:
        return f"`{min(extra)}` does not belong there"
    for name, fact in artifact.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError:
            return f"`{name}` is missing"
        if size != fact.size_bytes:
            return f"`{name}` has {size} bytes, expected {fact.size_bytes}"
        if digest.of_file(path) != fact.sha256:
            return f"`{name}` has other bytes than were written"
    return None


def load(folder: Path) -> Stored:
    """The artifact in `folder`, verified.

    Raises:
        StoreError: it isn't there, or its files are damaged.
    """
    artifact = peek(folder)
    if artifact is None:
        raise StoreError(f"`{folder}` holds no artifact", hint="build it first with `exportyard export`")
    wrong = damage(folder, artifact)
    if wrong is not None:
        raise StoreError(
            f"the artifact in `{folder}` is damaged: {wrong}", hint="run `exportyard export` to rebuild it"
        )
    return Stored(folder, artifact)


def state_of(folder: Path, key: Key) -> tuple[Stored | None, str]:
    """The stored artifact if `folder` holds exactly what `key` asks for, or None and the reason why not."""
    artifact = peek(folder)
    if artifact is None:
        return None, "not built yet"
    if artifact.key != key.digest:
        return None, difference(artifact, key)
    wrong = damage(folder, artifact)
    if wrong is not None:
        return None, f"damaged: {wrong}"
    return Stored(folder, artifact), ""


def difference(artifact: Artifact, key: Key) -> str:
    """In words, what has changed between the artifact on disk and what `key` asks for."""
    changes: list[str] = []
    for title, old, new in (
        ("input", artifact.inputs, key.inputs),
        ("setting", artifact.config, key.config),
        ("tool", artifact.tools, key.tools),
    ):
        for name in sorted(set(old) | set(new)):
            before, after = old.get(name), new.get(name)
            if before != after:
                changes.append(_change(title, name, before, after))
    return "; ".join(changes) if changes else "made by another version of exportyard"


def _change(title: str, name: str, before: object, after: object) -> str:
    if title == "tool" and before is not None and after is not None:
        return f"{name} {before} -> {after}"
    if before is None:
        return f"{title} {name} is new"
    if after is None:
        return f"{title} {name} is gone"
    return f"{title} {name} changed"


def make(folder: Path, key: Key, work: Callable[[Path], Mapping[str, JsonValue]]) -> Made:
    """`folder` as `key` describes it: reused when it is already so, else made by `work`.

    `work` gets an empty folder on the same file system and returns facts about what it wrote there. Nothing
    appears in `folder` unless `work` succeeds; what was there before stays until then.

    Raises:
        StoreError: disk full, folder not writable, or `work` wrote nothing.
        ExportyardError: whatever `work` raises.
    """
    with explaining(folder), _locked(folder):
        _recover(folder)
        stored, reason = state_of(folder, key)
        if stored is not None:
            return Made(stored, "cached")
        artifact = _write(folder, key, work)
        state: State = "rebuilt" if reason.startswith("damaged") else "built"
        return Made(Stored(folder, artifact), state, reason)


def place(folder: Path, fill: Callable[[Path], None]) -> Stored:
    """An artifact that was made elsewhere, as `folder`; `fill` writes it, its description included, into an empty one.

    Raises:
        StoreError: disk full, folder not writable, or what `fill` wrote is not the artifact that it describes.
        ExportyardError: whatever `fill` raises.
    """
    with explaining(folder), _locked(folder):
        _recover(folder)
        fresh = _fresh(folder)
        try:
            fill(fresh)
            artifact = load(fresh).artifact
            _sync(fresh)
            _replace(folder, fresh)
            return Stored(folder, artifact)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Work on `folder`, in which the operating system may refuse something.

    Raises:
        StoreError: disk full, folder not writable, or another failure of the file system.
    """
    try:
        yield
    except OSError as error:
        raise explained(error, folder) from error


def explained(error: OSError, folder: Path) -> StoreError:
    """What the operating system has refused while `folder` was worked on, in words that a user can act on."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreError(
            f"no space left on the disk that holds `{folder.parent}`; nothing was changed",
            hint=f"free some space (`df -h {folder.parent}` shows how much there is) and run the command again",
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return StoreError(
            f"can't write `{error.filename or folder}`: {error.strerror}",
            hint=f"make it writable (`ls -ld {folder.parent}`), or work in another workspace with `-C DIR`",
        )
    return StoreError(f"can't make `{folder}`: {error}", hint="see whether the disk and the path are in order")


def _side(folder: Path, use: str) -> Path:
    """A place for temporary things: on the same file system, outside every artifact, ignored by git and DVC."""
    side = folder.parent / f".{folder.name}.{use}"
    side.parent.mkdir(parents=True, exist_ok=True)
    return side


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One maker per folder; a second one waits and then finds the work done."""
    path = _side(folder, "lock")
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _recover(folder: Path) -> None:
    """Undo what a killed process left: put a displaced artifact back, remove unfinished work."""
    displaced = _side(folder, "old")
    if displaced.exists():
        if folder.exists():
            shutil.rmtree(displaced)
        else:
            displaced.rename(folder)
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)


def _write(folder: Path, key: Key, work: Callable[[Path], Mapping[str, JsonValue]]) -> Artifact:
    fresh = _fresh(folder)
    try:
        facts = dict(_with_space(fresh, work))
        files = describe(fresh)
        if not files:
            raise StoreError(f"the stage that makes `{folder}` wrote nothing; this is a bug of the stage or backend")
        artifact = Artifact(
            kind=key.kind,
            key=key.digest,
            inputs=dict(key.inputs),
            config=dict(key.config),
            tools=dict(key.tools),
            files=files,
            facts=facts,
        )
        write_json(fresh / MANIFEST, artifact.plain())
        _sync(fresh)
        _replace(folder, fresh)
        return artifact
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _fresh(folder: Path) -> Path:
    """An empty folder, to be renamed to `folder`."""
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    fresh.chmod(0o755)
    return fresh


def _with_space(fresh: Path, work: Callable[[Path], Mapping[str, JsonValue]]) -> Mapping[str, JsonValue]:
    """Do the work; a library's failure on a full disk is told as that, whatever the library calls it."""
    try:
        return work(fresh)
    except Exception as error:
        if not isinstance(error, OSError) and ("No space left" in str(error) or _is_full(fresh)):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise


def _is_full(folder: Path) -> bool:
    return bool(shutil.disk_usage(folder).free < _PAGE)


def describe(folder: Path) -> dict[str, FileFact]:
    """Digest and size of every file below `folder`, in the order of their names."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        name: FileFact(sha256=digest.of_file(folder / name), size_bytes=(folder / name).stat().st_size)
        for name in names
    }


def _sync(folder: Path) -> None:
    """Bytes reach the disk before the name does, so that a power cut can't leave a described but empty file."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def _replace(folder: Path, fresh: Path) -> None:
    displaced = _side(folder, "old")
    if folder.exists():
        folder.rename(displaced)
    fresh.rename(folder)
    shutil.rmtree(displaced, ignore_errors=True)


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON with sorted keys: the same value, the same bytes."""
    path.write_text(json_text(value))


def json_text(value: object) -> str:
    """The text that `write_json` writes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace the file `path` by `content` in one step, so that no reader ever sees half of it.

    Raises:
        StoreError: the file can't be written.
    """
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            fresh = Path(stream.name)
            try:
                stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                fresh.chmod(0o644)
                fresh.replace(path)
            except OSError:
                fresh.unlink(missing_ok=True)
                raise
