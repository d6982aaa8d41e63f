"""A place where checkpoints arrive: a folder, or a prefix of an object store; and whether a file there is whole.

It is asked again and again what it holds, which works everywhere; network file systems tell nobody about changes.
"""

from __future__ import annotations

import fnmatch
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline.errors import UnavailableError, UsageError, first_line, nearest
from pipeline.types import CHECKPOINT_KINDS

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# what file systems tell, each of them some of it: marks of the content, and when it was written
_MARKS = ("ETag", "etag", "ino")
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Seen:
    """One file, as a place shows it.

    Attributes:
        name: within the place, such as ``digits/best.safetensors``.
        recipe: whose checkpoint it is.
        stamp: another one when the file is another one.
        age: to sort by, the oldest first.
    """

    name: str
    recipe: str
    stamp: str
    size: int
    age: str


@dataclass(frozen=True)
class Place:
    """See the module.

    Attributes:
        recipe: whose checkpoints lie there; None when they lie in one folder a recipe.
        pattern: of file names; None for all that may be checkpoints.
    """

    files: AbstractFileSystem
    root: str
    recipe: str | None
    pattern: str | None

    @property
    def local(self) -> bool:
        """Whether it is a folder of this machine's file system."""
        return "file" in protocols(self.files)

    @property
    def name(self) -> str:
        """What people call it: a path, or a URL."""
        return self.root if self.local else str(self.files.unstrip_protocol(self.root))

    def seen(self) -> list[Seen]:
        """The files that may be checkpoints, in the order in which they were written.

        Raises:
            UnavailableError: the place can't be read.
        """
        self.files.invalidate_cache()
        if self.recipe is not None:
            found = [self._one(entry, self.recipe) for entry in self._list(self.root) if self._fits(entry)]
        else:
            folders = [entry["name"] for entry in self._list(self.root) if entry["type"] == "directory"]
            found = [
                self._one(entry, PurePosixPath(folder).name)
                for folder in folders
                for entry in self._list(folder)
                if self._fits(entry)
            ]
        return sorted(found, key=lambda one: (one.age, one.name))

    def copy(self, seen: Seen, path: Path) -> None:
        """Copy a file of the place to `path`.

        Raises:
            UnavailableError: it can't be read, or is gone.
        """
        try:
            self.files.get_file(f"{self.root}/{seen.name}", str(path))
        except Exception as error:  # every file system has failures of its own
            raise self._away(error) from error

    def shows(self, seen: Seen) -> bool:
        """Whether the file is still the same.

        Raises:
            UnavailableError: the place can't be read.
        """
        self.files.invalidate_cache()
        # listed as before: what a file system tells of a single file may be written in another way
        entries = self._list(f"{self.root}/{seen.name}".rpartition("/")[0])
        return seen in [self._one(entry, seen.recipe) for entry in entries if self._fits(entry)]

    def _list(self, folder: str) -> list[dict[str, Any]]:
        try:
            entries: list[dict[str, Any]] = self.files.ls(folder, detail=True)
        except FileNotFoundError as error:
            if self.local:
                raise self._away(error) from error
            return []  # an object store has no folders, only names that begin so
        except Exception as error:
            raise self._away(error) from error
        # some object stores list the folder itself, as an empty file
        own = PurePosixPath(folder)
        names = {entry["name"]: PurePosixPath(entry["name"]) for entry in entries}
        entries = [entry for entry in entries if names[entry["name"]] != own]
        return [self._resolved(entry) for entry in entries if not names[entry["name"]].name.startswith(".")]

    def _resolved(self, entry: dict[str, Any]) -> dict[str, Any]:
        """What a link leads to, under the link's name."""
        if not entry.get("islink"):
            return entry
        try:
            return {**self.files.info(os.path.realpath(entry["name"])), "name": entry["name"]}
        except OSError:  # it leads nowhere
            return entry

    def _away(self, error: Exception) -> UnavailableError:
        return UnavailableError(
            f"can't read `{self.name}`: {type(error).__name__}: {first_line(error)}",
            hint="see whether it is there, and whether you may read it",
        )

    def _fits(self, entry: Mapping[str, Any]) -> bool:
        path = PurePosixPath(entry["name"])
        if entry["type"] != "file":
            return False
        return path.suffix in CHECKPOINT_KINDS if self.pattern is None else fnmatch.fnmatchcase(path.name, self.pattern)

    def _one(self, entry: Mapping[str, Any], recipe: str) -> Seen:
        name = PurePosixPath(entry["name"]).relative_to(self.root)
        marks = [str(entry[mark]) for mark in _MARKS if entry.get(mark)]
        times = [str(entry[time]) for time in _TIMES if entry.get(time)]
        stamp = "/".join([str(entry["size"]), *marks, *times[:1]])
        return Seen(str(name), recipe, stamp, int(entry["size"]), times[0] if times else "")


def at(place: str, recipe: str | None = None, pattern: str | None = None) -> Place:
    """The place called `place`, a folder or a URL such as ``s3://bucket/prefix``.

    Raises:
        UsageError: there is no such folder, or no such kind of URL.
        UnavailableError: the package for this kind of URL is not installed.
    """
    from fsspec.core import url_to_fs

    if "://" not in place:
        _check_folder(place)
        place = os.path.realpath(place)
    try:
        files, root = url_to_fs(place)
    except ImportError as error:
        kind = place.partition("://")[0]
        package = "exportyard[s3]" if kind == "s3" else f"dvc[{kind}]"
        raise UnavailableError(f"`{place}`: {first_line(error)}", hint=f"`pip install '{package}'`") from None
    except ValueError as error:
        raise UsageError(
            f"can't watch `{place}`: {first_line(error)}", hint="give a folder, or `s3://bucket/prefix`"
        ) from None
    return Place(files, root.rstrip("/"), recipe, pattern)


def _check_folder(place: str) -> None:
    if os.path.isdir(place):  # noqa: PTH112  unlike `is_dir`, it takes any text for a path
        return
    path = Path(place)
    if os.path.exists(place):  # noqa: PTH110
        raise UsageError(
            f"`{place}` is not a folder", hint=f"`exportyard notify {place} --recipe R` tells about one file"
        )
    around = [entry.name for entry in path.parent.iterdir()] if os.path.isdir(path.parent) else []  # noqa: PTH112
    close = nearest(path.name, around)
    raise UsageError(
        f"there is no folder `{place}`", hint=f"did you mean `{path.with_name(close)}`?" if close else "make it first"
    )


def protocols(files: AbstractFileSystem) -> tuple[str, ...]:
    """The names by which fsspec knows this kind of file system."""
    found = files.protocol
    return (found,) if isinstance(found, str) else tuple(found)


def broken(path: Path) -> str | None:
    """Why the file `path` can't be a whole checkpoint, or None; its tensors are not read.

    An old pickle, which says nowhere how long it is, is taken for whole.
    """
    if path.suffix not in CHECKPOINT_KINDS:
        return f"can't tell what kind of checkpoint it is; expected {', '.join(CHECKPOINT_KINDS)}"
    size = path.stat().st_size
    if size == 0:
        return "it is empty"
    if path.suffix == ".safetensors":
        return _short_safetensors(path, size)
    with path.open("rb") as stream:
        archive = stream.read(4) == b"PK\x03\x04"
    # an archive's list of contents stands at its end
    return "it is half an archive: its end is missing" if archive and not zipfile.is_zipfile(path) else None


def _short_safetensors(path: Path, size: int) -> str | None:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if length > size - _LENGTH_BYTES:
            return f"its header should have {length} bytes, and the file has {size}"
        try:
            header = json.loads(stream.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "its header is no safetensors header"
    wanted = _LENGTH_BYTES + length + max(ends, default=0)
    return None if wanted == size else f"its header announces {wanted} bytes, and it has {size}"
